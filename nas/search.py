"""`nas search`: from a space and a budget to a folder with a Pareto front."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas import proxies, quality, registry
from nas.bench import check_device
from nas.components import check_pipeline
from nas.device import Budget, find_target
from nas.errors import UsageError
from nas.evaluate import Evaluation, Evaluator, terms, with_pipeline
from nas.latency import load_predictor
from nas.paths import writable_dir
from nas.pricing.references import check_references
from nas.provenance import provenance
from nas.record import SCHEMA, Trial, blocks_frame, edges, front, hypervolumes, recommend, trials_frame, write
from nas.space import SearchSpace, load_space
from nas.study import Plan, Study

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a person asks for; None takes the default."""

    space: str
    budget: str
    trials: int = 24
    seed: int = 0
    jobs: int = 2
    confidence: float = 0.8
    resolution_px: int | None = None
    steps: int | None = None
    guidance: bool | None = None
    decoder: str | None = None
    text_encoders: tuple[str, ...] | None = None
    teacher: str = "embedded"
    out: Path | None = None
    fresh: bool = False
    command: str = "nas search"
    proxy: quality.ProxySettings | None = None
    prune: bool = True
    prune_confidence: float = 0.95
    train_on: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A finished search: its folder, the study record as written to study.json, and the front."""

    folder: Path
    record: dict[str, Any]
    front: list[Evaluation]

    def to_json(self) -> dict[str, Any]:
        """What `nas search --json` prints."""
        record = self.record
        return {
            "study": self.folder.name,
            "space": record["space"],
            "budget": {key: record["budget"][key] for key in ("text", "ms", "device", "confidence")},
            "trials": record["trials"]["proxied"],
            "infeasible": record["trials"]["infeasible"],
            "stopped": record["stopping"]["stopped"],
            "saved_s": record["stopping"]["saved_s"],
            "proxy": {"name": record["proxy"]["proxy"], "unit": record["proxy"]["unit"]},
            "wall_s": record["wall_s"],
            "report": str(self.folder / "index.html"),
            "recommended": record["recommended"],
            "front": [asdict(member) for member in self.front],
        }


def plan_search(settings: SearchSettings) -> Plan:
    """Everything that can be checked before any proxy run: names, budget, reachability, teacher.

    Raises:
        UsageError: an unknown name, a malformed or unreachable budget, a number out of range.
        NasError: the target has no predictor, or the teacher cannot be loaded.
    """
    for name, low in (("trials", 1), ("jobs", 1), ("seed", 0)):
        if getattr(settings, name) < low:
            raise UsageError(f"--{name} must be at least {low}, got {getattr(settings, name)}")
    if not 0.5 <= settings.prune_confidence < 1:
        raise UsageError(f"--prune-confidence must be from 0.5 to below 1, got {settings.prune_confidence:g}")
    if settings.proxy is not None:
        proxies.proxy(settings.proxy.proxy)
    space = load_space(settings.space)
    if settings.resolution_px is not None:
        space = space.at_resolution(settings.resolution_px)
    budget = Budget.parse(settings.budget)
    _check_proxy(space)
    check_pipeline(space)
    space = _piped(space, settings, budget)
    sheet = find_target(budget.device)
    predictor = load_predictor(sheet.slug)
    evaluator = Evaluator(
        space=space,
        sheet=sheet,
        predictor=predictor,
        terms=terms(space, sheet, budget, settings.confidence, predictor),
    )
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
    )


def _check_proxy(space: SearchSpace) -> None:
    """Refuses a family whose networks have no small copies to distil."""
    reason = getattr(registry.load("nas.families", space.family), "NO_PROXY", None)
    if reason is not None:
        raise UsageError(f"space {space.name} cannot be searched: {reason}", hint=f"nas profile --space {space.name}")


def _piped(space: SearchSpace, settings: SearchSettings, budget: Budget) -> SearchSpace:
    """The space with the pipeline that was asked for.

    Raises:
        UsageError: the budget is for one denoiser call, which no pipeline changes.
    """
    names = ("steps", "guidance", "decoder", "text_encoders")
    asked = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if asked and budget.per_step:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise UsageError(f"{options} has no effect on {budget}, a budget for one denoiser call")
    return with_pipeline(space, **asked)


def preview(plan: Plan) -> dict[str, Any]:
    """What a search would do, for `--dry-run` and for the record: the budget's parts and how much of the space fits."""
    evaluator = plan.evaluator
    evaluator.check_reachable()
    share = evaluator.feasible_share()
    return {
        "space": evaluator.space.name,
        "space_size": evaluator.space.count or evaluator.space.size,
        "target": evaluator.sheet.slug,
        "budget": _budget(evaluator),
        "pipeline": _pipeline(evaluator),
        "feasible_share": share,
        "references": [asdict(e) for e in _references(evaluator)],
        "warnings": list(evaluator.warnings(_references(evaluator))),
        "trials": plan.trials,
        "proxy": {"proxy": plan.proxy.proxy, "because": plan.proxy_because},
        "fidelity": quality.fidelity(plan.proxy, plan.teacher, evaluator.space.name),
        "teacher": plan.teacher,
    }


