"""The run folder: named by the config, never by the clock; one process at a time; what made the run lies in it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ..conf.compose import Composed, differences
from ..errors import UserError

CONFIG_NAME, ENVIRONMENT_NAME = "config.yaml", "environment.json"
_PACKAGES = ("torch", "lightning", "numpy", "webdataset", "hydra-core", "simplejpeg", "safetensors", "wandb", "deepspeed")


def run_folder(composed: Composed) -> Path:
    """Folder of a run: `paths.runs` / name. The name is `name`, or the experiment followed by the other overrides."""
    config = composed.typed
    return Path(config.paths.runs) / (config.name or default_name(composed))


def default_name(composed: Composed) -> str:
    """E.g. `digits_vqgan-optim.lr=3e-4`; a long one ends in a hash instead of being cut."""
    from ..conf.compose import is_neutral

    base = composed.typed.experiment or composed.typed.stage
    tags = [text for text in composed.overrides if not is_neutral(text.lstrip("+~").split("=")[0])]
    tags = sorted(tag for tag in tags if not tag.startswith("experiment="))
    name = "-".join([base, *(re.sub(r"[^\w.=,+~-]+", "_", tag) for tag in tags)])
    return name if len(name) <= 100 else f"{base}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class RunFolder:
    """A run folder held by this process; a dead process cannot hold it.

    Raises:
        UserError: it cannot be written, another process holds it, or another config made it.
    """

    def __init__(self, path: Path, composed: Composed) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror})", where=path, fix="set paths.runs to a folder you can write"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another process trains in this run folder", where=path, fix="wait for it, stop it, or set name=…"
            ) from error
        self._check_config(composed)
        _write_snapshot(path, composed)

    def _check_config(self, composed: Composed) -> None:
        file = self.path / CONFIG_NAME
        if not file.exists():
            return
        try:
            earlier = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise UserError(
                "not readable as YAML", where=file, fix="restore it, or remove the run folder to start afresh"
            ) from error
        changed = differences(composed.plain, earlier or {})
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"this run was made with another config: {', '.join(changed[:5])}{more}",
                where=self.path,
                fix="set name=… for a new run (with resume_from=… to go on from this one), or undo the change",
            )


def _write_snapshot(path: Path, composed: Composed) -> None:
    """The resolved config, the environment and every start, and the uncommitted code."""
    (path / CONFIG_NAME).write_text(composed.yaml())
    file = path / ENVIRONMENT_NAME
    known = json.loads(file.read_text()) if file.exists() else {"starts": []}
    commit, patch = code_state()
    known |= {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit,
    }
    known["starts"].append(" ".join(["tokar", *sys.argv[1:]]))
    file.write_text(json.dumps(known, indent=1) + "\n")
    if patch:
        (path / "code.patch").write_text(patch)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_state() -> tuple[str | None, str]:
    """Commit and uncommitted changes of the checkout that runs, when it is one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None, ""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        patch = subprocess.run(["git", "diff", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    return commit, patch


def read_config(path: Path) -> dict[str, Any]:
    """The resolved config of a run folder.

    Raises:
        UserError: there is none.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"no {CONFIG_NAME} here", where=path, fix="point at a run folder")
    return dict(yaml.safe_load(file.read_text()))
