"""The only timing loop: warm-up until stable, repeats interleaved over subjects, wall and CPU time of every sample."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nas.backends import Loaded
from nas.device import DeviceSheet

STATISTICS = ("min_cpu", "min_wall", "median_wall")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How subjects are timed.

    Attributes:
        repeats: rounds over all subjects of a group; every subject is timed at least this often.
        stable_within: warm-up ends when two calls running are within this share of the fastest call so far.
        most_warm_up: calls after which the warm-up ends in any case.
        least_sample_ms: a sample averages as many calls as this takes, so that clocks and cache misses at its start
            do not decide the time of a block of some microseconds.
        round_ms: a subject faster than this is sampled several times a round (at most `most_per_round`).
        most_per_round: see `round_ms`.
        drift: a group whose anchors are slower than their best by more than this share is flagged.
        retries: how often a flagged group is measured again in the same session.
        group: subjects loaded together (memory) and interleaved with each other and the anchors.
        separation_s: least time between two sessions of one subject.
    """

    repeats: int = 7
    stable_within: float = 0.05
    most_warm_up: int = 8
    least_sample_ms: float = 4.0
    round_ms: float = 60.0
    most_per_round: int = 3
    drift: float = 0.10
    retries: int = 1
    group: int = 8
    separation_s: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """Where time comes from: seconds of wall clock and of CPU time used by this process (all threads)."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time


@dataclass(frozen=True, kw_only=True)
class Samples:
    """All samples of one subject in ms per call, in the order they were taken.

    Attributes:
        wall_ms: by the clock of the machine that ran it.
        cpu_ms: by the CPU time of this process; empty where another machine ran it.
    """

    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()

    def __add__(self, other: Samples) -> Samples:
        return Samples(wall_ms=self.wall_ms + other.wall_ms, cpu_ms=self.cpu_ms + other.cpu_ms)

    def latency(self, statistic: str) -> float:
        """The one number, in ms, that stands for these samples.

        Args:
            statistic: one of `STATISTICS`.
        """
        if statistic == "min_cpu":
            return min(self.cpu_ms)
        if statistic == "min_wall":
            return min(self.wall_ms)
        return statistics.median(self.wall_ms)

    @property
    def contention(self) -> float:
        """Median of wall over CPU time: 1 on a quiet machine with one thread, more when others run on the core."""
        if not self.cpu_ms:
            return 1.0
        return statistics.median(w / c if c > 0 else 1.0 for w, c in zip(self.wall_ms, self.cpu_ms, strict=True))


def statistic_for(sheet: DeviceSheet, *, elsewhere: bool = False) -> str:
    """The statistic that a device's rows use; `elsewhere`: it runs on another machine, whose CPU time is not known.

    A dedicated device is described by its median. On a shared CPU others only ever add time, so the minimum is
    nearest to the truth: of CPU time where one thread computes (then CPU time is busy time, and waiting for a core
    does not count), of wall time where several threads share the work.
    """
    if not sheet.shared:
        return "median_wall"
    return "min_cpu" if sheet.target.threads == 1 and not elsewhere else "min_wall"


def describe(protocol: Protocol, statistic: str) -> str:
    """The protocol in a few words, as kept with each row."""
    return (
        f"{statistic} of >= {protocol.repeats} interleaved repeats after a stable warm-up;"
        f" anchors within {protocol.drift:.0%}"
    )


def time_group(
    runs: Mapping[str, Loaded | Callable[[], object]], *, protocol: Protocol, seed: int, clocks: Clocks
) -> dict[str, Samples]:
    """Times a group of subjects, interleaved: each round goes over all of them in a new random order.

    `runs` maps a subject's key to its call.

    Returns:
        Samples of every subject; warm-up calls are not among them.
    """
    generator = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        typical = {key: _warm_up(run, protocol, clocks) for key, run in runs.items()}
        samples = {key: Samples() for key in runs}
        order = list(runs)
        for _ in range(protocol.repeats):
            generator.shuffle(order)
            for key in order:
                for _ in range(_per_round(typical[key], protocol)):
                    samples[key] += _sample(runs[key], _calls(typical[key], protocol), clocks)
    finally:
        if collecting:
            gc.enable()
    return samples


def _warm_up(run: Loaded | Callable[[], object], protocol: Protocol, clocks: Clocks) -> float:
    """Runs until two calls in a row are near the fastest; returns the fastest call's busy time in ms."""
    best, steady = sys.float_info.max, 0
    for _ in range(protocol.most_warm_up):
        found = _sample(run, 1, clocks)
        took = (found.cpu_ms or found.wall_ms)[0]
        near = abs(took - best) <= protocol.stable_within * min(took, best)
        steady, best = steady + 1 if near else 0, min(best, took)
        if steady == 2:
            break
    return best


def _calls(typical_ms: float, protocol: Protocol) -> int:
    return max(1, math.ceil(protocol.least_sample_ms / max(typical_ms, 1e-3)))


def _per_round(typical_ms: float, protocol: Protocol) -> int:
    once = max(typical_ms, protocol.least_sample_ms)
    return max(1, min(protocol.most_per_round, int(protocol.round_ms / once)))


def _sample(run: Loaded | Callable[[], object], calls: int, clocks: Clocks) -> Samples:
    if isinstance(run, Loaded) and run.device_ms is not None:
        return Samples(wall_ms=(run.device_ms(calls),))
    wall, cpu = clocks.wall(), clocks.cpu()
    for _ in range(calls):
        run()
    cpu, wall = clocks.cpu() - cpu, clocks.wall() - wall
    return Samples(wall_ms=(wall * 1e3 / calls,), cpu_ms=(cpu * 1e3 / calls,))