def run_search(settings: SearchSettings, progress: Progress | None = None) -> SearchResult:
    """Runs, or resumes, a search and writes its study files.

    Raises:
        NasError, UsageError: see `plan_search` and `nas.study.Study`; nothing that was done is lost.
    """
    report = progress or (lambda stage, done, total, note: None)
    plan = plan_search(settings)
    writable_dir(settings.out if settings.out is not None else Path("reports"))
    report("price", 0, 1, f"pricing {plan.evaluator.space.name}: each distinct block is traced once")
    plan.evaluator.pricer.prepare(lambda done, total: report("price", done, total, "blocks traced"))
    plan.evaluator.check_reachable()
    quality.prepare(
        plan.evaluator.space,
        plan.teacher,
        plan.proxy,
        lambda done, total: report("teacher", done, total, "what all candidates share"),
        plan.device,
    )
    folder = study_folder(settings, plan)
    with Study(plan, folder, report) as study:
        if study.attr("feasible_share") is None:
            study.attr("feasible_share", plan.evaluator.feasible_share())
        study.run()
        return write_record(study, settings)


def study_folder(settings: SearchSettings, plan: Plan) -> Path:
    """`--out`, or the folder of the same search if there is one to resume, or a new one under reports/."""
    if settings.out is not None:
        return _claim(writable_dir(settings.out), plan, settings.fresh)
    space, alias = plan.evaluator.space, plan.evaluator.sheet.alias
    name = f"{space.name}-{alias}"
    root = writable_dir(Path("reports"))
    if not settings.fresh:
        for folder in sorted(root.glob(f"*-{name}*"), reverse=True):
            if (folder / "journal.log").is_file() and _identity(folder) == json.loads(json.dumps(plan.identity())):
                return folder
    today = datetime.date.today().isoformat()
    number = 1
    while (folder := root / (f"{today}-{name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return _claim(writable_dir(folder), plan, settings.fresh)


def _claim(folder: Path, plan: Plan, fresh: bool) -> Path:
    """Writes who the folder belongs to; `--fresh` drops an earlier journal first."""
    if fresh:
        for name in ("journal.log", "identity.json"):
            (folder / name).unlink(missing_ok=True)
    if not (folder / "identity.json").is_file():
        (folder / "identity.json").write_text(json.dumps(plan.identity(), indent=1) + "\n")
    return folder


def _identity(folder: Path) -> Any:
    try:
        return json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError):
        return None


def write_record(study: Study, settings: SearchSettings) -> SearchResult:
    """The study's files, from its journal alone."""
    plan, evaluator, trials = study.plan, study.plan.evaluator, study.trials()
    unit = study.unit
    members = front(trials)
    recommended = recommend(members, unit)
    chosen = next((m for m in members if recommended and m.key == recommended["key"]), None)
    if recommended and chosen:
        recommended = recommended | {"why": f"{recommended['why']}; {_sum(evaluator, chosen)}"}
    asked = len(study.study.get_trials(deepcopy=False))
    states = ("proxied", "stopped", "infeasible", "duplicate", "failed")
    counts = {state: sum(t.state == state for t in trials) for state in states}
    record = {
        "schema": SCHEMA,
        "name": study.folder.name,
        "space": evaluator.space.name,
        "space_path": str(evaluator.space.path) if settings.space.endswith(".toml") else None,
        "space_hash": evaluator.space.hash,
        "space_summary": evaluator.space.summary,
        "space_size": evaluator.space.count or evaluator.space.size,
        "resolution_px": evaluator.space.resolution_px,
        "target": evaluator.sheet.slug,
        "target_alias": evaluator.sheet.alias,
        "budget": _budget(evaluator),
        "pipeline": _pipeline(evaluator),
        "trials": {"asked": asked, **_plural(counts), "forbidden": asked - len(trials)},
        "infeasible": {
            "share_of_space": 1.0 - float(study.attr("feasible_share")),
            "sampled": 20_000,
            "reasons": _reasons(trials),
        },
        "stopping": _stopping(plan, trials),
        "wall_s": round(float(study.attr("wall_s") or 0.0), 1),
        "seed": plan.seed,
        "jobs": plan.jobs,
        "command": settings.command,
        "teacher": plan.teacher,
        "provenance": provenance(seed=plan.seed, identity=plan.identity()),
        "proxy": {
            **asdict(plan.proxy),
            "unit": unit,
            "summary": proxies.proxy(plan.proxy.proxy).SUMMARY,
            "because": plan.proxy_because,
            "cannot_see": list(quality.cannot_see(plan.proxy)),
        },
        "predictor": evaluator.predictor.card,
        "warnings": list(evaluator.warnings(members)),
        "references": _reference_rows(evaluator, trials),
        "hypervolume": hypervolumes(trials, evaluator.terms.budget.ms, unit),
        "edges": edges(chosen, evaluator.space),
        "recommended": recommended,
        "fidelity": quality.fidelity(plan.proxy, plan.teacher, evaluator.space.name),
        "sources": [*evaluator.space.sources, *evaluator.sheet.sources],
        "finished": study.proxied >= plan.trials,
        "next": f"nas train {_typed(study.folder)}#{recommended['key']}" if recommended else "nas search --help",
    }
    frame = trials_frame(trials, evaluator.space)
    front_keys = [m.key for m in members]
    rows = frame[(frame["state"] == "proxied") & frame["key"].isin(front_keys)].sort_values("latency_ms")
    blocks = blocks_frame(members, evaluator)
    write(study.folder, record, {"trials.csv": frame, "front.csv": rows, "blocks.csv": blocks})
    return SearchResult(folder=study.folder, record=record, front=members)


def _sum(evaluator: Evaluator, member: Evaluation) -> str:
    """A latency as the sum that it is."""
    return f"{member.latency_ms:.0f} ms = {evaluator.terms.words(member.step_ms)}"


def _typed(folder: Path) -> str:
    """What a person types for a study: its name where it lies under reports/, else its path."""
    return folder.name if folder.parent == Path("reports") else str(folder)


def _plural(counts: dict[str, int]) -> dict[str, int]:
    return {{"duplicate": "duplicates"}.get(state, state): n for state, n in counts.items()}


def _reasons(trials: list[Trial]) -> dict[str, int]:
    """What kept candidates from a score, and how often."""
    causes = [t.cause or "latency bound over the budget" for t in trials if t.state == "infeasible"]
    failed = sum(t.state == "failed" for t in trials)
    found = {"latency bound over the budget": 0, **{cause: causes.count(cause) for cause in sorted(set(causes))}}
    return {**found, **({"proxy run failed": failed} if failed else {})}


def _stopping(plan: Plan, trials: list[Trial]) -> dict[str, Any]:
    """How many runs were stopped early, and what that saved."""
    stopped = [t for t in trials if t.state == "stopped"]
    return {
        "confidence": plan.prune,
        "stopped": len(stopped),
        "spent_s": round(sum(float(t.evaluation.seconds or 0.0) for t in stopped), 1),
        "saved_s": round(sum(t.saved_s for t in stopped), 1),
        "basis": "estimate: a stopped run's seconds over its share of the steps, less those seconds",
    }


def _budget(evaluator: Evaluator) -> dict[str, Any]:
    found = evaluator.terms
    return {
        "text": str(found.budget),
        "ms": found.budget.ms,
        "device": evaluator.sheet.slug,
        "per_step": found.budget.per_step,
        "confidence": found.confidence,
        "step_budget_ms": found.step_budget_ms,
    }


def _pipeline(evaluator: Evaluator) -> dict[str, Any]:
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


def _references(evaluator: Evaluator) -> list[Evaluation]:
    space = evaluator.space
    return [evaluator.price([space.reference(r.name)], f"reference:{r.name}")[0] for r in space.starting]


def _reference_rows(evaluator: Evaluator, trials: list[Trial]) -> list[dict[str, Any]]:
    """Each reference as the study found it, with what was published about it."""
    rows = []
    for reference, priced in zip(evaluator.space.starting, _references(evaluator), strict=True):
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
