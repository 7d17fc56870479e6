"""What a person sees: results on stdout, everything else on stderr, and never a minute without a word."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Without a terminal a line is due this often while nothing is reported, and at most this often while much is.
_HEARTBEAT_S = 30.0
_LINE_EVERY_S = 10.0


def result(text: str = "") -> None:
    """One piece of the answer, to stdout."""
    print(text)


def note(text: str) -> None:
    """Anything that is not the answer, to stderr."""
    print(text, file=sys.stderr, flush=True)


def show_log(name: str) -> None:
    """Lets a logger of ours speak to stderr: what takes minutes below the command line says how far it is."""
    logger = logging.getLogger(name)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    logger.setLevel(logging.INFO)


class _Notes(logging.Handler):
    """Log records as notes; stderr is looked up anew for each."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def result_json(data: Any) -> None:
    """The answer as one JSON object; a number that JSON cannot hold (inf, nan) becomes null."""
    print(json.dumps(_plain(data), indent=2, allow_nan=False))


def closing(*, wrote: Path | None = None, following: str | None = None, as_json: bool = False) -> None:
    """The last lines of a command: the path it wrote and the command to run next (to stderr beside JSON)."""
    say = note if as_json else result
    if wrote is not None:
        say(f"wrote {wrote}")
    if following is not None:
        say(f"next: {following}")


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1, right: Sequence[int] | None = None
) -> str:
    """Aligned columns.

    Args:
        header: one title per column.
        rows: their values, as `cell` writes them.
        left: how many columns stand to the left (names); the others (figures) stand to the right.
        right: the columns that stand to the right, where names follow figures; replaces `left`.

    Returns:
        The lines, joined; no line has trailing blanks.
    """
    to_right = set(range(left, len(header)) if right is None else right)
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            v.rjust(w) if i in to_right else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def cell(value: object) -> str:
    """One value as a person reads it: four significant digits, "-" for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def command_line(leave_out: Sequence[str] = ()) -> str:
    """The command as it was typed, quoted so that it can be pasted back, without `--debug` and `leave_out`."""
    return shlex.join(["nas", *(a for a in sys.argv[1:] if a not in ("--debug", *leave_out))])


class StoppedError(Exception):
    """Ctrl-C reached a command that can be taken up again; `command` is the one that does."""

    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Turns Ctrl-C into a clean stop that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(command) from None


class Progress:
    """Progress with the time left, on stderr.

    On a terminal one line is redrawn; elsewhere a plain line is written now and then. While nothing is reported a
    heartbeat still says what is being waited for. Call it as `progress(stage, done, total, message)`.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._began = self._said = time.monotonic()
        self._state: tuple[str, float, float, str] = ("", 0, 0, "starting")
        # The first report of the present stage: the time left is judged by what was done since, because a resumed run
        # begins in the middle.
        self._first: tuple[float, float] = (0, self._began)
        self._width = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._thread.start()
        self._say()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=2)
        if self._live and self._width:
            print(file=sys.stderr, flush=True)

    def __call__(self, stage: str, done: float, total: float, message: str = "") -> None:
        """Reports that `done` of the stage's `total` is finished; `message` says what happened or what comes now."""
        before = self._state[0]
        self._state = (stage, done, total, message)
        if stage != before:
            self._first = (done, time.monotonic())
        if self._live or stage != before or done >= total or time.monotonic() - self._said >= _LINE_EVERY_S:
            self._say()

    def step(self, message: str, done: float, total: float) -> None:
        """The same for work of one stage that names what it does first."""
        self(self.what, done, total, message)

    def line(self) -> str:
        """The line to show now."""
        stage, done, total, message = self._state
        now = time.monotonic()
        since = done - self._first[0]
        left = (
            f", {duration((now - self._first[1]) / since * (total - done))} left" if since > 0 and done < total else ""
        )
        count = f" {done:g}/{total:g}" if total > 1 else ""
        return f"{stage or self.what}{count} ({duration(now - self._began)}{left}) {message}".rstrip()

    def _say(self) -> None:
        with self._lock:
            self._said = time.monotonic()
            text = self.line()
            if self._live:
                print("\r" + text[:160].ljust(self._width), end="", file=sys.stderr, flush=True)
                self._width = min(len(text), 160)
            else:
                print(text, file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self._over.wait(1.0):
            if self._live or time.monotonic() - self._said >= _HEARTBEAT_S:
                self._say()


def _plain(data: Any) -> Any:
    """`data` with non-finite numbers as None, paths as text and numpy scalars as Python's."""
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, Path):
        return str(data)
    if hasattr(data, "item") and getattr(data, "ndim", None) == 0:
        data = data.item()
    if hasattr(data, "tolist"):
        return _plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
