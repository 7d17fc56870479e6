"""`nas search`: from a space and budgets to a folder with a Pareto front."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas import quality
from nas.errors import UsageError
from nas.evaluate import Evaluator, Shares
from nas.paths import atomic_write, writable_dir
from nas.search.planning import plan_search, preview
from nas.search.settings import SearchResult, SearchSettings
from nas.search.writing import write_record
from nas.study import Plan, Study
from nas.study.journal import NAME as JOURNAL
from nas.study.storage import shown

__all__ = ["SearchResult", "SearchSettings", "plan_search", "preview", "run_search", "study_folder"]

Progress = Callable[[str, int, int, str], None]
_IDENTITY = "identity.json"


def run_search(settings: SearchSettings, progress: Progress | None = None) -> SearchResult:
    """Runs, or resumes, a search and writes its study files.

    An existing study of `settings.out` is taken up under the budgets, limits and trials of these settings.

    Raises:
        NasError, UsageError: see `plan_search` and `nas.study.Study`; nothing that was done is lost.
    """
    report = progress or (lambda stage, done, total, note: None)
    plan = plan_search(settings)
    writable_dir(settings.out if settings.out is not None else Path("reports"))
    report("price", 0, 1, f"pricing {plan.evaluator.space.name}: each distinct block is traced once")
    plan.evaluator.pricer.prepare(lambda done, total: report("price", done, total, "blocks traced"))
    plan.evaluator.check_reachable()
    shares = plan.evaluator.shares()
    report("price", 1, 1, told(plan.evaluator, shares))
    if plan.trials:
        quality.prepare(
            plan.evaluator.space,
            plan.teacher,
            plan.proxy,
            lambda done, total: report("teacher", done, total, "what all candidates share"),
            plan.device,
        )
    folder = study_folder(settings, plan)
    with Study(plan, folder, report) as study:
        atomic_write(folder / _IDENTITY, json.dumps(_identity(plan), indent=1) + "\n")
        for change in study.changes:
            report("study", 0, 1, f"the study goes on under other terms: {change}")
        study.run()
        return write_record(study, settings, shares)


def told(evaluator: Evaluator, shares: Shares) -> str:
    """What the constraints leave of the space, in a line."""
    each = ", ".join(f"{one.constraint} rejects {one.share:.1%}" for one in shares.rejected)
    return f"{shares.feasible:.1%} of {evaluator.space.name} is within every budget and limit ({each})"


def study_folder(settings: SearchSettings, plan: Plan) -> Path:
    """`--out`, or the folder of the same search if there is one to resume, or a new one under reports/.

    A record without its journal, as a repository keeps it, is not resumed and not overwritten.

    Raises:
        UsageError: `--fresh` for a study that is kept in a storage of its own, which is not ours to empty; or `--out`
            is a record without its journal.
    """
    if settings.out is not None:
        return _begun(writable_dir(settings.out), settings)
    space, alias = plan.evaluator.space, plan.evaluator.sheet.alias
    name = f"{space.name}-{alias}"
    root = writable_dir(Path("reports"))
    if not settings.fresh:
        for folder in sorted(root.glob(f"*-{name}*"), reverse=True):
            if _read_identity(folder) == _identity(plan) and (plan.storage or (folder / JOURNAL).exists()):
                return folder
    today = datetime.date.today().isoformat()
    number = 1
    while (folder := root / (f"{today}-{name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return writable_dir(folder)


def _begun(folder: Path, settings: SearchSettings) -> Path:
    """A folder that was asked for; `--fresh` drops its journal first."""
    if settings.fresh:
        if settings.storage is not None:
            raise UsageError(
                f"--fresh cannot empty {shown(settings.storage, None)}, which others may use too",
                hint="choose another --out: the study is then another",
            )
        for name in (JOURNAL, _IDENTITY):
            (folder / name).unlink(missing_ok=True)
    elif settings.storage is None and (folder / "study.json").exists() and not (folder / JOURNAL).exists():
        raise UsageError(
            f"{folder} holds the record of a search without its journal, so the search cannot go on from it",
            hint="choose another --out, or begin it anew there with --fresh",
        )
    return folder


def _identity(plan: Plan) -> dict[str, Any]:
    """Which search a folder belongs to."""
    return {**plan.identity(), "storage": None if plan.storage is None else shown(plan.storage, None)}


def _read_identity(folder: Path) -> Any:
    try:
        return json.loads((folder / _IDENTITY).read_text())
    except (OSError, ValueError):
        return None
