"""The house rules that a machine can check: floors, packages, style, types, and the README's picture of the tree."""

import configparser
import os
import re
import shutil
import subprocess
import sys

import pytest

IGNORED = {"__pycache__", "build", "dist", "datasets", "runs", "demo", "outputs", "multirun", "wandb"}


def tool(name, *arguments, **more):
    program = shutil.which(name, path=os.path.dirname(sys.executable)) or name
    ended = subprocess.run([program, *arguments], capture_output=True, text=True, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def settings(root):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "setup.cfg")
    return parser


def code_folders(root):
    """Folders of the package that hold code, as dotted names, whoever forgot to list them."""
    tops = [path for path in root.iterdir() if path.is_dir() and path.name not in IGNORED | {"tests", "scripts", "docs"}]
    files = [file for top in tops if not top.name.startswith(".") and top.suffix != ".egg-info" for file in top.rglob("*.py")]
    return {".".join(("tokar", *file.parent.relative_to(root).parts)) for file in files} | {"tokar"}


def test_each_floor_imports_from_those_below_it_only(root):
    tool("lint-imports", "--no-cache", "--no-logo", "--config", "setup.cfg", cwd=root)


def test_every_folder_with_code_is_a_listed_package(root, settings):
    listed = settings["options"]["packages"].split()
    assert sorted(listed) == sorted(code_folders(root))
    assert all((root.joinpath(*name.split(".")[1:]) / "__init__.py").is_file() for name in listed)


def test_every_file_that_code_reads_is_package_data(root, settings):
    patterns = {name.strip(): globs.split() for name, globs in settings["options.package_data"].items()}
    carried = {
        file for name, globs in patterns.items() for each in globs for file in root.joinpath(*name.split(".")[1:]).glob(each)
    }
    folders = [root.joinpath(*name.split(".")[1:]) for name in code_folders(root) - {"tokar"}]
    kinds = {".yaml", ".html", ".css", ".js", ".json", ".npz", ".txt"}
    needed = {file for folder in folders for file in folder.rglob("*") if file.suffix in kinds}
    assert needed - carried == set()


def test_style(root):
    tool("ruff", "check", ".", cwd=root)
    tool("ruff", "format", "--check", ".", cwd=root)


def test_types(root, tmp_path):
    # mypy finds no package whose folder has another name: show it one
    (tmp_path / "tokar").symlink_to(root)
    cache = ["--cache-dir", str(root / ".mypy_cache"), "--config-file", str(root / "setup.cfg")]
    tool("mypy", *cache, "-p", "tokar", cwd=tmp_path, env=os.environ | {"MYPYPATH": str(tmp_path)})


def test_the_readmes_tree_is_the_tree(root):
    """The first block of the README that begins with ```text tree shows the house.

    Each line: a path (folders end in a slash), indented by two spaces below its folder, two spaces or more, what it is.
    It must name every file and folder at the top that git keeps (but dotted names), and every sub-package.
    """
    block = re.search(r"```text tree\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has no block that begins with ```text tree"
    shown, above = set(), []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        above[depth:] = [name.rstrip("/")]
        assert len(line.split()) > 1, f"{name}: say what it is"
        shown.add("/".join(above[: depth + 1]) + ("/" if name.endswith("/") else ""))
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    tops = {path.partition("/")[0] + ("/" if "/" in path else "") for path in kept.stdout.splitlines() if path[0] != "."}
    packages = {name.removeprefix("tokar.").replace(".", "/") + "/" for name in code_folders(root) - {"tokar"}}
    assert shown == tops | packages
