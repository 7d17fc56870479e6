"""The report's figures as data frames: what is drawn is asserted here, without a plotting library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nas.report.files import StudyFiles

# How a trial stands to the budget and to the other trials.
FRONT, DOMINATED, OVER, UNPROXIED = "front", "dominated", "over budget", "not proxied"
STOPPED, UNTRAINABLE = "stopped early", "not trainable"
UNSCORED = (UNPROXIED, STOPPED, UNTRAINABLE)
# Why a candidate within its space was not worth a proxy run: "latency bound 95 ms over the budget", "812MB, over
# --max-size 700MB".
_OVER = r"\d ms over |, over --"
REUSED = "reused"  # the source of a score that an earlier study paid for
_NUMBERED = re.compile(r"^(.*)_(\d+)$")


def describe(choices: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A configuration in few lines: numbered choices side by side ("width", "256 / 512 / 896").

    An inactive choice, which is empty, reads as a dash.
    """
    grouped: dict[str, list[str]] = {}
    for name, value in choices.items():
        match = _NUMBERED.match(name)
        grouped.setdefault(match[1] if match else name, []).append(tidy(value) or "–")
    return [(name.replace("_", " "), " / ".join(values)) for name, values in grouped.items()]


def tidy(value: Any) -> str:
    """A choice's value as its space file writes it: 2.0 (a whole number beside gaps in a CSV) is 2, True is yes."""
    text = "" if value is None else str(value)
    if text in ("True", "False"):
        return "yes" if text == "True" else "no"
    return text.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", text) else text


def choices_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The choices of one row of trials.csv; "" where inactive."""
    return {str(k).removeprefix("choice."): tidy(v) for k, v in row.items() if str(k).startswith("choice.")}


def points(files: StudyFiles) -> pd.DataFrame:
    """Every distinct candidate once, with how it stands.

    `standing` is front, dominated, over budget (proxied all the same: a reference), not proxied (over a budget or a
    limit, so no quality was bought), stopped early (it could not reach the front any more), or not trainable
    (within every limit, but training diverged or ran out of memory). Failed trials have no point.

    Returns:
        The columns of trials.csv and `standing`, in the order of the trials.
    """
    frame = files.trials[files.trials["state"].isin(["proxied", "stopped", "infeasible"])]
    frame = frame.drop_duplicates("key", keep="first").reset_index(drop=True)
    on_front = frame["key"].isin(set(files.front["key"]))
    feasible = frame["feasible"].astype(str).str.lower() == "true"
    beyond = frame["reason"].str.contains(_OVER)
    unscored = (frame["state"] != "proxied") | frame["quality"].isna()
    standing = np.select(
        [on_front, frame["state"] == "stopped", (frame["state"] == "infeasible") & ~beyond, unscored, ~feasible],
        [FRONT, STOPPED, UNTRAINABLE, UNPROXIED, OVER],
        default=DOMINATED,
    )
    return frame.assign(standing=standing)


def scored(files: StudyFiles) -> pd.DataFrame:
    """Of `points`, those that have a score, over the budget or not."""
    frame = points(files)
    return frame[~frame["standing"].isin(UNSCORED)].reset_index(drop=True)


def front_table(files: StudyFiles) -> pd.DataFrame:
    """The front, fastest first, with what a person chooses by and the next command.

    Returns:
        The columns of front.csv, `recommended` (bool), `reference` (its name or "") and `command`.
    """
    front = files.front.drop_duplicates("key").sort_values("latency_ms", kind="stable").reset_index(drop=True)
    names = {str(r["key"]): str(r["name"]) for r in files.record["references"] if "key" in r}
    return front.assign(
        recommended=front["key"] == files.recommended,
        reference=[names.get(key, "") for key in front["key"]],
        command=[f"nas train {files.folder.name}#{key}" for key in front["key"]],
    )


def references(files: StudyFiles) -> pd.DataFrame:
    """The published networks as the study found them; quality is NaN where the proxy has not run on them."""
    columns = [
        "key", "name", "title", "params", "macs", "latency_ms", "latency_low_ms", "latency_high_ms",
        "meets_budget_probability", "quality", "quality_sd", "text_quality", "published_ms", "published_step_ms",
        "published_params", "published_source", "choices",
    ]  # fmt: skip
    frame = pd.DataFrame([{c: r.get(c) for c in columns} for r in files.record["references"]], columns=columns)
    numbers = [c for c in columns if c not in ("key", "name", "title", "published_source", "choices")]
    frame[numbers] = frame[numbers].astype(float)
    return frame


def image_parts(record: Mapping[str, Any], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of one image with the network of `row`, in running order.

    Returns:
        Each with name, calls, ms, low_ms, high_ms (of all its calls), basis and source. Studies of 0.1 did not say the
        basis of a component, which was measured or published; their bounds are its value.
    """
    pipeline = record["pipeline"]
    parts = [
        {"low_ms": part["ms"], "high_ms": part["ms"], "basis": "measured or published", **part, "calls": 1}
        for part in pipeline["parts"]
    ]
    fixed = {name: sum(float(part[name]) for part in parts) for name in ("ms", "low_ms", "high_ms")}
    denoiser = {
        "name": f"denoiser {row['key']}",
        "calls": pipeline["calls"],
        "ms": row["latency_ms"] - fixed["ms"],
        "low_ms": row["latency_low_ms"] - fixed["low_ms"],
        "high_ms": row["latency_high_ms"] - fixed["high_ms"],
        "basis": "predicted",
        "source": f"the latency predictor of {record['target']}",
    }
    encoders = [part for part in parts if part["role"] == "text_encoders"]
    return [*encoders, denoiser, *(part for part in parts if part["role"] != "text_encoders")]


