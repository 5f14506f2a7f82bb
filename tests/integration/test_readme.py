"""The README's commands, run as they stand there, but with fewer steps: the demo trains the same recipes to their end.

Each is forked from a process that has the imports: a shell starts the same commands in the demo.
"""

import re
import shlex

import pytest
from shell import shell


def commands(root):
    blocks = re.findall(r"```bash\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def shortened(line):
    """The command with a training of a few steps, in the folder that the README names."""
    folder = f" name={line.rpartition('experiment=')[2]}" if line.startswith("tokar train") else ""
    return f"{line} loop.duration=20{folder}" if line.startswith(("tokar train", "tokar sweep")) else line


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(root, tmp_path, start):
    lines = [line for line in commands(root) if line.startswith("tokar ")]
    assert len(lines) >= 10
    for line in lines:
        command = start(tmp_path, *shlex.split(shortened(line))[1:])
        assert command.wait(900) == 0, f"{line}\n{command.log.read_text()}"
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "runs/digits_llamagen/samples/samples.png").exists()
    (block,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "loaded.py").write_text(f"import tokar\n{block}print(codes.shape, (again == model.decode(codes)).all())")
    assert "(3, 16) True" in shell("python loaded.py", tmp_path)
    sweep = {path.name.rpartition("optim.lr=")[2] for path in (tmp_path / "runs").glob("digits_classifier-*")}
    assert sweep == {"0.001", "0.002"}
