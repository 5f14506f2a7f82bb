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
from ..errors import UserError, of_system
from ..evaluate.protocol import write_whole

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
            raise of_system(error, path, fix="set paths.runs and name to a folder you can write") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another process trains in this run folder", where=path, fix="wait for it, stop it, or set name=…"
            ) from error
        self._check_config(composed)
        _write_snapshot(path, composed)

    def _check_config(self, composed: Composed) -> None:
        """What was saved here must have been made with this config; where nothing was, there is nothing to mix up."""
        if not (self.path / CONFIG_NAME).exists() or not any(self.path.glob("checkpoints/step-*/COMPLETE")):
            return
        earlier = read_config(self.path)
        if earlier.get("stage") != composed.plain["stage"]:
            what = f"this is a run of the stage {earlier.get('stage')!r}"
            raise UserError(what, where=self.path, fix="set name=… for a new run")
        named = [text.lstrip("+~").split("=")[0].replace("/", ".") for text in composed.overrides]
        changed = differences(composed.plain, earlier, named)
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"this run was made with another config: {', '.join(changed[:5])}{more}",
                where=self.path,
                fix="set name=… for a new run (with resume_from=… to go on from this one), or undo the change",
            )


def _write_snapshot(path: Path, composed: Composed) -> None:
    """The resolved config, the environment and every start, and the uncommitted code."""
    write_whole(path / CONFIG_NAME, composed.yaml().encode())
    file = path / ENVIRONMENT_NAME
    known = _earlier(file)
    commit, patch = code_state()
    known |= {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit,
    }
    known["starts"].append(" ".join(["tokar", *sys.argv[1:]]))
    write_whole(file, (json.dumps(known, indent=1) + "\n").encode())
    if patch:
        write_whole(path / "code.patch", patch.encode())


def _earlier(file: Path) -> dict[str, Any]:
    """What earlier starts left; a damaged record keeps no run from going on."""
    try:
        known = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {"starts": []}
    return {**known, "starts": list(known.get("starts", []))}


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
        UserError: there is none, or it is damaged.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"no {CONFIG_NAME} here", where=path, fix="point at a run folder")
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        fix = "restore it, or remove this file if the run was made with the config of this command"
        raise UserError("damaged or not YAML", where=file, fix=fix) from error
