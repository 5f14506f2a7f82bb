"""The wheel holds everything: it is installed alone and used from a folder that has its own `models/` and `data/`."""

import configparser
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


def run(*command, **more):
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory):
    """The files that git keeps, and nothing that lies beside them."""
    folder = tmp_path_factory.mktemp("copy")
    names = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=root).split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((root / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sdist(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=copy)
    (file,) = out.glob("*.tar.gz")
    return file


def build(source, out, *options):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check", *options, "-w", out, source)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built as an installer builds it that was given the sdist: whatever that lacks is missing here."""
    return build(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel alone; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", "-q",
        "--disable-pip-version-check", wheel)  # fmt: skip
    # adds that folder but runs no .pth file in it, so the editable tokar there is not found
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    for name in ("models", "data", "conf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    return tmp_path


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_it_holds_every_yaml_file_and_no_tests(root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"tokar/{path.relative_to(root)}" for path in (root / "conf").rglob("*.yaml")} - names == set()
    assert "tokar/py.typed" in names
    assert not [name for name in names if name.startswith(("tokar/tests", "tests", "tokar/scripts"))]


def test_built_directly_it_holds_the_same(copy, wheel, tmp_path):
    direct = build(copy, tmp_path, "--no-build-isolation")  # the other build has shown that what it needs is declared
    assert sorted(zipfile.ZipFile(direct).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_commands_work_from_it(installed, elsewhere):
    assert run(installed / "tokar", "--version", cwd=elsewhere, env=environment()).startswith("tokar ")
    checked = run(
        installed / "tokar", "config", "check", "classifier", "experiment=digits_classifier", cwd=elsewhere, env=environment()
    )
    assert checked.startswith("ok: runs/digits_classifier")
    explained = run(installed / "tokar", "config", "show", "tokenizer", "--explain", cwd=elsewhere, env=environment())
    assert "tokenizer.quantizer.codebook_size" in explained


def test_every_package_and_module_is_imported_from_it(root, installed, elsewhere):
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / "setup.cfg")
    code = f"""
import importlib, pkgutil, tokar
import {", ".join(settings["options"]["packages"].split())}
for module in pkgutil.walk_packages(tokar.__path__, "tokar."):
    importlib.import_module(module.name)
print(tokar.__file__)
"""
    place = run(installed / "python", "-c", code, cwd=elsewhere, env=environment())
    assert Path(place.strip()).is_relative_to(installed.parent)
