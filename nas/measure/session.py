"""One session: subjects in interleaved groups, anchors in every group, drifting groups flagged and tried again.

A row's session is written "<when the session began>/<group>": a shared machine changes its pace within a session too,
and the anchors tell the pace of every group, so that `nas.tables.observations` can align group with group.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from nas import tables
from nas.backends import Loaded
from nas.device import DeviceSheet
from nas.errors import NasError
from nas.measure.subjects import Subject
from nas.measure.timing import Clocks, Protocol, Samples, describe, statistic_for, time_group
from nas.provenance import processor

_MOST_ANCHORS = 3
_MOST_ANCHOR_GMAC = 2.0


def pick_anchors(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Up to three subjects that every group measures again: quick ones, spread over size."""
    fitting = [s for s in subjects if s.kind != "component" and s.macs / 1e9 <= _MOST_ANCHOR_GMAC] or list(subjects)
    by_size = sorted(fitting, key=lambda s: (s.macs, s.key))
    count = min(_MOST_ANCHORS, max(1, len(by_size) // 4))
    places = [int((i + 1) * len(by_size) / (count + 1)) for i in range(count)]
    return tuple(by_size[place] for place in places) if by_size else ()


def began(label: str) -> str:
    """The session of a row's label "<session>/<group>"."""
    return label.partition("/")[0]


def chip_of(sheet: DeviceSheet) -> str:
    """What the rows of a run carry as their chip: this machine's processor, or what a device elsewhere is said to be.

    A sheet cannot be trusted on which CPU this is. Another device its backend has to ask.
    """
    return processor() if sheet.target.device == "cpu" else sheet.chip


@dataclass(kw_only=True)
class Session:
    """Measures subjects on a target under one session name.

    Attributes:
        name: of the session: when it began.
        anchors: subjects measured with every group; their fastest time so far is what drift is told from.
        best: anchor key -> its fastest group, in ms.
    """

    name: str
    sheet: DeviceSheet
    backend: ModuleType
    protocol: Protocol
    anchors: Sequence[Subject]
    seed: int
    clocks: Clocks = field(default_factory=Clocks)
    best: dict[str, float] = field(default_factory=dict)

    def measure(self, subjects: Sequence[Subject]) -> Iterator[tuple[list[tables.Measurement], str, int]]:
        """Yields, group by group, the rows to append, what was done, and how many subjects are done.

        Raises:
            NasError: a subject cannot be built, loaded or run; it is named.
        """
        self._prepare([*self.anchors, *subjects])
        anchors = {s.key: self._load(s) for s in self.anchors}
        statistic = statistic_for(self.sheet, elsewhere=any(a.device_ms is not None for a in anchors.values()))
        # The anchors alone first, so that the first group too has something to be compared with.
        self._note(self._time(anchors, 0), statistic)
        done = turn = 0
        for group in self._groups(subjects):
            loaded = {**anchors, **{s.key: self._load(s) for s in group}}
            for tries_left in reversed(range(self.protocol.retries + 1)):
                turn += 1
                samples = self._time(loaded, turn)
                slow = self._drift(samples, statistic)
                flag = f"anchors {slow:.0%} slower than their best" if slow > self.protocol.drift else ""
                last = not flag or not tries_left
                done += len(group) if last else 0
                # The anchors' rows are this group's too, whether or not they were asked for.
                rows = [
                    self._row(s, samples[s.key], loaded[s.key], f"{self.name}/{turn:02d}", flag)
                    for s in (*self.anchors, *group)
                ]
                yield rows, f"session {self.name}: {flag or 'anchors steady'}", done
                if last:
                    break

    def _groups(self, subjects: Sequence[Subject]) -> list[list[Subject]]:
        """The subjects without the anchors, in random order, cut into groups; one empty group if none is left."""
        kept = {a.key for a in self.anchors}
        rest = [s for s in subjects if s.key not in kept]
        order = np.random.default_rng(self.seed).permutation(len(rest))
        size = self.protocol.group
        return [[rest[i] for i in order[start : start + size]] for start in range(0, max(len(rest), 1), size)]

    def _prepare(self, subjects: Sequence[Subject]) -> None:
        """Lets a backend that has something to do for all subjects before the first is loaded do it (tuning)."""
        prepare = getattr(self.backend, "prepare", None)
        if prepare is not None:
            with _naming(f"preparing {len(subjects)} subjects for {self.sheet.slug}"):
                prepare((self._built(s) for s in subjects), self.sheet.target, self.sheet.options)

    def _built(self, subject: Subject) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return subject.build(self.sheet.target.batch)

    def _load(self, subject: Subject) -> Loaded:
        module, inputs = self._built(subject)
        with _naming(f"subject {subject.name} ({subject.key})"):
            loaded: Loaded = self.backend.load(module, inputs, self.sheet.target, self.sheet.options)
            output = loaded()
        ran_on = loaded.describe().get("chip", chip_of(self.sheet))
        if ran_on != chip_of(self.sheet):
            raise NasError(f"{self.sheet.slug} ran on {ran_on}, its sheet names {chip_of(self.sheet)}")
        if not np.isfinite(output).all():
            raise NasError(
                f"subject {subject.name} ({subject.key}) returns numbers that are not finite; its time means little"
            )
        return loaded

    def _time(self, loaded: Mapping[str, Loaded], turn: int) -> dict[str, Samples]:
        with _naming(f"timing {len(loaded)} subjects on {self.sheet.slug}"):
            return time_group(loaded, protocol=self.protocol, seed=self.seed + turn, clocks=self.clocks)

    def _note(self, samples: Mapping[str, Samples], statistic: str) -> None:
        for anchor in self.anchors:
            ms = samples[anchor.key].latency(statistic)
            self.best[anchor.key] = min(self.best.get(anchor.key, ms), ms)

    def _drift(self, samples: Mapping[str, Samples], statistic: str) -> float:
        """How much slower than their best the anchors were (median over anchors); 0 where they were faster."""
        self._note(samples, statistic)
        ratios = [samples[a.key].latency(statistic) / self.best[a.key] - 1 for a in self.anchors]
        return float(np.median(ratios)) if ratios else 0.0

    def _row(self, subject: Subject, samples: Samples, loaded: Loaded, label: str, flag: str) -> tables.Measurement:
        target, statistic = self.sheet.target, statistic_for(self.sheet, elsewhere=loaded.device_ms is not None)
        return tables.Measurement(
            target=self.sheet.slug,
            subject=subject.key,
            subject_kind=subject.kind,
            latency_ms=round(samples.latency(statistic), 6),
            statistic=statistic,
            samples_ms=samples.wall_ms,
            cpu_samples_ms=samples.cpu_ms,
            session=label,
            flagged=flag,
            batch=target.batch,
            device=target.device,
            chip=chip_of(self.sheet),
            resolution_px=subject.resolution_px,
            role=subject.role,
            source="measured",
            protocol=describe(self.protocol, statistic),
            environment=", ".join(f"{name} {value}" for name, value in loaded.describe().items()),
            measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Says what was being done when a backend refused or its runtime failed: a server that went away, no memory."""
    try:
        yield
    except NasError as error:
        raise NasError(f"{what}: {error.message}", hint=error.hint) from error
    except (RuntimeError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NasError(f"{what}: the runtime failed: {said}") from error
