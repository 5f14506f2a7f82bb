"""Tab completion: what may stand at the end of a command line, and the scripts that ask for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from .commands.command import Command

_PATHS = frozenset({"model", "target", "resume_from", "init_from", "decode_with", "judge", "features.path", "codes.tokenizer"})
"""Keys whose value is a run, a checkpoint or a model."""
_RUNS = Path("runs")


def propose(line: str, commands: Sequence[Command]) -> list[str]:
    """Words that complete `line`, whose first word is the program and whose last may be empty.

    A word that ends in `=`, `.` or `/` goes on.
    """
    *before, word = _split(line)
    words = before[1:]
    found = [item for item in commands if item.name.split() == words[: len(item.name.split())]]
    seconds = _matching(word, _next_words(words, commands))
    if not found:
        return seconds
    command = max(found, key=lambda item: len(item.name))  # `sweep status`, not `sweep`
    return sorted({*seconds, *_arguments(command, words[len(command.name.split()) :], word)})


def _split(line: str) -> list[str]:
    """Words of a line that may end within quotes; the last one is what the cursor stands at."""
    for ending in ("", "'", '"'):
        try:
            words = shlex.split(line + ending)
        except ValueError:
            continue
        return words if words and not line[-1:].isspace() else [*words, ""]
    return [*line.split(), ""]


def _matching(word: str, options: Iterable[str]) -> list[str]:
    return sorted({option for option in options if option.startswith(word)})


def _next_words(words: Sequence[str], commands: Sequence[Command]) -> Iterator[str]:
    for command in commands:
        names = command.name.split()
        if list(words) == names[: len(words)] and len(names) > len(words):
            yield names[len(words)]
    if not words:
        yield from ("--help", "--version")


def _arguments(command: Command, given: Sequence[str], word: str) -> Iterator[str]:
    if word.startswith("-"):
        yield from _matching(
            word, [name for names, _ in command.arguments for name in names if name.startswith("-")] + ["--help"]
        )
        return
    asked = [names[0] for names, _ in command.arguments if not names[0].startswith("-")]
    place = sum(not item.startswith("-") and "=" not in item for item in given)
    wanted = asked[min(place, len(asked) - 1)] if asked else ""
    stage = command.stage or (given[0] if "stage" in asked and given else "")
    if wanted in {"run", "runs", "target"}:
        yield from _matching(word, _runs())
    elif wanted == "stage":
        from .conf.compose import TRAINING
        from .conf.schema import SCHEMAS

        yield from _matching(word, TRAINING if command.name == "sweep" else SCHEMAS)
    elif wanted == "shell":
        yield from _matching(word, SCRIPTS)
    elif wanted == "overrides" and stage:
        own = [item for item in given if "=" in item and item.startswith(("sweep", "cluster"))]
        if command.name == "sweep":
            yield from _overrides("sweep", own, word)
        yield from _overrides(stage, [item for item in given if "=" in item and item not in own], word)


def _runs() -> list[str]:
    return [str(path.parent) for path in _RUNS.glob("*/config.yaml")]


def _overrides(stage: str, given: Sequence[str], word: str) -> Iterator[str]:
    """Keys of the stage as far as the next dot, options of its groups, values of its choices."""
    from .conf.compose import ROOT, groups
    from .conf.explain import keys

    try:
        known = keys(stage, given)
    except UserError:  # a mistake earlier in the line: complete as if it were not there
        known = keys(stage)
    sign = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word[len(sign) :].partition("=")
    if equals:
        options = [option for item in known if item.path == key.replace("/", ".") for option in item.options]
        if key == "experiment":
            options = [
                name for name in groups().get(key, []) if f"\nstage: {stage}\n" in (ROOT / key / f"{name}.yaml").read_text()
            ]
        yield from (f"{sign}{key}={option}" for option in _matching(value, [*options, *(_runs() if key in _PATHS else [])]))
        return
    for item in known:
        written = item.path if item.kind != "group" else item.path.replace(".", "/") if item.options else ""
        if written and written.startswith(key):
            head, dot, _ = written[len(key) :].partition(".")
            yield sign + key + head + (dot or "=")


SCRIPTS = {
    "bash": r"""_tokar() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\n'
    local word="${line##*[[:space:]]}"
    COMPREPLY=($(tokar __complete -- "$line" 2>/dev/null))
    # bash breaks words at "=" and ":" and wants only what follows the last one
    [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
    [[ ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o bashdefault -o default -F _tokar tokar
""",
    "zsh": r"""#compdef tokar
_tokar() {
    local -a found
    found=("${(@f)$(tokar __complete -- "$LBUFFER" 2>/dev/null)}")
    [[ -n $found[1] ]] || { _files; return }
    compadd -Q -S ' ' -- ${found:#*[=./]}
    compadd -Q -S '' -- ${(M)found:#*[=./]}
}
compdef _tokar tokar
""",
    "fish": r"""complete -c tokar -a '(tokar __complete -- (commandline -cp) 2>/dev/null)'
""",
}
"""What a shell must run to complete `tokar`."""
