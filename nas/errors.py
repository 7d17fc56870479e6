"""The errors a person may cause, each one sentence and, where there is one, the next command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasError(Exception):
    """Something `nas` cannot do, said in one sentence.

    Args:
        message: which thing, which field, what was got, what is allowed, which file.
        hint: the next command or change that helps, if there is one.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(NasError):
    """The command line, or a file the user wrote, asks for something that does not exist."""

    exit_code = 2


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None when none is close enough to be worth offering."""
    matches = difflib.get_close_matches(name.lower(), {o.lower(): o for o in options}, n=1, cutoff=0.5)
    by_lower = {o.lower(): o for o in options}
    return by_lower[matches[0]] if matches else None


def unknown(kind: str, name: object, options: Iterable[str], *, where: str = "", hint: str | None = None) -> UsageError:
    """The error for a name that is not known: it names the nearest and lists what is allowed."""
    allowed = sorted(str(o) for o in options)
    close = nearest(str(name), allowed)
    guess = f"; did you mean {close!r}?" if close else ";"
    place = f" in {where}" if where else ""
    return UsageError(f"unknown {kind} {str(name)!r}{place}{guess} known: {', '.join(allowed) or 'none'}", hint=hint)
