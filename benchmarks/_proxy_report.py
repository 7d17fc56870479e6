"""What benchmarks/proxy_table.py makes of its scores: the comparison with the truth, and the cards."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nas import quality
from nas.bench import Bench, ProxySettings
from nas.fidelity import (
    Compared,
    Truth,
    agreement_row,
    card,
    chosen_fairly,
    difference_row,
    reliability_facts,
    value_of,
)
from nas.pareto import non_dominated
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.proxies import regression, settings_of
from nas.space import Candidate

GROUPS: Mapping[str, tuple[str, ...]] = {
    "snapgen_unet": ("snapgen_unet",),
    "sd_unet+sdxl_unet": ("sd_unet", "sdxl_unet"),
}
TARGETS: Mapping[str, str] = {
    "quality_db": "quality",
    "text_db": "text",
    "colour": "colours right",
    "shape": "shapes right",
}
COSTS: Mapping[str, str] = {
    "params": "parameters",
    "macs": "MACs",
    "iphone_step_ms": "iPhone latency",
    "cpu_step_ms": "CPU latency",
}
LATENCY = "iphone_step_ms"
FREE = ("synflow", "naswot", "grad_norm")  # features of the regression that are scores themselves
LEAST = 8  # candidates below which nothing is compared
AFFORDABLE_S = 20.0  # of one thread: ten seconds a candidate on two cores
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Known:
    """The truth table by candidate.

    Attributes:
        rows: each candidate's runs, first seeds first, by (space, key).
    """

    rows: dict[Key, list[Mapping[str, str]]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]]) -> Known:
        """From the table's rows."""
        found: dict[Key, list[Mapping[str, str]]] = defaultdict(list)
        for row in sorted(rows, key=lambda each: int(each["seed"])):
            found[row["space"], row["key"]].append(row)
        return cls(rows=dict(found))

    def keys(self, spaces: Sequence[str]) -> list[Key]:
        """The candidates of some spaces."""
        return [key for key in self.rows if key[0] in spaces]

    def truth(self, keys: Sequence[Key], target: str) -> Truth:
        """What these candidates came to; one object for equal candidates, which keeps what it has computed."""
        place = (tuple(keys), target)
        if place not in self._truths:
            self._truths[place] = Truth(
                runs=tuple(tuple(float(row[target]) for row in self.rows[key]) for key in keys),
                latency_ms=self.cost(keys, LATENCY),
                groups=np.array([key[0] for key in keys]),
            )
        return self._truths[place]

    @cached_property
    def _truths(self) -> dict[tuple[tuple[Key, ...], str], Truth]:
        return {}

    def cost(self, keys: Sequence[Key], name: str) -> np.ndarray:
        """A column that needs no training [n]."""
        return np.array([float(self.rows[key][0][name]) for key in keys])

    @property
    def steps(self) -> int:
        """Of each long run."""
        return int(next(iter(self.rows.values()))[0]["steps"])


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A variant's scores, higher better, of those candidates that have one.

    Attributes:
        name: of the variant.
        settings: None for what is no proxy run.
        values, texts: by (space, key); nan where the proxy failed; no texts where it has none.
        seconds: of one thread, by (space, key), with the shared part.
        reading: what was read, where that is not the score itself.
    """

    name: str
    settings: ProxySettings | None
    values: dict[Key, float]
    texts: dict[Key, float]
    seconds: dict[Key, float]
    reading: str = ""


def from_rows(
    name: str, settings: ProxySettings, rows: Iterable[Mapping[str, Any]], shared_s: Mapping[str, float]
) -> Scored:
    """A variant as its rows of scores.csv have it; what candidates share is divided among those of their space."""
    rows = list(rows)
    keys = [(row["space"], row["key"]) for row in rows]
    texts = {key: value_of(row, "text") for key, row in zip(keys, rows, strict=True)}
    sizes = {space: sum(key[0] == space for key in keys) for space in {key[0] for key in keys}}

    def number(value: float | None) -> float:
        return float("nan") if value is None else value

    return Scored(
        name=name,
        settings=settings,
        values={key: number(value_of(row)) for key, row in zip(keys, rows, strict=True)},
        texts={k: number(v) for k, v in texts.items()} if any(v is not None for v in texts.values()) else {},
        seconds={
            key: float(row["cpu_s"]) + shared_s.get(key[0], 0.0) / sizes[key[0]]
            for key, row in zip(keys, rows, strict=True)
        },
    )


def readings(scored: Scored, rows: Iterable[Mapping[str, Any]], long_steps: int) -> list[Scored]:
    """Other figures to read off the same runs, from the training loss alone; none where a run kept no curve."""
    curves = {(row["space"], row["key"]): np.array(json.loads(row.get("curve") or "[]")) for row in rows}
    if not curves or any(len(curve) < 3 for curve in curves.values()):
        return []
    found = {
        "training loss, last quarter": {key: float(curve[-1, 2]) for key, curve in curves.items()},
        "training loss, whole run": {key: _mean_db(curve) for key, curve in curves.items()},
        "power law": {key: power_law_db(curve, long_steps) for key, curve in curves.items()},
    }
    return [
        Scored(
            name=f"{scored.name}, {name}",
            settings=scored.settings,
            values=values,
            texts={},
            seconds=scored.seconds,
            reading=name,
        )
        for name, values in found.items()
    ]


def _mean_db(curve: np.ndarray) -> float:
    """-10 log10 of a whole run's mean training loss; `curve` [points, (step, seconds, dB since the point before)]."""
    steps = np.diff(curve[:, 0], prepend=0)
    return float(-10 * np.log10((steps * 10 ** (-curve[:, 2] / 10)).sum() / steps.sum()))


