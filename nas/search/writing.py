"""What a search writes at its end: study.json and the tables beside it, from the study alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from nas import proxies, quality
from nas.evaluate import Evaluation, Evaluator, Shares
from nas.importance import importances
from nas.provenance import provenance
from nas.record import REUSED, SCHEMA, Trial, blocks_frame, edges, front, hypervolumes, recommend, trials_frame, write
from nas.search.planning import constraints_record, pipeline_record, references_of
from nas.search.settings import SearchResult, SearchSettings
from nas.study import Plan, Study

_PRICED = 500  # candidates whose latencies say which choices decide them


def write_record(study: Study, settings: SearchSettings, shares: Shares) -> SearchResult:
    """Writes the study's files.

    Args:
        study: open.
        settings: that it was asked for with.
        shares: how much of the space its constraints leave.
    """
    plan, evaluator, trials, folder = study.plan, study.plan.evaluator, study.trials(), _folder(study)
    members = front(trials)
    recommended, chosen = _recommended(evaluator, members, study.unit)
    frame = trials_frame(trials, evaluator.space)
    record = {
        "schema": SCHEMA,
        "name": folder.name,
        **_space(evaluator, settings),
        "target": evaluator.sheet.slug,
        "target_alias": evaluator.sheet.alias,
        **constraints_record(evaluator, shares),
        "pipeline": pipeline_record(evaluator),
        "trials": _counts(trials, study.forbidden),
        "infeasible": {
            "share_of_space": 1.0 - shares.feasible,
            "sampled": shares.sampled,
            "reasons": reasons(trials, evaluator),
        },
        "stopping": stopping(plan, trials),
        "reuse": None if plan.scores is None else study.attr("reused"),
        "changed": list(study.changes),
        "wall_s": round(float(study.attr("wall_s") or 0.0), 1),
        "seed": plan.seed,
        "jobs": plan.jobs,
        "sampler": plan.sampler,
        "storage": study.where,
        "command": settings.command,
        "teacher": plan.teacher,
        "provenance": provenance(seed=plan.seed, identity=plan.identity()),
        "proxy": _proxy(plan, study.unit),
        "predictor": evaluator.predictor.card,
        "warnings": list(evaluator.warnings(members)),
        "references": _reference_rows(evaluator, trials),
        "hypervolume": hypervolumes(trials, evaluator.terms.budget.ms, study.unit),
        "importance": _importance(frame, evaluator),
        "edges": edges(chosen, evaluator.space),
        "recommended": recommended,
        "fidelity": quality.fidelity(plan.proxy, plan.teacher, evaluator.space.name),
        "sources": [*evaluator.space.sources, *(s for budget in evaluator.budgets for s in budget.sheet.sources)],
        "finished": study.proxied >= plan.trials,
        "next": f"nas train {_typed(folder)}#{recommended['key']}" if recommended else "nas search --help",
    }
    on_front = (frame["state"] == "proxied") & frame["key"].isin([m.key for m in members])
    tables = {
        "trials.csv": frame,
        "front.csv": frame[on_front].sort_values("latency_ms"),
        "blocks.csv": blocks_frame(members, evaluator),
    }
    write(folder, record, tables)
    return SearchResult(folder=folder, record=record, front=members)


def _folder(study: Study) -> Path:
    assert study.folder is not None  # a search has one; only workers that join it have none
    return study.folder


def _recommended(
    evaluator: Evaluator, members: Sequence[Evaluation], unit: str
) -> tuple[dict[str, str] | None, Evaluation | None]:
    """The recommended member's key with why, its latency as the sum that it is, and the member."""
    found = recommend(members, unit)
    if found is None:
        return None, None
    chosen = next(member for member in members if member.key == found["key"])
    whole = f"{chosen.latency_ms:.0f} ms = {evaluator.terms.words(chosen.step_ms)}"
    return found | {"why": f"{found['why']}; {whole}"}, chosen


def _space(evaluator: Evaluator, settings: SearchSettings) -> dict[str, Any]:
    space = evaluator.space
    return {
        "space": space.name,
        "space_path": str(space.path) if settings.space.endswith(".toml") else None,
        "space_hash": space.hash,
        "space_summary": space.summary,
        "space_size": space.count or space.size,
        "resolution_px": space.resolution_px,
    }


def _proxy(plan: Plan, unit: str) -> dict[str, Any]:
    return {
        **asdict(plan.proxy),
        "unit": unit,
        "summary": proxies.proxy(plan.proxy.proxy).SUMMARY,
        "because": plan.proxy_because,
        "cannot_see": list(quality.cannot_see(plan.proxy)),
    }


def _counts(trials: Sequence[Trial], forbidden: int) -> dict[str, int]:
    """How many proposals ended in which way; `reused` ones were nobody's proposal."""
    own = [trial for trial in trials if trial.evaluation.source != REUSED]
    names = {"proxied": "proxied", "stopped": "stopped", "infeasible": "infeasible"}
    names |= {"duplicate": "duplicates", "failed": "failed"}
    counts = {name: sum(trial.state == state for trial in own) for state, name in names.items()}
    return {"asked": len(own) + forbidden, **counts, "forbidden": forbidden, "reused": len(trials) - len(own)}


def reasons(trials: Sequence[Trial], evaluator: Evaluator) -> dict[str, int]:
    """What kept candidates from a score, and how often; one that breaks several constraints counts for each."""
    found = {each.cause: 0 for each in evaluator.constraints[:1]}
    causes = {each.name: each.cause for each in evaluator.constraints}
    for trial in (trial for trial in trials if trial.state == "infeasible"):
        for cause in [trial.cause] if trial.cause else [causes[name] for name in trial.evaluation.violated]:
            found[cause] = found.get(cause, 0) + 1
    failed = sum(trial.state == "failed" for trial in trials)
    return {**found, **({"proxy run failed": failed} if failed else {})}


def stopping(plan: Plan, trials: Sequence[Trial]) -> dict[str, Any]:
    """How many runs were stopped early, and what that saved."""
    stopped = [trial for trial in trials if trial.state == "stopped"]
    return {
        "confidence": plan.prune,
        "stopped": len(stopped),
        "spent_s": round(sum(float(trial.evaluation.seconds or 0.0) for trial in stopped), 1),
        "saved_s": round(sum(trial.saved_s for trial in stopped), 1),
        "basis": "estimate: a stopped run's seconds over its share of the steps, less those seconds",
    }


def _importance(frame: pd.DataFrame, evaluator: Evaluator) -> dict[str, Any]:
    """Which choices decide quality among the scored candidates, and latency in the whole space."""
    rows = evaluator.space.sample(_PRICED, 0)
    return importances(frame, evaluator.space, priced=(rows, evaluator.features(rows)[0]))


def _typed(folder: Path) -> str:
    """What a person types for a study: its name where it lies under reports/, else its path."""
    return folder.name if folder.parent == Path("reports") else str(folder)


def _reference_rows(evaluator: Evaluator, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each reference as the study found it, with what was published about it."""
    rows = []
    for reference, priced in zip(evaluator.space.starting, references_of(evaluator), strict=True):
        tried = next((t.evaluation for t in trials if t.evaluation.key == priced.key and t.state == "proxied"), priced)
        step_ms = (reference.step_ms or {}).get(evaluator.sheet.slug)
        rows.append(
            {
                **asdict(tried),
                "name": reference.name,
                "title": reference.title,
                "published_step_ms": step_ms,
                "published_ms": None if step_ms is None else evaluator.terms.total_ms(step_ms),
                "published_params": reference.params,
                "published_source": reference.source,
            }
        )
    return rows
