"""What a test of a proxy showed, as the record that searches print and the words that go with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nas.bench import ProxySettings
from nas.fidelity.agreement import (
    BAND,
    CONFIDENCE,
    TOP,
    Interval,
    Truth,
    difference,
    regret,
    reliability,
    spearman,
    tau,
    tau_without_ties,
)
from nas.provenance import provenance

TRUSTED, CARE, UNPROVEN = "may be trusted", "with care", "not proven"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A proxy's scores beside the truth, of the same candidates in the same order.

    Attributes:
        space: the space's name, or what else the candidates are of.
        settings: of the proxy.
        long_steps: of the truth.
        quality: the truth in dB.
        text: the caption's part of the truth in dB.
        scores: the proxy's values [n]; nan where it failed.
        texts: its text values [n]; None where it has none.
        costs: what else could rank, by name [n] each; parameters and MACs at least.
        seconds: of one thread per candidate, the shared part included.
    """

    space: str
    settings: ProxySettings
    long_steps: int
    quality: Truth
    text: Truth
    scores: np.ndarray
    texts: np.ndarray | None
    costs: Mapping[str, np.ndarray]
    seconds: float


def agreement_row(name: str, score: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Everything that is asked of one score: rank agreement with intervals, overall and within latency bands."""
    return {
        "predictor": name,
        **_figures("kendall", tau(score, truth)),
        **_figures("within_band", tau(score, truth, band=True)),
        **_figures("spearman", spearman(score, truth)),
        "kendall_without_ties": rounded(tau_without_ties(score, truth)),
        "within_band_without_ties": rounded(tau_without_ties(score, truth, band=True)),
        f"top{TOP}_regret": rounded(regret(score, truth)),
    }


def difference_row(name: str, score: np.ndarray, other: np.ndarray, truth: Truth) -> dict[str, Any]:
    """By how much a score agrees better than another."""
    band = difference(score, other, truth, band=True)
    return {
        "than": name,
        **_figures("within_band", band),
        "within_band_excludes_zero": band.excludes_zero,
        **_figures("kendall", difference(score, other, truth)),
    }


def reliability_facts(truth: Truth) -> dict[str, Any]:
    """How well the truth agrees with itself, and the tau that this leaves to be reached."""
    found = reliability(truth)
    return {
        "trained_twice": found.twice,
        "seed_sd": rounded(found.seed_sd),
        "between_candidates_sd": rounded(found.between_sd),
        **_figures("kendall_between_seeds", found.tau),
        "highest_kendall": rounded(found.ceiling),
        "highest_within_band": rounded(found.ceiling_band),
        "tied_pairs": rounded(found.ties),
        "tied_pairs_within_band": rounded(found.ties_band),
        "pairs_within_band": int(truth.same_band.sum()) // 2,
    }


def card(compared: Compared, teacher_digest: str, **more: Any) -> dict[str, Any]:
    """The record of a test, in the form that `nas.quality.fidelity` finds and a study's page shows.

    Args:
        compared: scores and truth.
        teacher_digest: of the teacher that both came from.
        more: further fields, such as the plateau of the truth.
    """
    truth = compared.quality
    against = [difference_row(name, compared.scores, cost, truth) for name, cost in compared.costs.items()]
    rows = [agreement_row("proxy score", compared.scores, truth)]
    rows += [agreement_row(name, cost, truth) for name, cost in compared.costs.items()]
    text_name = "proxy text score" if compared.texts is not None else "proxy score, which has no text part"
    texts = compared.texts if compared.texts is not None else compared.scores
    text_rows = [agreement_row(text_name, texts, compared.text)]
    text_rows += [agreement_row(name, cost, compared.text) for name, cost in compared.costs.items()]
    verdict = _verdict(rows[0], against)
    return {
        "note": _note(compared, rows[0], against, verdict),
        "text_note": _text_note(text_rows[0], compared.texts is not None),
        "verdict": verdict,
        "agreement": rows,
        "agreement_above": against,
        "text_agreement": text_rows,
        "reliability": reliability_facts(truth),
        "text_reliability": reliability_facts(compared.text),
        "candidates": len(truth),
        "not_scored": int(np.isnan(compared.scores).sum()),
        "band": BAND,
        "confidence": CONFIDENCE,
        "seconds_per_candidate": rounded(compared.seconds),
        "long_steps": compared.long_steps,
        **more,
        "space": compared.space,
        "teacher_digest": teacher_digest,
        "proxy": json.loads(json.dumps(asdict(compared.settings))),
        "provenance": provenance(seed=truth.seed),
    }


def rounded(value: float, digits: int = 3) -> float | None:
    """For JSON: None where it is not known."""
    return round(value, digits) if math.isfinite(value) else None


def right_order(kendall: float | None) -> str:
    """A tau as the share of pairs in the right order."""
    return "an unknown share" if kendall is None else f"{(1 + kendall) / 2:.0%}"


def interval_words(row: Mapping[str, Any], name: str) -> str:
    """Such as 0.62 (0.45 to 0.75)."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "unknown"
    return f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _figures(name: str, found: Interval) -> dict[str, float | None]:
    bounds = ("", found.value), ("_low", found.low), ("_high", found.high)
    return {f"{name}{suffix}": rounded(value) for suffix, value in bounds}


def _verdict(ours: Mapping[str, Any], against: Sequence[Mapping[str, Any]]) -> str:
    """Trusted is what ranks within latency bands, and there better than every cost, beyond chance."""
    ranks = ours["within_band_low"] is not None and ours["within_band_low"] > 0
    better = all(row["within_band_low"] is not None and row["within_band_low"] > 0 for row in against)
    if ranks and better:
        return TRUSTED
    return CARE if ours["kendall_low"] is not None and ours["kendall_low"] > 0 else UNPROVEN


def _note(compared: Compared, ours: Mapping[str, Any], against: Sequence[Mapping[str, Any]], verdict: str) -> str:
    """The card in one paragraph."""
    settings = compared.settings
    steps = f", {settings.steps} steps" if settings.steps else ""
    beaten = [row["than"] for row in against if row["within_band_low"] is not None and row["within_band_low"] > 0]
    level = [row["than"] for row in against if row["than"] not in beaten]
    words = [
        f"{len(compared.quality)} candidates of {compared.space} were trained for {compared.long_steps} steps; the"
        f" score ({settings.proxy}{steps}) puts {right_order(ours['kendall'])} of all pairs in the same order (Kendall"
        f" tau {interval_words(ours, 'kendall')}), and {right_order(ours['within_band'])} of the pairs whose latencies"
        f" differ by less than {BAND:.0%} (tau {interval_words(ours, 'within_band')})."
    ]
    if beaten:
        words.append(f"At similar latency it ranks better than {_listed(beaten)}, beyond chance.")
    if level:
        words.append(f"At similar latency it is not shown to rank better than {_listed(level)}.")
    words.append(
        {
            TRUSTED: "It may be trusted to choose between networks of similar latency, down to ties of the seeds.",
            CARE: "Use it with care: it tells good from bad overall; train several members of a front before choosing.",
            UNPROVEN: "It is not shown to rank at all: do not choose by it.",
        }[verdict]
    )
    return " ".join(words)


def _text_note(row: Mapping[str, Any], own: bool) -> str:
    whose = "Its text score" if own else "It has no text score; its quality"
    low = row["kendall_low"]
    sure = low is not None and low > 0
    return (
        f"{whose} against how much of the caption's effect is learnt in the long run: Kendall tau"
        f" {interval_words(row, 'kendall')}, at similar latency {interval_words(row, 'within_band')}"
        + ("." if sure else "; it is not shown to judge how well captions are followed.")
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
