"""What a study writes for the stages after it: study.json, trials.csv, front.csv, blocks.csv.

The report reads only these files; so does `nas train STUDY#CANDIDATE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas import pareto
from nas.bench import Curve
from nas.errors import NasError, UsageError, unknown
from nas.evaluate import Evaluation, Evaluator
from nas.paths import atomic_write, find_study
from nas.space import Candidate, SearchSpace, load_space

SCHEMA = 1
# The source of a trial whose score an earlier study paid for.
REUSED = "reused"
FILES = ("study.json", "trials.csv", "front.csv", "blocks.csv")
# Of proxies that train: fidelity to the teacher.
DECIBELS = "dB"
# Worth nothing: a student that predicts no better than the preconditioner's skip path alone has 0 dB.
QUALITY_FLOOR_DB = 0.0
# Below this a student predicts less than a tenth of what a caption changes.
TEXT_LEARNT_DB = 1.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a study as it is written down.

    Attributes:
        number: in the order of proposals.
        state: proxied; stopped (early: it has no quality); infeasible; duplicate; failed.
        evaluation: cost, latency and quality, and why there is none.
        round: in which its proxy ran; None where none did.
        cause: why an infeasible trial is, where it is not the budget.
        curve: its way, as far as it came.
        saved_s: proxy seconds that stopping it saved (an estimate).
    """

    number: int
    state: str
    evaluation: Evaluation
    round: int | None = None
    cause: str = ""
    curve: Curve = ()
    saved_s: float = 0.0


_APART = ("choices", "source", "reason", "others", "violated")
_COLUMNS = [f.name for f in fields(Evaluation) if f.name not in _APART]


def trials_frame(trials: Sequence[Trial], space: SearchSpace) -> pd.DataFrame:
    """One row per trial; an inactive choice is empty.

    The latency on the device of a further budget stands in columns such as `latency_ms@iphone-13`.
    """
    rows = []
    for trial in trials:
        values = asdict(trial.evaluation)
        row = {"number": trial.number, "state": trial.state, "source": values["source"], "reason": values["reason"]}
        row |= {name: values[name] for name in _COLUMNS}
        row |= _elsewhere(trial.evaluation)
        row |= {f"choice.{c.name}": trial.evaluation.choices.get(c.name) for c in space.choices}
        rows.append(row)
    columns = [
        "number",
        "key",
        "state",
        "source",
        "reason",
        *_COLUMNS[1:],
        *dict.fromkeys(name for trial in trials for name in _elsewhere(trial.evaluation)),
        *(f"choice.{c.name}" for c in space.choices),
    ]
    return pd.DataFrame(rows, columns=columns)


def _elsewhere(evaluation: Evaluation) -> dict[str, float]:
    """The latencies on the devices of the further budgets, by column."""
    return {f"{name}@{device}": value for device, found in evaluation.others.items() for name, value in found.items()}


def front(trials: Sequence[Trial]) -> list[Evaluation]:
    """The feasible proxied trials that no other beats in both latency and quality, fastest first."""
    good = [t.evaluation for t in trials if t.state == "proxied" and t.evaluation.feasible]
    if not good:
        return []
    points = np.array([[e.latency_ms, -float(e.quality or 0.0)] for e in good])
    kept = [e for e, keep in zip(good, pareto.non_dominated(points), strict=True) if keep]
    return sorted(kept, key=lambda e: e.latency_ms)


def hypervolumes(trials: Sequence[Trial], budget_ms: float, unit: str = DECIBELS) -> dict[str, Any]:
    """Hypervolume (s x the score's unit) after each proxied trial, against (budget, what is worth nothing).

    In dB that is 0: fixed, so studies can be compared. Other scores have no such point, and the study's own worst
    stands for it: their figures are of this study alone.
    """
    scored = [t.evaluation for t in trials if t.state == "proxied"]
    worst = min((float(e.quality or 0.0) for e in scored), default=0.0)
    floor = QUALITY_FLOOR_DB if unit == DECIBELS else worst
    points: list[list[float]] = []
    values = []
    for evaluation in scored:
        if evaluation.feasible:
            points.append([evaluation.latency_ms / 1000, -float(evaluation.quality or 0.0)])
        values.append(float(pareto.hypervolume(np.array(points).reshape(-1, 2), np.array([budget_ms / 1000, -floor]))))
    return {"reference_point": {"latency_ms": budget_ms, "quality": floor}, "unit": f"s·{unit}", "values": values}


