"""Who works on a study, and who of them is dead: by beats in the storage, judged by the reader's own clock."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import NasError
from nas.study.ledger import Ledger

BEAT_S = 10.0
# How long a worker of another machine may be silent before its trial is given to another.
SILENCE_S = 90.0

_PREFIX = "worker:"
_OPEN: set[str | None] = set()  # names of this process's workers


def host() -> str:
    """This machine, as far as process numbers reach: a container is one of its own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot[:8]}/{os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()}/{uuid.getnode():x}"


def started(pid: int) -> str | None:
    """When a process of this machine began, to tell it from a later one of its number; None if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worker's number, from 0, among so many that are at work: so that no two of them propose the same."""

    number: int = 0
    of: int = 1


class Worker:
    """This process among a study's workers: it beats while it is open and says when it leaves.

    A beat is a count, no time: readers note on their own clocks when it last changed, so clocks need not agree.

    Args:
        ledger: of the study.
        alone: whether whatever runs now has no owner, because nobody else has the journal open.
        beat_s: seconds between beats.
        silence_s: see `SILENCE_S`.
    """

    def __init__(self, ledger: Ledger, *, alone: bool, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        self.name = uuid.uuid4().hex[:8]
        self._ledger, self._beat_s, self._silence_s = ledger, beat_s, silence_s
        self._here = host()
        self._beats = 0
        self._seen: dict[str, tuple[Any, float]] = {}
        self._over = threading.Event()
        self._dead: set[str | None] = {*_names(ledger.attributes()), None} if alone else set()
        ledger.set(f"{_PREFIX}{self.name}", self._card())
        _OPEN.add(self.name)
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Stops beating and gives up whatever this worker still has."""
        _OPEN.discard(self.name)
        self._over.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(Exception):  # the storage may be lost: then the silence says it
            self._ledger.set_once(f"{_PREFIX}{self.name}", {**self._card(), "left": True})

    def dead(self, name: str | None, attributes: Mapping[str, Any]) -> bool:
        """Whether a worker's trials are nobody's.

        Args:
            name: of the worker; None for one of a study of schema 1, which had the folder to itself.
            attributes: of the study, read just now.
        """
        if name == self.name:
            return False
        card = attributes.get(f"{_PREFIX}{name}")
        if name in self._dead or card is None or card.get("left"):
            return True
        if card["host"] == self._here and started(card["pid"]) != card["started"]:
            return True
        if card["host"] == self._here and card["pid"] == os.getpid():
            return name not in _OPEN
        return not self._beats_on(name, card)

    def place(self, attributes: Mapping[str, Any]) -> Place:
        """Where this worker stands among the living, by name."""
        names = [name for name in _names(attributes) if not self.dead(name, attributes)]
        return Place(number=sum(name < self.name for name in names), of=max(len(names), 1))

    def _beats_on(self, name: str | None, card: Mapping[str, Any]) -> bool:
        now = time.monotonic()
        beat, since = self._seen.get(str(name), (None, now))
        if beat != card["beat"]:
            since = now
        self._seen[str(name)] = (card["beat"], since)
        return now - since < self._silence_s

    def _card(self) -> dict[str, Any]:
        return {"host": self._here, "pid": os.getpid(), "started": started(os.getpid()), "beat": self._beats}

    def _keep_beating(self) -> None:
        while not self._over.wait(self._beat_s):
            self._beats += 1
            with contextlib.suppress(Exception):  # whoever claims or tells waits for a lost storage and says so
                self._ledger.set_once(f"{_PREFIX}{self.name}", self._card())


def _names(attributes: Mapping[str, Any]) -> list[str]:
    """Of all workers that a study ever had."""
    return [key.removeprefix(_PREFIX) for key in attributes if key.startswith(_PREFIX)]


def refuse_other_machines(ledger: Ledger, where: str, beat_s: float = BEAT_S) -> None:
    """Refuses a second machine where the storage serves one; waits for a beat of those that have not left.

    Raises:
        NasError: a worker of another machine is at work.
    """
    here = host()

    def others() -> dict[str, Mapping[str, Any]]:
        cards = {key: card for key, card in ledger.attributes().items() if key.startswith(_PREFIX)}
        return {key: card for key, card in cards.items() if card["host"] != here and not card.get("left")}

    before = others()
    until = time.monotonic() + 1.5 * beat_s
    while before and time.monotonic() < until:
        time.sleep(beat_s / 10)
        moved = [card for key, card in others().items() if card["beat"] != before.get(key, {}).get("beat")]
        if moved:
            names = ", ".join(sorted({str(card["host"]).split("/")[0] for card in moved}))
            raise NasError(
                f"{where} is a file that serves one machine, and {names} works on it",
                hint="several machines need --storage postgresql://… or grpc://…",
            )
