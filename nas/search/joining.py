"""`nas worker`: a machine that joins a search which another one began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas import quality
from nas.search.planning import plan_search
from nas.search.settings import SearchSettings
from nas.study import Study, stored_settings

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a worker did: the study, how many proxy runs it told, and how many the study has."""

    study: str
    mine: int
    proxied: int
    trials: int


def join_search(name: str, *, storage: str | None = None, progress: Progress | None = None, **own: Any) -> Joined:
    """Works on a study until it has its trials.

    The study's settings are read from its storage; space files, latency tables and the teacher must be here too, and
    be the same.

    Args:
        name: of the study in the storage; without a storage, its folder on this machine.
        storage: URL of the storage.
        progress: told (stage, done, total, note).
        own: what this machine decides for itself: jobs, train_on, ray, cpus_per_proxy, gpus_per_proxy.

    Raises:
        NasError: no such study, or this machine's version, space, teacher or predictors are not the study's.
    """
    report = progress or (lambda stage, done, total, note: None)
    folder = Path(name) if storage is None else None
    settings = SearchSettings.from_json(stored_settings(storage, folder, name), storage=storage, out=folder, **own)
    plan = plan_search(settings)
    with Study(plan, folder, report, name=name, joins=True) as study:
        report("price", 0, 1, f"pricing {plan.evaluator.space.name}: each distinct block is traced once")
        plan.evaluator.pricer.prepare(lambda done, total: report("price", done, total, "blocks traced"))
        space = plan.evaluator.space
        quality.prepare(
            space, plan.teacher, plan.proxy, lambda done, total: report("teacher", done, total, "shared"), plan.device
        )
        study.run()
        facts = study.snapshot().spending
        mine = sum(fact.worker == study.worker.name and fact.outcome is not None for fact in facts)
        return Joined(study=study.where, mine=mine, proxied=study.proxied, trials=plan.trials)
