"""What a whole space costs, and which choices move it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nas.pricing import Pricer
from nas.profile import profile_space
from nas.profile.space import effects
from nas.profile.space_page import log_ticks
from nas.space import load_space


@pytest.fixture(scope="module")
def space():
    return load_space("snapgen_unet").at_resolution(64)


@pytest.fixture(scope="module")
def whole(space):
    return profile_space(space, n=24, seed=1)


def test_quantiles_are_those_of_the_sample(whole, space):
    prices = Pricer(space).rows(space.sample(24, 1))
    assert whole.costs["macs"].tolist() == prices.macs.tolist()
    assert whole.quantiles.loc[0.5, "params"] == np.median(prices.params)
    assert whole.sampled == 24
    assert "step_ms" not in whole.quantiles


def test_effects_of_a_cost_that_is_known(space):
    """A cost that is a product of two choices has exactly those effects; an inactive choice is not counted."""
    rows = space.sample(1500, 3)
    width, depth = space.column["width_0"], space.column["depth_1"]
    cost = pd.DataFrame({"macs": 2.0 ** rows[:, width]})
    found = effects(space, rows, cost).set_index(["choice", "value"])["macs"]
    values = space.choice("width_0").values
    ratios = [found["width_0", v] for v in values]
    np.testing.assert_allclose(ratios, 2.0 ** (np.arange(len(values)) - np.mean(np.arange(len(values)))))
    off = effects(space, rows, cost).set_index("choice").loc["self_attention_1", "candidates"].sum()
    assert off == (rows[:, depth] > 0).sum()


def test_importance_is_sorted(whole):
    ranked = whole.importance("macs")
    assert (np.diff(ranked) <= 0).all()
    assert (ranked >= 1).all()
    assert set(ranked.index) == set(whole.effects["choice"])


def test_log_ticks_are_written_out():
    assert log_ticks(90, 1100) == {
        "tickvals": [100.0, 200.0, 500.0, 1000.0],
        "ticktext": ["100", "200", "500", "1,000"],
    }
