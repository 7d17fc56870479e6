"""From settings to a plan: everything that can be checked before any proxy run, and what the search would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nas import proxies, quality, registry, sampler
from nas.bench import check_device
from nas.cluster import Cluster
from nas.components import check_pipeline
from nas.device import Budget, find_target
from nas.errors import UsageError, unknown
from nas.evaluate import DeviceBudget, Evaluation, Evaluator, Shares, terms, with_pipeline
from nas.latency import load_predictor
from nas.pricing.references import check_references
from nas.scores import Scores
from nas.search.settings import SearchSettings
from nas.space import SearchSpace, load_space
from nas.study import Plan


def plan_search(settings: SearchSettings) -> Plan:
    """Everything that can be checked before any proxy run: names, budgets, limits, teacher.

    Raises:
        UsageError: an unknown name, a malformed budget, two of one device, a number out of range.
        NasError: a target has no predictor, or the teacher cannot be loaded.
    """
    _check_numbers(settings)
    space = load_space(settings.space)
    if settings.resolution_px is not None:
        space = space.at_resolution(settings.resolution_px)
    budgets = [Budget.parse(text) for text in settings.budgets]
    _check_proxy(space)
    check_pipeline(space)
    space = _piped(space, settings, budgets)
    evaluator = Evaluator(space=space, budgets=_priced(space, budgets, settings.confidence), limits=settings.limits)
    check_references(space)
    proxy = settings.proxy or quality.default_settings(space, settings.teacher)
    return Plan(
        evaluator=evaluator,
        teacher=settings.teacher,
        proxy=proxy,
        proxy_because="asked for" if settings.proxy else quality.chosen_because(proxy, space),
        trials=settings.trials,
        seed=settings.seed,
        jobs=settings.jobs,
        prune=settings.prune_confidence if settings.prune else None,
        device=check_device(settings.train_on),
        sampler=settings.sampler,
        scores=_kept(space, settings, proxy),
        storage=settings.storage,
        cluster=None
        if settings.ray is None
        else Cluster(address=settings.ray, cpus=settings.cpus_per_proxy, gpus=settings.gpus_per_proxy),
        settings=settings.to_json(),
    )


def _check_numbers(settings: SearchSettings) -> None:
    """Refuses numbers out of range and names that stand for nothing."""
    for name, low in (("trials", 0 if settings.reuse else 1), ("jobs", 1), ("seed", 0)):
        if getattr(settings, name) < low:
            raise UsageError(f"--{name} must be at least {low}, got {getattr(settings, name)}")
    if not 0.5 <= settings.prune_confidence < 1:
        raise UsageError(f"--prune-confidence must be from 0.5 to below 1, got {settings.prune_confidence:g}")
    if settings.sampler not in sampler.NAMES:
        raise unknown("sampler", settings.sampler, sampler.NAMES)
    if settings.proxy is not None:
        proxies.proxy(settings.proxy.proxy)


def _check_proxy(space: SearchSpace) -> None:
    """Refuses a family whose networks have no small copies to distil."""
    reason = getattr(registry.load("nas.families", space.family), "NO_PROXY", None)
    if reason is not None:
        raise UsageError(f"space {space.name} cannot be searched: {reason}", hint=f"nas profile --space {space.name}")


def _piped(space: SearchSpace, settings: SearchSettings, budgets: Sequence[Budget]) -> SearchSpace:
    """The space with the pipeline that was asked for.

    Raises:
        UsageError: every budget is for one denoiser call, which no pipeline changes.
    """
    names = ("steps", "guidance", "decoder", "text_encoders")
    asked = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if asked and all(budget.per_step for budget in budgets):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        whole = " and ".join(map(str, budgets))
        raise UsageError(f"{options} has no effect on {whole}, {_kinds(budgets)} for one denoiser call")
    return with_pipeline(space, **asked)


def _kinds(budgets: Sequence[Budget]) -> str:
    return "a budget" if len(budgets) == 1 else "budgets"


def _priced(space: SearchSpace, budgets: Sequence[Budget], confidence: float) -> tuple[DeviceBudget, ...]:
    """Each budget with its device and what predicts there.

    Raises:
        UsageError: there is none, an unknown device, or two budgets of one device.
        NasError: a device has no predictor, or nothing is known of a component's latency there.
    """
    if not budgets:
        raise UsageError("a search needs at least one budget", hint="--budget 1.4s@iphone")
    taken: dict[str, Budget] = {}
    found = []
    for budget in budgets:
        sheet = find_target(budget.device)
        if sheet.slug in taken:
            raise UsageError(
                f"{taken[sheet.slug]} and {budget} are budgets of one device, {sheet.slug}",
                hint="give one budget per device; the smaller one decides",
            )
        taken[sheet.slug] = budget
        predictor = load_predictor(sheet.slug)
        found.append(
            DeviceBudget(sheet=sheet, predictor=predictor, terms=terms(space, sheet, budget, confidence, predictor))
        )
    return tuple(found)


def _kept(space: SearchSpace, settings: SearchSettings, proxy: quality.ProxySettings) -> Scores | None:
    """The kept scores of these settings; None where none are to be taken or kept.

    Raises:
        UsageError: no proxy run was asked for, and nothing is kept.
    """
    if not settings.reuse:
        return None
    scores = Scores(space, settings.teacher, proxy)
    if settings.trials == 0 and not scores.all():
        raise UsageError(
            f"--trials 0 re-prices kept scores, and none are kept of {space.name} with these proxy settings",
            hint="--trials 60",
        )
    return scores


def preview(plan: Plan) -> dict[str, Any]:
    """What a search would do, for `--dry-run`: the budgets' parts, what each constraint rejects, what is reused."""
    evaluator = plan.evaluator
    evaluator.check_reachable()
    shares, references = evaluator.shares(), references_of(evaluator)
    return {
        "space": evaluator.space.name,
        "space_size": evaluator.space.count or evaluator.space.size,
        "target": evaluator.sheet.slug,
        **constraints_record(evaluator, shares),
        "pipeline": pipeline_record(evaluator),
        "feasible_share": shares.feasible,
        "references": [asdict(e) for e in references],
        "warnings": list(evaluator.warnings(references)),
        "trials": plan.trials,
        "sampler": plan.sampler,
        "reuse": _reusable(plan),
        "proxy": {"proxy": plan.proxy.proxy, "because": plan.proxy_because},
        "fidelity": quality.fidelity(plan.proxy, plan.teacher, evaluator.space.name),
        "teacher": plan.teacher,
    }


