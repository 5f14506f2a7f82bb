"""The code that a job runs: a copy of the package as it is now, so that later changes do not reach a waiting job.

The copy is what `git archive` and the uncommitted changes make, new files included; it is taken from the package's files
themselves, because an installed wheel has no git. Commit and changes are written beside it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import of_system
from ..evaluate.protocol import write_whole
from ..train.folder import code_state

PACKAGE = Path(__file__).resolve().parents[1]


def snapshot(place: Path, package: Path = PACKAGE) -> Path:
    """Copy the package below `place`, once for each content; returns the folder to put on PYTHONPATH.

    Raises:
        UserError: it cannot be written.
    """
    files = sorted(package_files(package))
    final = place / _digest(package, files)
    if (final / "tokar").is_dir():
        return final
    unfinished = place / f".{secrets.token_hex(4)}"
    try:
        for file in files:
            target = unfinished / "tokar" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / file, target)
        commit, patch = code_state()
        write_whole(unfinished / "commit", f"{commit or 'no git checkout'}\n".encode())
        write_whole(unfinished / "code.patch", patch.encode())
        unfinished.rename(final)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise of_system(error, place, fix="set paths.runs and name to a folder you can write") from error
    return final


def package_files(package: Path) -> Iterator[Path]:
    """Files of the package, relative to it: what lies at the top and in sub-packages, without what Python compiles."""
    yield from (Path(file.name) for file in package.iterdir() if file.suffix == ".py" or file.name == "py.typed")
    for top in package.iterdir():
        if (top / "__init__.py").is_file():
            for folder, inner, names in os.walk(top):
                inner[:] = [name for name in inner if name != "__pycache__"]
                yield from (Path(folder, name).relative_to(package) for name in names)


def _digest(package: Path, files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        content = (package / file).read_bytes()
        whole.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]
