"""The end-to-end check of benchmarks/front_stays.py: which networks are compared, and what is concluded."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import front_stays

TRIALS = pd.DataFrame(
    [
        # key, latency, quality: a, c, e and g are the front; b, d and f lie under it.
        ("a", 100.0, 1.0),
        ("b", 110.0, 0.9),
        ("c", 120.0, 2.0),
        ("d", 150.0, 1.5),
        ("e", 160.0, 3.0),
        ("f", 170.0, 1.0),
        ("g", 200.0, 3.5),
    ],
    columns=["key", "latency_ms", "quality"],
).assign(state="proxied", feasible=True)


def test_each_member_is_paired_with_the_nearest_that_it_dominates() -> None:
    assert front_stays.pairs(TRIALS, 9) == [("a", "b"), ("c", "d"), ("e", "f")]  # nothing is left under g
    assert front_stays.pairs(TRIALS, 2) == [("a", "b"), ("e", "f")]
    over = TRIALS.assign(feasible=TRIALS["key"] != "d")
    assert front_stays.pairs(over, 9) == [("a", "b"), ("c", "f")]


def test_the_verdict_counts_pairs_and_the_new_front() -> None:
    chosen = [("a", "b"), ("c", "d")]
    long_db = {"a": 2.0, "b": 1.0, "c": 2.5, "d": 3.0}
    rows = pd.DataFrame(
        [
            {"key": key, "quality_db": str(value), "text_db": "0.5", "latency_ms": str(latency)}
            for (key, value), latency in zip(long_db.items(), (100, 110, 120, 150), strict=True)
        ]
    )
    found = front_stays.compared(rows, chosen)
    assert [pair["stays_ahead"] for pair in found["pairs"]] == [True, False]
    assert (found["stay_ahead"], found["of"]) == (1, 2)
    assert sorted(found["front_after"]) == ["a", "c", "d"]
    assert (found["front_members_still_on_it"], found["dominated_now_on_it"]) == (2, 1)
