"""How well proxies rank: candidates trained long, the proxies' scores of them, and how the two agree."""

from __future__ import annotations

from nas.fidelity.agreement import (
    BAND,
    Interval,
    Reliability,
    Truth,
    chosen_fairly,
    difference,
    regret,
    reliability,
    spearman,
    tau,
    tau_without_ties,
)
from nas.fidelity.card import Compared, agreement_row, card, difference_row, reliability_facts
from nas.fidelity.choose import pool_of, spread_out
from nas.fidelity.rows import Table, most_frequent
from nas.fidelity.scoring import score_row, value_of
from nas.fidelity.truth import Samples, checked, long_run, settings_key

__all__ = [
    "BAND",
    "Compared",
    "Interval",
    "Reliability",
    "Samples",
    "Table",
    "Truth",
    "agreement_row",
    "card",
    "checked",
    "chosen_fairly",
    "difference",
    "difference_row",
    "long_run",
    "most_frequent",
    "pool_of",
    "regret",
    "reliability",
    "reliability_facts",
    "score_row",
    "settings_key",
    "spearman",
    "spread_out",
    "tau",
    "tau_without_ties",
    "value_of",
]
