"""The importance of the choices, on trials where it is known what decides."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nas.importance import importances
from nas.space import load_space


@pytest.fixture(scope="module")
def space():
    return load_space("snapgen_unet")


def frame(space, n, quality, latency_ms, seed=0):
    """Trials of `n` random candidates whose quality and latency are functions of the rows."""
    rows = space.sample(n, seed)
    candidates = [space.from_row(row) for row in rows]
    found = pd.DataFrame(
        {
            "number": range(n),
            "key": [c.key for c in candidates],
            "state": "proxied",
            "quality": quality(rows),
            "latency_ms": latency_ms(rows),
        }
    )
    for choice in space.choices:
        found[f"choice.{choice.name}"] = [c.choices.get(choice.name) for c in candidates]
    return found


def column(space, name):
    return lambda rows: rows[:, space.column[name]].astype(float)


def test_what_decides_has_the_largest_share_and_the_rest_is_chance(space):
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    trials = frame(space, 100, lambda r: column(space, "width_0")(r) + noise, column(space, "depth_2"))
    found = importances(trials, space)
    assert (found["scored"], found["priced"]) == (100, 100)
    for objective, decides in (("quality", "width_0"), ("latency", "depth_2")):
        shares = {name: each["share"] for name, each in found[objective].items()}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert max(shares, key=shares.get) == decides
        assert shares[decides] > 0.5
        assert shares[decides] > 5 * found[objective][decides]["chance"]
    above = [name for name, each in found["quality"].items() if each["share"] > each["chance"]]
    assert "width_0" in above
    assert len(above) <= 6


def test_noise_is_told_as_no_more_than_chance(space):
    noise = np.random.default_rng(1).normal(size=80)
    found = importances(frame(space, 80, lambda r: noise, column(space, "width_1")), space)
    above = [name for name, each in found["quality"].items() if each["share"] > each["chance"]]
    assert len(above) <= len(space.choices) // 4


def test_latency_s_own_figures_come_from_priced_rows_where_they_are_given(space):
    trials = frame(space, 40, column(space, "width_0"), column(space, "width_0"))
    rows = space.sample(60, 5)
    found = importances(trials, space, priced=(rows, column(space, "ffn_ratio")(rows)))
    assert found["priced"] == 60
    shares = {name: each["share"] for name, each in found["latency"].items()}
    assert max(shares, key=shares.get) == "ffn_ratio"


def test_the_same_trials_give_the_same_figures_and_repeats_and_failures_do_not_count(space):
    trials = frame(space, 40, column(space, "width_0"), column(space, "width_0"))
    more = pd.concat(
        [trials, trials.iloc[:5].assign(state="duplicate"), trials.iloc[:1].assign(state="failed", key="f")]
    )
    assert importances(trials, space) == importances(more, space)


def test_too_few_candidates_or_equal_scores_tell_nothing(space):
    few = importances(frame(space, 19, column(space, "width_0"), column(space, "width_0")), space)
    assert (few["quality"], few["latency"], few["scored"]) == ({}, {}, 19)
    level = importances(frame(space, 30, lambda r: np.ones(len(r)), column(space, "width_0")), space)
    assert level["quality"] == {}
    assert level["latency"]