def latency_parts(files: StudyFiles, by: str) -> pd.DataFrame:
    """Predicted milliseconds of one denoiser call of each front member, summed over `by` ("stage" or "kind").

    Returns:
        Rows are keys (fastest first), columns are parts in the order in which a network runs them.
    """
    order = list(dict.fromkeys(files.blocks[by]))
    if by == "stage":
        order.sort(key=_stage_rank)
    table = files.blocks.pivot_table(index="key", columns=by, values="step_ms", aggfunc="sum", fill_value=0.0)
    keys = front_table(files)["key"].tolist()
    return table.reindex(index=keys, columns=order, fill_value=0.0)


def _stage_rank(stage: str) -> tuple[int, int]:
    """Down path, middle, up path, with the rest before and after: members differ in which stages they have."""
    sides = {"conv_in": 0, "time_embedding": 1, "down_blocks": 2, "mid_block": 3, "up_blocks": 4}
    side, _, number = stage.partition(".")
    return sides.get(side, 5), int(number) if number.isdigit() else 0


def varied_choices(files: StudyFiles) -> list[str]:
    """The choices that took more than one value among the proxied candidates."""
    proxied = scored(files)
    return [c for c in files.choices if len(set(proxied[f"choice.{c}"].map(tidy)) - {""}) > 1]


def choice_lines(files: StudyFiles) -> pd.DataFrame:
    """One row per proxied candidate and axis, for parallel coordinates.

    Axes are the choices that vary, then latency and quality. `position` is 0 at an axis' first value and 1 at its
    last; NaN where a choice is inactive. Candidates of one value are set slightly apart, in the order of quality.

    Returns:
        Columns key, standing, quality, axis, value (text), position.
    """
    frame = scored(files).sort_values("quality", kind="stable").reset_index(drop=True)
    rank = np.linspace(-0.5, 0.5, len(frame)) if len(frame) > 1 else np.zeros(len(frame))
    parts = []
    for name in varied_choices(files):
        values = frame[f"choice.{name}"].map(tidy)
        order = ordered(set(values) - {""})
        at = values.map({v: i for i, v in enumerate(order)}).astype(float)
        gap = 1.0 / (len(order) - 1)
        # The spread stays well inside the gap to the next value, and inside the figure where the gap is wide.
        parts.append(_axis(frame, name, values, gap * at + min(0.3 * gap, 0.1) * rank))
    for name in ("latency_ms", "quality"):
        span = frame[name].max() - frame[name].min()
        position = (frame[name] - frame[name].min()) / (span if span > 0 else 1.0)
        parts.append(_axis(frame, name, frame[name].map(lambda v: f"{v:.4g}"), position))
    return pd.concat(parts, ignore_index=True)


def _axis(frame: pd.DataFrame, name: str, values: pd.Series, position: pd.Series) -> pd.DataFrame:
    return frame[["key", "standing", "quality"]].assign(axis=name, value=values, position=position)


def ordered(values: set[str]) -> list[str]:
    """Numbers by size, everything else by name."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def hypervolume_curve(files: StudyFiles) -> pd.DataFrame:
    """The hypervolume after each scored candidate.

    Returns:
        Columns trial (the n-th scored, from 1), value, improved (bool), and seconds: what this study had spent on proxy
        runs by then, all workers together; scores taken over from earlier studies cost none. NaN where trials.csv does
        not tell.
    """
    values = np.array(files.record["hypervolume"]["values"], dtype=float)
    improved = np.diff(values, prepend=0.0) > 1e-12
    trials = files.trials.sort_values("number", kind="stable")
    spent = trials["seconds"].where(trials["source"] != REUSED, 0.0).fillna(0.0).cumsum()
    seconds = spent[trials["state"] == "proxied"].to_numpy()
    if len(seconds) != len(values):
        seconds = np.full(len(values), np.nan)
    return pd.DataFrame(
        {"trial": np.arange(1, len(values) + 1), "value": values, "improved": improved, "seconds": seconds}
    )


def reference_point(files: StudyFiles) -> tuple[float, float]:
    """The hypervolume's corner: milliseconds, and the score's unit."""
    found = files.record["hypervolume"].get("reference_point")
    if isinstance(found, Mapping):
        return float(found["latency_ms"]), float(found["quality"])
    latency, negated = found if found else (files.record["budget"]["ms"], 0.0)
    return float(latency), -float(negated) + 0.0