def recommend(members: Sequence[Evaluation], unit: str = DECIBELS) -> dict[str, str] | None:
    """The fastest front member whose quality cannot be told from the best one's, and why."""
    if not members:
        return None
    best = max(members, key=lambda e: float(e.quality or 0.0))
    # Two spreads of a score: gaps below that are ties (reference experiment: gaps under 4 % are not separable).
    tie = 2.0 * max(float(best.quality_sd or 0.0), 0.05 if unit == DECIBELS else 0.0)
    chosen = next(e for e in members if float(e.quality or 0.0) >= float(best.quality or 0.0) - tie)
    if chosen.key == best.key:
        why = f"the best proxy quality on the front, {best.quality:.2f} {unit}, and no faster point ties with it"
    else:
        why = (
            f"the fastest whose quality, {chosen.quality:.2f} {unit}, is within {tie:.2f} {unit} (two of its standard"
            f" deviations) of the best {best.key} at {best.quality:.2f} {unit}"
        )
    why = f"{why}; {chosen.meets_budget_probability:.0%} likely within the budget"
    why += "".join(
        f", {found['meets_budget_probability']:.0%} within that of {device}" for device, found in chosen.others.items()
    )
    if all(e.text_quality is None for e in members):
        why += "; text is not judged by this proxy"
    elif max(float(e.text_quality or 0.0) for e in members) < TEXT_LEARNT_DB:
        why += "; no candidate follows captions by its proxy score, so text is not judged here"
    return {"key": chosen.key, "why": why}


def edges(evaluation: Evaluation | None, space: SearchSpace) -> list[dict[str, Any]]:
    """Ordinal choices whose value stands at an end of its list: the space may be too small there."""
    found: list[dict[str, Any]] = []
    for choice in space.choices:
        value = evaluation.choices.get(choice.name) if evaluation is not None else None
        if not choice.ordinal or value is None or len(choice.values) < 2:
            continue
        if value in (choice.values[0], choice.values[-1]):
            found.append({"choice": choice.name, "value": value, "at": "low" if value == choice.values[0] else "high"})
    return found


def blocks_frame(members: Sequence[Evaluation], evaluator: Evaluator) -> pd.DataFrame:
    """Per block of every front member: cost, predicted milliseconds of one denoiser call, and its share."""
    rows = []
    for member in members:
        candidate = evaluator.space.candidate(**dict(member.choices))
        for priced, ms in evaluator.block_latencies(candidate):
            rows.append(
                {
                    "key": member.key,
                    "block": priced.spec.name,
                    "kind": priced.spec.kind,
                    "stage": ".".join(priced.spec.name.split(".")[:2]),
                    "params": priced.cost.params,
                    "macs": priced.cost.macs,
                    "weight_bytes": priced.cost.weight_bytes,
                    "step_ms": ms,
                    "share": ms / member.step_ms,
                }
            )
    columns = ["key", "block", "kind", "stage", "params", "macs", "weight_bytes", "step_ms", "share"]
    return pd.DataFrame(rows, columns=columns)


def write(folder: Path, study: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> None:
    """Writes the study's files, each whole or not at all; study.json last, because it says the others are there."""
    for name, frame in frames.items():
        atomic_write(folder / name, frame.to_csv(index=False))
    atomic_write(folder / "study.json", json.dumps(study, indent=1) + "\n")


def read_study(folder: Path) -> dict[str, Any]:
    """study.json of a study's folder.

    Raises:
        NasError: it is missing, not JSON, or of another schema.
    """
    path = folder / "study.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise NasError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NasError(f"{path} is not valid JSON: {error}", hint="run the search again to write it anew") from error
    if data.get("schema") != SCHEMA:
        raise NasError(f"{path}: schema {data.get('schema')!r} is not the {SCHEMA} that this version reads")
    return dict(data)


def candidate_of(study: str, root: str | Path = "reports") -> tuple[Path, Candidate]:
    """The candidate of "STUDY#KEY"; a key may be shortened while it stays unique, and "STUDY" alone is the recommended.

    Raises:
        UsageError: no such study or key.
    """
    name, _, key = study.partition("#")
    folder = find_study(name, root)
    data = read_study(folder)
    frame = pd.read_csv(folder / "trials.csv", dtype={"key": str}, keep_default_na=False)
    key = key or (data.get("recommended") or {}).get("key", "")
    keys = sorted(set(frame["key"]))
    matches = [k for k in keys if key and k.startswith(key)]
    if len(matches) != 1:
        known = list(pd.read_csv(folder / "front.csv", dtype={"key": str})["key"])
        if len(matches) > 1:
            raise UsageError(f"candidate {key!r} of {name} could be {', '.join(matches)}; give more of it")
        raise unknown("candidate", key, known, where=f"the front of {folder}")
    space = load_space(data.get("space_path") or data["space"])
    row = frame[frame["key"] == matches[0]].iloc[0]
    space = space.at_resolution(int(data["resolution_px"]))
    if space.hash != data["space_hash"]:
        raise NasError(
            f"{folder} was made with another version of the space {data['space']} ({data['space_hash']}, now"
            f" {space.hash}): the same choices may stand for another network",
            hint="run the search again, or restore the space file",
        )
    values = {c.name: _typed(c.values, row[f"choice.{c.name}"]) for c in space.choices if row[f"choice.{c.name}"] != ""}
    return folder, space.candidate(**values)


def _typed(values: Sequence[Any], text: Any) -> Any:
    """The choice value that a CSV cell stands for."""
    for value in values:
        if str(value) == str(text) or (isinstance(value, int | float) and str(text) in (str(value), f"{float(value)}")):
            return value
    return text
