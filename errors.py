"""The one kind of error a user can cause: a line that says what, where and what to do; exit code 2."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

EXIT_USER_ERROR = 2
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
"""A path that cannot be written; with a full disk, faults of the machine or of a path given, not of the code."""


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        what: what is wrong, one clause without a full stop.
        where: the file, key or value at fault.
        fix: what to do about it, one clause.
    """

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = what if where is None else f"{where}: {what}"
        super().__init__(f"{line}; {fix}" if fix else line)

    @property
    def lines(self) -> list[str]:
        """One line for each problem."""
        return [str(self)]


class ConfigError(UserError):
    """All the problems of one config, reported together.

    Args:
        problems: one line each, with the dotted key first.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))

    @property
    def lines(self) -> list[str]:
        """One line for each problem."""
        return self.problems


def of_system(error: OSError, where: object = None, fix: str = "") -> UserError:
    """What the operating system refused, as one line; a file where a folder is needed is named itself.

    Args:
        error: the refusal.
        where: the file or folder at fault; `None`: the one that the error names.
        fix: what to do about it; empty: chosen by the kind of refusal.
    """
    where = error.filename if where is None else where
    if error.errno in FULL_DISK:
        return UserError("the disk is full", where=where, fix=fix or "free space and run again; what is finished is kept")
    fix = fix or "choose a path that can be used"
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and isinstance(where, str | Path):
        places = (place for place in [Path(where), *Path(where).parents] if place.is_file())
        if place := next(places, None):
            return UserError("is a file, a folder is needed here", where=place, fix=fix)
    return UserError((error.strerror or str(error)).lower(), where=where, fix=fix)


def told_in_lines(action: Callable[[], int]) -> int:
    """Exit code of `action`; a mistake of the user is told on the standard error. `TOKAR_DEBUG=1` lets it through."""
    try:
        return action()
    except (UserError, OSError) as error:
        ours = isinstance(error, UserError) or error.errno in FULL_DISK | _PATH_ERRORS
        if os.environ.get("TOKAR_DEBUG") == "1" or not ours:
            raise
        for line in (error if isinstance(error, UserError) else of_system(error)).lines:
            sys.stderr.write(f"tokar: {line}\n")
        return EXIT_USER_ERROR


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the valid spelling nearest to `name`, or lists the valid ones when none is near."""
    options = sorted(set(valid))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if not options:
        return "nothing is accepted here"
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"choose one of: {shown}"