def power_law_db(curve: np.ndarray, long_steps: int) -> float:
    """The training loss that a power law through the run's parts (least squares of logarithms) foretells, in dB."""
    middle = curve[:, 0] - np.diff(curve[:, 0], prepend=0) / 2
    slope, at_one = np.polyfit(np.log(middle), curve[:, 2], 1)
    return float(at_one + slope * np.log(long_steps))


def cross_fitted(known: Known, candidates: Iterable[Candidate], others: Iterable[Scored], teacher: str) -> list[Scored]:
    """The regression of cheap features, each candidate predicted by a fit that never saw it.

    Its training-free features are those of the variants of that name, whose seconds it costs; none where one of them
    is missing. Leaving one out is hard on a weak regression: its mean moves away from what was left out.
    """
    by_name = {scored.name: scored for scored in others}
    free = [by_name[name] for name in FREE if name in by_name]
    settings = settings_of("regression")
    bench = Bench(teacher, settings)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for candidate in candidates:
        place = (candidate.space.name, candidate.key)
        if len(free) < len(FREE) or not all(math.isfinite(each.values.get(place, math.nan)) for each in free):
            continue
        row = {each.name: each.values[place] for each in free}
        row["grad_norm"] = math.log10(row["grad_norm"])
        row |= {name: math.log10(known.cost([place], name)[0]) for name in ("params", "macs")}
        row |= {name: known.truth([place], name).values[0] for name in regression.TARGETS}
        rows[place[0]].append({"key": candidate.key, **row, **regression.shape_of(bench.spec(candidate))})
    found = Scored(name="regression", settings=settings, values={}, texts={}, seconds={}, reading="")
    for space, each in rows.items():
        if len(each) < LEAST:
            continue
        targets = regression.fit(each)["targets"]
        for read, name in ((found.values, "quality_db"), (found.texts, "text_db")):
            read.update({(space, key): value for key, value in targets[name]["left_out"].items()})
    found.seconds.update({key: sum(each.seconds[key] for each in free) for key in found.values})
    return [found] if found.values else []


def costs(known: Known) -> list[Scored]:
    """Parameters, MACs and latencies as scores that cost nothing."""
    keys = list(known.rows)
    nothing = dict.fromkeys(keys, 0.0)
    return [
        Scored(
            name=name,
            settings=settings_of(column) if column in ("params", "macs") else None,
            values=dict(zip(keys, known.cost(keys, column).tolist(), strict=True)),
            texts={},
            seconds=nothing,
        )
        for column, name in COSTS.items()
    ]


def compare(known: Known, variants: Sequence[Scored]) -> list[dict[str, Any]]:
    """A row per group of spaces, target and variant."""
    found = []
    for group, spaces in GROUPS.items():
        for target, words in TARGETS.items():
            rows = [row for each in variants if (row := _compared(known, each, known.keys(spaces), target)) is not None]
            for row, kept in zip(rows, _pareto(rows), strict=True):
                found.append({"group": group, "target": words, **row, "pareto": kept})
    return found


