"""Plan: everything that decides a study's trials, and what of it may change while the study goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import nas
from nas import quality
from nas.bench import ProxySettings
from nas.errors import NasError
from nas.evaluate import Evaluator

SCHEMA = 2

# Why a study cannot go on when one of these has changed. Whatever else differs is re-priced.
_WHY = {
    "schema": "this version cannot read what the other one wrote",
    "space": "its trials are rows of that space",
    "space_hash": "the same choices may stand for another network",
    "teacher": "scores against different teachers cannot be compared",
    "proxy": "scores of different proxies cannot be compared",
    "seed": "its proposals follow from the seed",
    "sampler": "its proposals follow from the sampler",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a study's trials.

    Attributes:
        evaluator: prices candidates against the budgets.
        teacher: as for `nas.teachers.load_teacher`.
        proxy: what scores a candidate.
        trials: how many candidates a proxy run is spent on.
        seed: of the proposals.
        jobs: proxy runs side by side.
        prune: the confidence of stopping a run early, None for never.
        device: where candidates are trained; like `jobs` it decides the speed alone.
        proxy_because: how the proxy came to be chosen, for the reader.
        sampler: one of `nas.sampler.NAMES`.
        scores: proxy scores kept across studies (`nas.scores.Scores`), or None to neither read nor keep any.
        storage: the URL of an Optuna storage, or None for the journal in the study's folder.
        cluster: where proxies run instead of in processes of this machine, or None (`nas.cluster.Cluster`).
        settings: plain data from which another machine can make this plan again, for `nas worker`.
    """

    evaluator: Evaluator
    teacher: str
    proxy: quality.ProxySettings
    trials: int
    seed: int
    jobs: int
    prune: float | None = None
    device: str = "cpu"
    proxy_because: str = "asked for"
    sampler: str = "front"
    scores: Any = None
    storage: str | None = None
    cluster: Any = None
    settings: Mapping[str, Any] | None = None

    def fixed(self) -> dict[str, Any]:
        """What must be equal for a study to go on, as plain data."""
        return _plain(
            {
                "space": self.evaluator.space.name,
                "space_hash": self.evaluator.space.hash,
                "teacher": quality.teacher_hash(self.teacher),
                "proxy": quality.identity(self.proxy, self.evaluator.space, self.teacher),
                "seed": self.seed,
                "sampler": self.sampler,
            }
        )

    def terms(self) -> dict[str, Any]:
        """What may change while a study goes on, because scores do not depend on it; equal for all workers at a time.

        `version` is the package's: two of them may price or propose differently.
        """
        mine = {"prune": self.prune, "trials": self.trials, "version": nas.__version__}
        return _plain({**self.evaluator.identity(), **mine})

    def identity(self) -> dict[str, Any]:
        """Which search this is: all of it but how long it goes on and by which version."""
        return {k: v for k, v in {**self.fixed(), **self.terms()}.items() if k not in ("trials", "version")}


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples become lists."""
    return dict(json.loads(json.dumps(found)))


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Names whose values differ; one that `was` does not have is not known and counts as equal."""
    return tuple(name for name, value in now.items() if name in was and not _same(name, was[name], value))


def _same(name: str, was: Any, now: Any) -> bool:
    """Equal; a proxy's setting that an older version did not write down had what is the default now."""
    if name == "proxy" and isinstance(was, Mapping) and isinstance(now, Mapping):
        defaults = {f.name: f.default for f in fields(ProxySettings) if f.default is not MISSING}
        return _plain({**defaults, **was}) == _plain({**defaults, **now})
    return bool(was == now)


def refuse_others(was: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses a study whose scores or trials cannot be joined with those of the plan.

    Args:
        was: the study's `Plan.fixed`.
        now: the plan's.
        where: the study, in words.

    Raises:
        NasError: names each difference, with its reason.
    """
    differ = differences(was, now)
    if differ:
        listed = "; ".join(f"{name} was {was[name]!r}, is now {now[name]!r} ({_WHY[name]})" for name in differ)
        raise NasError(
            f"the study in {where} was made with other settings: {listed}",
            hint="choose another --out; studies of these different settings cannot be joined",
        )


def changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs of two `Plan.terms`, in words."""
    return tuple(f"{name} was {was[name]!r}, is now {now[name]!r}" for name in differences(was, now))


def refuse_worker(was: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses a worker whose files are not those of the study: its proposals would follow other prices.

    Args:
        was: the study's `Plan.fixed` and `Plan.terms`.
        now: the worker's.
        where: the study, in words.

    Raises:
        NasError: names each difference.
    """
    differ = differences(was, now)
    if differ:
        listed = "; ".join(f"{name} is {was[name]!r} there and {now[name]!r} here" for name in differ)
        raise NasError(
            f"this machine cannot work on {where}: {listed}",
            hint="give it the same version of nas, the same space file and the same latency tables as the search has",
        )
