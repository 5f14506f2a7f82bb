"""The run folder: named by the config, never by the clock; one process at a time; what made the run lies in it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..conf.compose import Composed, differences
from ..errors import UserError, of_system
from ..evaluate.protocol import write_whole
from .lock import Lock

CONFIG_NAME, ENVIRONMENT_NAME = "config.yaml", "environment.json"
WRITABLE = "set paths.runs and name to a folder you can write"
_PACKAGES = ("torch", "lightning", "numpy", "webdataset", "hydra-core", "simplejpeg", "safetensors", "wandb", "deepspeed")


def run_folder(composed: Composed) -> Path:
    """Folder of a run: `paths.runs` / name. The name is `name`, or the experiment followed by the other overrides."""
    config = composed.typed
    return Path(config.paths.runs) / (config.name or default_name(composed))


def default_name(composed: Composed) -> str:
    """E.g. `digits_vqgan-optim.lr=3e-4`."""
    from ..conf.compose import is_neutral

    tags = [text for text in composed.overrides if not is_neutral(text.lstrip("+~").split("=")[0])]
    return tagged_name(composed.typed.experiment or composed.typed.stage, tags)


def tagged_name(base: str, overrides: Sequence[str]) -> str:
    """`base` followed by overrides; a long one ends in a hash instead of being cut."""
    tags = sorted(text for text in overrides if not text.startswith("experiment="))
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
            self._lock = Lock(path)
        except OSError as error:
            raise of_system(error, path, fix=WRITABLE) from error
        check_made_with(path, composed)
        _write_snapshot(path, composed)


def check_made_with(path: Path, composed: Composed) -> None:
    """What was saved in a run folder must have been made with this config; where nothing was, there is nothing to mix up.

    Raises:
        UserError: another config, or another stage, made it.
    """
    if not (path / CONFIG_NAME).exists() or not any(path.glob("checkpoints/step-*/COMPLETE")):
        return
    earlier = read_config(path)
    if earlier.get("stage") != composed.plain["stage"]:
        what = f"this is a run of the stage {earlier.get('stage')!r}"
        raise UserError(what, where=path, fix="set name=… for a new run")
    named = [text.lstrip("+~").split("=")[0].replace("/", ".") for text in composed.overrides]
    changed = differences(composed.plain, earlier, named)
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"this run was made with another config: {', '.join(changed[:5])}{more}",
            where=path,
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