def _compared(known: Known, scored: Scored, keys: Sequence[Key], target: str) -> dict[str, Any] | None:
    keys = [key for key in keys if key in scored.values]
    if len(keys) < LEAST:
        return None
    truth = known.truth(keys, target)
    own_text = target != "quality_db" and bool(scored.texts)
    chosen = scored.texts if own_text else scored.values
    score = np.array([chosen[key] for key in keys])
    row = agreement_row(scored.name, score, truth)
    for column in ("params", "macs"):
        gap = difference_row(COSTS[column], score, known.cost(keys, column), truth)
        row |= {f"above_{column}_{name}": value for name, value in gap.items() if name.startswith("within_band")}
    seconds = float(np.mean([scored.seconds[key] for key in keys]))
    return {
        "variant": row.pop("predictor"),
        "proxy": scored.settings.proxy if scored.settings else "none",
        "free": scored.name in COSTS.values(),
        "read": scored.reading or ("text" if own_text else "score"),
        "candidates": len(keys),
        "failed": int(np.isnan(score).sum()),
        "seconds": round(seconds, 2),
        **row,
    }


def _pareto(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which rows no other beats in both seconds and tau within bands."""
    points = np.array([[row["seconds"], -known_or(row["within_band"], -1.0)] for row in rows])
    return [bool(kept) for kept in non_dominated(points)] if len(rows) else []


def known_or(value: float | None, other: float) -> float:
    """A figure, or another where it is not known."""
    return other if value is None else value


def optimism(known: Known, variants: Sequence[Scored]) -> dict[str, Any]:
    """What choosing the best affordable variant on these candidates flatters, by group of spaces."""
    found = {}
    for group, spaces in GROUPS.items():
        keys = known.keys(spaces)
        scores = {
            each.name: np.array([each.values[key] for key in keys])
            for each in variants
            if keys
            and all(key in each.values for key in keys)
            and np.mean([each.seconds[key] for key in keys]) <= AFFORDABLE_S
        }
        if len(keys) >= 2 * LEAST and scores:
            here, there = chosen_fairly(scores, known.truth(keys, "quality_db"))
            found[group] = {
                "variants": len(scores),
                "within_band_where_chosen": round(here, 3),
                "within_band_elsewhere": round(there, 3),
            }
    return found


def truths(known: Known) -> dict[str, Any]:
    """How well each truth agrees with itself, by group of spaces and target."""
    return {
        group: {words: reliability_facts(known.truth(keys, target)) for target, words in TARGETS.items()}
        for group, spaces in GROUPS.items()
        if len(keys := known.keys(spaces)) >= LEAST
    }


def write_cards(known: Known, variants: Iterable[Scored], out: Path, teacher: str) -> list[Path]:
    """One card per variant and space for `nas.quality.fidelity`; other readings are nobody's settings and get none."""
    wrote = []
    for scored in variants:
        if scored.settings is None or scored.reading:
            continue
        for space in sorted({key[0] for key in known.rows}):
            keys = [key for key in known.keys([space]) if key in scored.values]
            if len(keys) < LEAST:
                continue
            compared = Compared(
                space=space,
                settings=scored.settings,
                long_steps=known.steps,
                quality=known.truth(keys, "quality_db"),
                text=known.truth(keys, "text_db"),
                scores=np.array([scored.values[key] for key in keys]),
                texts=np.array([scored.texts[key] for key in keys]) if scored.texts else None,
                costs={COSTS[name]: known.cost(keys, name) for name in ("params", "macs")},
                seconds=float(np.mean([scored.seconds[key] for key in keys])),
            )
            made = card(compared, quality.teacher_hash(teacher), made_by="benchmarks/proxy_table.py")
            path = out / f"card-{space}-{scored.name.replace(' ', '-')}.json"
            wrote.append(atomic_write(path, json.dumps(made, indent=1) + "\n"))
    return wrote


def note_of(known: Known) -> str:
    """What the reader must know first."""
    counts = ", ".join(f"{len(known.keys([space]))} of {space}" for names in GROUPS.values() for space in names)
    return (
        f"Truth: small copies of {counts} candidates, trained for {known.steps} steps; a third of them twice. Pairs of"
        " similar latency are those whose predicted iPhone latencies differ by less than 15 %, within one space:"
        " that is where a search with a budget decides. Intervals are 90 %, by bootstrap over candidates; the best of"
        " many variants on the same candidates looks better than it is. Seconds are CPU seconds of one thread."
    )


def build(known: Known, variants: Sequence[Scored]) -> dict[str, Any]:
    """Everything that table.json holds."""
    return {
        "note": note_of(known),
        "rows": compare(known, variants),
        "truth": truths(known),
        "choosing": optimism(known, variants),
        "provenance": provenance(seed=0),
    }
