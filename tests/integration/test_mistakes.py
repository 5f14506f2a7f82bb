"""What users do wrong, and what they are told: one line each, nothing lost, nothing half-written.

The lines are kept in docs/mistakes.md, which this test compares and, with TOKAR_REFRESH=1, writes:

    TOKAR_REFRESH=1 pytest tests/integration/test_mistakes.py && git diff docs/mistakes.md
"""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from mistakes import FIRST, MISTAKES
from spoil import TINY, words

ROWS = [mistake for mistakes in MISTAKES.values() for mistake in mistakes]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mistakes.md"
REFRESH = os.environ.get("TOKAR_REFRESH") == "1"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HEAD = f"""# What goes wrong, and what it says

Written by `TOKAR_REFRESH=1 pytest tests/integration/test_mistakes.py`, which runs every line of it. A mistake leaves what
was there as it was. Before each, these went well, with `TINY="{TINY}"`:

```text
{chr(10).join(FIRST)}
```
"""


def call(command):
    """Exit code of a command in this process; the handlers of signals that a training sets are taken back."""
    from tokar.cli import main

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        return main(words(command))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def state(folder):
    """Every file below a folder, with what changes when it is written."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Data, codes and three short runs, made once; no mistake may write into their files."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        patch.chdir(folder)
        assert [call(command) for command in FIRST] == [0] * len(FIRST)
        before = state(folder)
        yield folder
    assert state(folder) == before


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A working directory with links to all that; whoever replaces a file leaves the original alone."""
    folder = tmp_path / "work"
    shutil.copytree(base, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def answers():
    """The row of each mistake that was made."""
    return {}


def normalised(line):
    """Without what differs between machines or grows with the package."""
    line = re.sub(r"\b([0-9a-f]{12}…|[0-9a-f]{64}\b)", "…", line)
    line = re.sub(r"\d{4,} bytes, not \d{4,}", "… bytes, not …", line)
    line = re.sub(r"(evaluation/\w+)-[0-9a-f]{8}", r"\1-…", line)
    return re.sub(r"(known families|choose one of): [^;]*, [^;]*$", r"\1: …", line)


def said(printed):
    """The lines on the standard error, and those on the standard output that tell of a run or a data set."""
    told = [line for line in printed.out.splitlines() if re.match(r"(runs|datasets)/\S+: ", line)]
    return [normalised(line) for line in [*printed.err.splitlines(), *told]]


def code(text):
    """Text as code in a cell of a Markdown table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def row(mistake, lines):
    """A row of the document."""
    return f"| {mistake.happened} | {code(mistake.command)} | {mistake.code} | {'<br>'.join(map(code, lines)) or 'done'} |"


@pytest.mark.parametrize("mistake", ROWS, ids=[mistake.happened for mistake in ROWS])
def test_mistake(place, capsys, answers, mistake):
    held = mistake.spoil() if mistake.spoil else None
    before = state(place)
    capsys.readouterr()
    try:
        ended = call(mistake.command)
    finally:
        if hasattr(held, "close"):
            held.close()
    lines = said(capsys.readouterr())
    assert ended == mistake.code, lines
    told = [line for line in lines if line.startswith("tokar: ")]
    assert (len(told) > 0) == (ended == 2)
    assert all(line.startswith(("tokar: ", "warning: ", "attention: ")) for line in lines if ended == 2)
    after = state(place)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not [name for name in changed if not name.startswith(mistake.makes or ("\0",))]
    assert not [name for name in after.keys() - before.keys() if name.endswith(".tmp") or "/.step-" in name]
    answers[mistake] = row(mistake, lines)
    if not REFRESH:
        assert answers[mistake] in DOCUMENT.read_text().splitlines()


def test_the_document_is_what_was_said(answers):
    if len(answers) < len(ROWS):
        pytest.skip("needs every mistake of this file")
    written = HEAD
    for section, mistakes in MISTAKES.items():
        rows = "\n".join(answers[mistake] for mistake in mistakes)
        written += f"\n## {section}\n\n| What happened | Command | Exit | What it says |\n|---|---|---|---|\n{rows}\n"
    if REFRESH:
        DOCUMENT.write_text(written)
    assert DOCUMENT.read_text() == written
