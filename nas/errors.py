"""The errors a person may cause, each one sentence and, where there is one, the next command."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Final, Self

DIVERGED: Final = "training diverged"
OUT_OF_MEMORY: Final = "out of memory"


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

    def restated(self, message: str, hint: str | None) -> Self:
        """The same error in other words."""
        again = copy.copy(self)
        again.args, again.message, again.hint = (message,), message, hint
        return again


class UsageError(NasError):
    """The command line, or a file the user wrote, asks for something that does not exist."""

    exit_code = 2


class UntrainableError(NasError):
    """A network that cannot be trained as asked, by no mistake in what was asked for.

    Args:
        message: as of any error.
        cause: DIVERGED or OUT_OF_MEMORY.
        hint: as of any error.
    """

    def __init__(self, message: str, cause: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.cause = cause

    def __reduce__(self) -> tuple[type[UntrainableError], tuple[str, str, str | None]]:
        """Workers hand it to their parent."""
        return type(self), (self.message, self.cause, self.hint)


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
