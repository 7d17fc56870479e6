"""What a sampler may choose from: only what fits, drawn, grown where little fits, and never twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from nas.evaluate import pool
from nas.pricing import Pricer
from nas.space import load_space
from tests.toy_space import TOML, write_space

LARGER = {
    "width_0 = [64, 128]": "width_0 = [64, 128, 192]",
    "width_1 = [64, 128, 192]": "width_1 = [64, 128, 192, 256]",
    "resnets_0 = [1, 2]": "resnets_0 = [1, 2, 3]",
    "depth_1 = [0, 1]": "depth_1 = [0, 1, 2]",
}


@pytest.fixture(scope="module")
def pricer(tmp_path_factory):
    """Of a toy space of some 200 candidates."""
    text = TOML
    for old, new in LARGER.items():
        assert old in text
        text = text.replace(old, new)
    return Pricer(load_space(write_space(tmp_path_factory.mktemp("space"), text=text)))


@dataclass(frozen=True)
class AtMost:
    """A constraint on parameters, and an axis of mega-parameters."""

    most: float
    name: str = "few parameters"

    def values(self, prices):
        return prices.params

    def expected_ms(self, prices):
        return prices.params / 1e6


def distinct(rows):
    return len({tuple(row) for row in rows})


def test_a_large_space_gives_as_many_as_are_wanted_all_of_which_fit(pricer):
    params = pricer.rows(pricer.space.sample(1_000, 1)).params
    limit = AtMost(float(np.quantile(params, 0.5)))
    assert pricer.space.size > 2 * 60
    rows, ms, features = pool.drawn(pricer, limit, [limit], 60, 0, rows_of(pricer, 1)[0])
    assert len(rows) == len(ms) == len(features) == distinct(rows) == 60
    prices = pricer.rows(rows)
    assert prices.params.max() <= limit.most
    assert np.array_equal(ms, prices.params / 1e6)
    assert pricer.space.allowed(rows).all()
    assert np.array_equal(pricer.space.canonical(rows), rows)
    again = pool.drawn(pricer, limit, [limit], 60, 0, rows_of(pricer, 1)[0])
    assert np.array_equal(again[0], rows)
    assert not np.array_equal(pool.drawn(pricer, limit, [limit], 60, 1, rows[0])[0], rows)


def test_a_space_of_few_candidates_among_many_combinations_is_listed(pricer):
    space, count = pricer.space, pricer.space.count
    n = count // 2 + 1
    assert count <= 2 * n < space.size
    rows, _, _ = pool.drawn(pricer, AtMost(np.inf), [AtMost(np.inf)], n, 0, rows_of(pricer, 1)[0])
    assert len(rows) == distinct(rows) == count


def rows_of(pricer, n):
    """The smallest of a few."""
    rows = pricer.space.sample(2_000, 0)
    return rows[np.argsort(pricer.rows(rows).params, kind="stable")[:n]]


def test_where_nothing_drawn_fits_the_pool_is_grown_from_the_row_that_does(pricer):
    smallest = rows_of(pricer, 12)
    limit = AtMost(float(pricer.rows(smallest).params.max()))
    everything = pricer.space.sample(1_000, 0)
    fitting = {tuple(row) for row in everything[pricer.rows(everything).params <= limit.most]}
    seed = next(seed for seed in range(1000) if not {tuple(r) for r in pricer.space.sample(20, seed)} & fitting)
    rows, _, _ = pool.drawn(pricer, limit, [limit], 20, seed, smallest[0])
    assert len(rows) == distinct(rows)
    assert tuple(smallest[0]) in {tuple(row) for row in rows}
    assert {tuple(row) for row in rows} <= fitting
    assert len(rows) > len(fitting) / 2


def test_neighbours_differ_in_one_choice_or_two_and_are_new(pricer):
    limit = AtMost(np.inf)
    given = rows_of(pricer, 3)
    rows, _, _ = pool.neighbours(pricer, limit, [limit], given, 0)
    assert len(rows) == distinct(rows)
    assert not {tuple(row) for row in rows} & {tuple(row) for row in given}
    sizes = [len(choice.values) for choice in pricer.space.choices]
    single = {
        tuple(row)
        for each in given
        for column, size in enumerate(sizes)
        for value in range(size)
        for row in pricer.space.canonical(np.where(np.arange(len(sizes)) == column, value, each)[None])
        if pricer.space.allowed(row[None])[0]
    } - {tuple(row) for row in given}
    assert single < {tuple(row) for row in rows}
    strict = AtMost(float(np.median(pricer.rows(rows).params)))
    fewer, _, _ = pool.neighbours(pricer, strict, [strict], given, 0)
    assert 0 < len(fewer) < len(rows)
    assert pricer.rows(fewer).params.max() <= strict.most


def test_no_rows_have_no_neighbours(pricer):
    none = np.empty((0, len(pricer.space.choices)), dtype=np.int64)
    rows, ms, features = pool.neighbours(pricer, AtMost(1.0), [AtMost(1.0)], none, 0)
    assert (rows.shape, ms.shape, len(features)) == (none.shape, (0,), 0)


def test_what_a_surrogate_reads_is_of_the_network_alone(pricer):
    row = np.array([pricer.space.reference("known").row])
    fp16 = Pricer(pricer.space, "fp16").rows(row)
    own = pool.readable(pricer.rows(row))[0]
    assert own[0] == pytest.approx(np.log2(fp16.params[0]))
    assert own[1] == pytest.approx(np.log2(fp16.macs[0]))
    assert own[3] == pytest.approx(np.log2(fp16.peak_activation_bytes[0]) + 1)
    kept = [0, 1, 2, *range(4, len(own))]
    assert np.allclose(pool.readable(fp16)[0][kept], own[kept])