def _reusable(plan: Plan) -> dict[str, int] | None:
    """How many kept scores there are, and how many of their candidates are within every constraint."""
    if plan.scores is None:
        return None
    candidates = [plan.evaluator.space.from_row(each.row) for each in plan.scores.all().values()]
    feasible = sum(each.feasible for each in plan.evaluator.price(candidates))
    return {"available": len(candidates), "feasible": feasible}


def constraints_record(evaluator: Evaluator, shares: Shares) -> dict[str, Any]:
    """Budgets and limits, and the share of the space that each rejects: by itself, and as the only one that does."""
    budgets = [_budget(each) for each in evaluator.budgets]
    return {
        "budget": budgets[0],
        "budgets": budgets,
        "limits": asdict(evaluator.limits),
        "rejected": {each.constraint: each.share for each in shares.rejected},
        "rejected_alone": {each.constraint: each.alone for each in shares.rejected},
    }


def _budget(budget: DeviceBudget) -> dict[str, Any]:
    found = budget.terms
    return {
        "text": budget.name,
        "ms": found.budget.ms,
        "device": budget.sheet.slug,
        "alias": budget.sheet.alias,
        "per_step": found.budget.per_step,
        "confidence": found.confidence,
        "step_budget_ms": found.step_budget_ms,
        "fixed_ms": found.fixed_ms,
    }


def pipeline_record(evaluator: Evaluator) -> dict[str, Any]:
    """What an image is charged with beside the denoiser, on the first budget's device."""
    pipeline = evaluator.space.pipeline
    return {
        "steps": pipeline.steps if pipeline else 1,
        "guidance": pipeline.guidance if pipeline else False,
        "calls": evaluator.terms.calls,
        "parts": [asdict(part) for part in evaluator.terms.parts],
        "fixed_ms": evaluator.terms.fixed_ms,
        "fixed_low_ms": evaluator.terms.fixed_low_ms,
        "fixed_high_ms": evaluator.terms.fixed_high_ms,
        "text_encoders": list(pipeline.text_encoders) if pipeline else [],
        "decoder": pipeline.decoder if pipeline else None,
        "source": pipeline.source if pipeline else "",
    }


def references_of(evaluator: Evaluator) -> list[Evaluation]:
    """The published networks that a search begins with, priced."""
    space = evaluator.space
    return [evaluator.price([space.reference(r.name)], f"reference:{r.name}")[0] for r in space.starting]
