import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokar.errors import UserError
from tokar.slurm.snapshot import package_files, snapshot


@pytest.fixture
def package(tmp_path):
    """A package without git, with what must not be copied beside it."""
    folder = tmp_path / "site-packages" / "tokar"
    for name in ("__init__.py", "cli.py", "py.typed", "slurm/__init__.py", "slurm/job.sbatch", "slurm/__pycache__/a.pyc",
                 "models/__init__.py", "models/deep/__init__.py", "datasets/huge.tar", "tests/a.py", "README.md"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_copy_holds_the_package_and_nothing_else(package, tmp_path):
    code = snapshot(tmp_path / "code", package)
    copied = {path.relative_to(code / "tokar").as_posix() for path in (code / "tokar").rglob("*") if path.is_file()}
    assert copied == {"__init__.py", "cli.py", "py.typed", "slurm/__init__.py", "slurm/job.sbatch", "models/__init__.py",
                      "models/deep/__init__.py"}  # fmt: skip


def test_the_same_code_is_copied_once_and_changed_code_beside_it(package, tmp_path):
    first = snapshot(tmp_path / "code", package)
    assert snapshot(tmp_path / "code", package) == first
    (package / "models" / "new.py").write_text("a = 1")
    second = snapshot(tmp_path / "code", package)
    assert second != first
    assert (second / "tokar/models/new.py").exists()
    assert not (first / "tokar/models/new.py").exists()


def test_what_cannot_be_written_leaves_nothing_half_copied(package, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match="the disk is full"):
        snapshot(tmp_path / "code", package)
    assert list((tmp_path / "code").iterdir()) == []


def test_a_copy_of_this_package_runs_though_a_folder_of_its_name_is_near(root, tmp_path):
    code = snapshot(tmp_path / "code")
    (tmp_path / "tokar").mkdir()
    (tmp_path / "tokar" / "__init__.py").write_text("raise ImportError('the wrong package')")
    place = "import tokar.slurm.rank, tokar.conf; print(tokar.conf.__file__)"
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    said = subprocess.run(
        [sys.executable, "-c", place], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(said.stdout.strip()) == code / "tokar/conf/__init__.py"
    listed = {path.relative_to(root) for path in root.glob("conf/**/*.yaml")}
    assert listed <= set(package_files(root))
