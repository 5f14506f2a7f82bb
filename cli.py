"""The command line: finds the command, reads its arguments, tells errors in lines. The table is in commands/."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import COMMANDS, GROUPS
from .commands.command import Command, say
from .errors import UserError, nearest, told_in_lines

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141
"""What shells report for a process ended by SIGINT and by SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tokar ARGUMENTS`; a mistake of the user is one line and exit code 2, a fault of the code a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return told_in_lines(lambda: _dispatch(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _dispatch(words: list[str]) -> int:
    code = _run(words)
    sys.stdout.flush()
    return code


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        return say(f"tokar {_version()}")
    if words[:1] == ["__complete"]:
        return _complete(words[1:])
    command, rest = find_command(words)
    if command is None:
        return say(overview(" ".join(words[:1] if words and words[0] in _first_words() else [])))
    return command.run(parse(command, rest))


def find_command(words: Sequence[str]) -> tuple[Command | None, list[str]]:
    """The command that `words` begin with, and what follows; no command when help on several is asked for.

    Raises:
        UserError: there is no such command.
    """
    for length in (2, 1):  # `sweep status`, not `sweep`
        name = " ".join(words[:length])
        for command in COMMANDS:
            if command.name == name:
                return command, list(words[length:])
    if not words or words[0] in {"-h", "--help", "help"}:
        return None, []
    if words[0] not in _first_words():
        raise UserError(f"no command {words[0]!r}", fix=nearest(words[0], _first_words()))
    if len(words) == 1 or words[1] in {"-h", "--help", "help"}:
        return None, []
    seconds = [command.name.split()[1] for command in COMMANDS if command.name.split()[0] == words[0]]
    raise UserError(f"no command {words[0]} {words[1]!r}", fix=nearest(words[1], seconds))


def _first_words() -> list[str]:
    return [command.name.split()[0] for command in COMMANDS]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, where=self.prog, fix=f"see `{self.prog} --help`")


def parse(command: Command, words: Sequence[str]) -> argparse.Namespace:
    """Read what follows a command; options may stand anywhere between overrides.

    Raises:
        UserError: an unknown option, or a missing argument.
    """
    about = f"{command.about[0].upper()}{command.about[1:]}."
    parser = _Parser(prog=f"tokar {command.name}", description=about, epilog=_epilog(command), allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for names, settings in command.arguments:
        parser.add_argument(*names, **settings)
    found, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        options = [name for names, _ in command.arguments for name in names if name.startswith("-")]
        raise UserError(f"no option {unknown[0]!r}", where=parser.prog, fix=nearest(unknown[0], [*options, "--help"]))
    found.stage = getattr(found, "stage", command.stage)
    return found


def _epilog(command: Command) -> str:
    lines = [f"example:\n  {command.example}"] if command.example else []
    if command.stage:
        lines.append(f"every key: tokar config show {command.stage} --explain")
    if command.read_on:
        lines.append(f"read on: {command.read_on}")
    return "\n\n".join(lines)


def overview(group: str = "") -> str:
    """Help on all commands, or on those that begin with one word."""
    lines = ["tokar: image tokenizers and autoregressive image generators on one spine", "",
             f"usage: tokar {group or 'COMMAND'} … [KEY=VALUE …]   (`tokar COMMAND --help` says more)"]  # fmt: skip
    for title, commands in GROUPS.items():
        shown = [command for command in commands if group in ("", command.name.split()[0])]
        lines += ["", title, *(f"  {command.name:<18} {command.about}" for command in shown)] if shown else []
    lines += ["", "KEY=VALUE changes a key of the config, GROUP=OPTION takes conf/GROUP/OPTION.yaml (Hydra's grammar).",
              "example:  tokar train classifier experiment=digits_classifier optim.lr=3e-4",
              "keys:     tokar config show tokenizer --explain", "read on:  README.md"]  # fmt: skip
    return "\n".join(lines)


def _version() -> str:
    from importlib.metadata import version

    return version("tokar")


def _complete(words: list[str]) -> int:
    from .completion import propose

    return say("\n".join(propose(words[-1] if words else "", COMMANDS)))


if __name__ == "__main__":
    sys.exit(main())
