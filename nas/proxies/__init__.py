"""Proxies: cheap scores of how well a candidate would learn, one file each, found by listing the folder.

A file of this folder defines

    SUMMARY: str                    one line for lists
    UNIT: str                       of the score: "dB", or what it counts
    DEFAULTS: dict[str, Any]        of ProxySettings, where its own differ
    score(candidate, bench, stop)   -> Score; raises Stopped where `stop` says so, NasError where it cannot be scored

and, where candidates share something that must be made first (once per space, teacher and settings, kept on disk),

    prepare(space, bench, on_progress) -> None

Scores are of one process and one thread, fit for a pool, and depend on the candidate and the bench alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from nas import registry
from nas.bench import Bench, Curve, ProxySettings, Stop
from nas.space import Candidate, SearchSpace

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a proxy says of one candidate; higher is better.

    Attributes:
        value: in the proxy's unit. Of proxies that train a student: fidelity to the teacher on held-out rows in dB
            (`nas.bench.Fidelity`), median of the seeds.
        value_sd: standard deviation of one seed's value; 0 with one seed.
        text: how much of the caption's effect was learnt, -20 log10(text_error) in dB; None where it says nothing.
        text_sd: standard deviation of one seed's text; 0 with one seed.
        seeds: each seed's value.
        curve: the first seed's way.
        params: parameters of the small copy.
        seconds: wall time, of what is shared by all candidates none.
    """

    value: float
    value_sd: float = 0.0
    text: float | None = None
    text_sd: float = 0.0
    seeds: tuple[float, ...] = ()
    curve: Curve = ()
    params: int = 0
    seconds: float = 0.0


class Proxy(Protocol):
    """A file of this folder."""

    SUMMARY: str
    UNIT: str
    DEFAULTS: Mapping[str, Any]

    def score(self, candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
        """The candidate's score."""
        ...


def names() -> tuple[str, ...]:
    """The proxies there are."""
    return registry.plugins("nas.proxies")


def proxy(name: str) -> Proxy:
    """The plug-in of that name.

    Raises:
        UsageError: there is none; lists what there is.
    """
    return cast(Proxy, registry.load("nas.proxies", name))


def settings_of(name: str, **given: Any) -> ProxySettings:
    """A proxy's settings: what is given, else its own defaults.

    Raises:
        UsageError: no such proxy.
    """
    return ProxySettings(proxy=name, **{**proxy(name).DEFAULTS, **given})


def prepare(space: SearchSpace, bench: Bench, on_progress: OnProgress | None = None) -> None:
    """Makes what the proxy's candidates share, unless it is there: nothing, for most."""
    make = getattr(proxy(bench.settings.proxy), "prepare", None)
    if make is not None:
        make(space, bench, on_progress)


def combined(values: Sequence[float], texts: Sequence[float], **rest: Any) -> Score:
    """The score of several seeds: medians, and the spread of one."""
    return Score(
        value=statistics.median(values),
        value_sd=_spread(values),
        text=statistics.median(texts) if texts else None,
        text_sd=_spread(texts),
        seeds=tuple(values),
        **rest,
    )


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
