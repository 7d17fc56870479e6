"""nas.fidelity.agreement against scipy, by hand, and on planted data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nas.fidelity import (
    Truth,
    agreement,
    chosen_fairly,
    difference,
    regret,
    reliability,
    spearman,
    tau,
    tau_without_ties,
)
from nas.fidelity.agreement import kendall


def once(values, latency=None, groups=None, seed=0) -> Truth:
    """Candidates that were trained once, all equally fast unless said."""
    return Truth(
        runs=tuple((float(value),) for value in values),
        latency_ms=np.full(len(values), 100.0) if latency is None else np.array(latency, dtype=float),
        groups=None if groups is None else np.array(groups),
        seed=seed,
    )


@pytest.fixture
def tied() -> tuple[np.ndarray, np.ndarray]:
    """A score and a truth with ties in both."""
    generator = np.random.default_rng(5)
    truth = generator.integers(0, 12, 30).astype(float)
    return np.round(truth + generator.normal(0, 3, 30)), truth


def test_tau_and_spearman_are_those_of_scipy(tied):
    score, values = tied
    assert len(set(score)) < 25
    truth = once(values)
    assert tau(score, truth).value == pytest.approx(stats.kendalltau(score, values).statistic, abs=1e-12)
    assert spearman(score, truth).value == pytest.approx(stats.spearmanr(score, values).statistic, abs=1e-12)


def test_a_resample_is_scored_as_if_it_were_drawn(tied, monkeypatch):
    monkeypatch.setattr(agreement, "_RESAMPLES", 100)
    score, values = tied
    truth = once(values)
    assert truth.draws.sum(1) == pytest.approx(len(values))
    index = [np.repeat(np.arange(len(values)), row.astype(int)) for row in truth.draws]
    taus = [stats.kendalltau(score[i], values[i]).statistic for i in index[:20]]
    assert kendall(score, values, truth.same_group, truth.draws[:20]) == pytest.approx(taus, abs=1e-12)
    ends = np.quantile([stats.spearmanr(score[i], values[i]).statistic for i in index], [0.05, 0.95])
    found = spearman(score, truth)
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-12)


def test_within_a_band_only_neighbours_in_latency_count():
    # 100 and 110 are neighbours, 200 and 225 too (the ratio is below 1.15); 230 and 265 (1.152) are not.
    truth = once([1, 2, 3, 4, 5, 6], [100, 110, 200, 225, 265, 700])
    assert np.argwhere(np.triu(truth.same_band)).tolist() == [[0, 1], [2, 3]]
    right, one_wrong = [1, 2, 3, 4, 0, 0], [1, 2, 4, 3, 5, 6]
    assert tau(right, truth, band=True).value == 1
    assert tau(right, truth).value < 0.5
    assert tau(one_wrong, truth, band=True).value == 0
    assert tau(one_wrong, truth).value == pytest.approx(13 / 15)


def test_candidates_of_two_spaces_are_not_compared():
    # Within each group the score is wrong everywhere; between the groups it is right.
    values, score, groups = [1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11], ["a"] * 3 + ["b"] * 3
    assert tau(score, once(values)).value > 0
    apart = once(values, groups=groups)
    assert tau(score, apart).value == -1
    assert spearman(score, apart).value == -1
    assert (apart.draws[:, :3].sum(1) == 3).all()  # each group keeps its size in every resample
    assert regret(score, apart, top=1) == 2


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    generator = np.random.default_rng(2)
    values = generator.normal(size=48)
    truth = once(values, latency=np.exp(generator.uniform(4, 6, 48)))
    good, bad = values + generator.normal(0, 0.4, 48), values + generator.normal(0, 3, 48)
    same = values + generator.normal(0, 0.4, 48)
    for band in (False, True):
        planted = difference(good, bad, truth, band=band)
        assert planted.low > 0
        assert planted.excludes_zero
        null = difference(good, same, truth, band=band)
        assert null.low < 0 < null.high
        assert not null.excludes_zero
        wholes = [tau(each, truth, band=band).value for each in (good, bad)]
        assert planted.value == pytest.approx(wholes[0] - wholes[1])


def test_scores_that_err_alike_are_compared_on_equal_resamples():
    generator = np.random.default_rng(3)
    values = generator.normal(size=40)
    score = values + generator.normal(0, 1, 40)
    nearly = score + generator.normal(0, 0.05, 40)
    truth = once(values)
    one, gap = tau(score, truth), difference(score, nearly, truth)
    assert gap.high - gap.low < (one.high - one.low) / 3
    assert difference(score, score, truth).value == 0


def test_the_interval_holds_the_known_tau_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(agreement, "_RESAMPLES", 300)
    generator = np.random.default_rng(4)
    rho = 0.6
    known = 2 / math.pi * math.asin(rho)  # of a bivariate normal (Kendall and Gibbons 1990)
    held = []
    for seed in range(100):
        values = generator.normal(size=40)
        found = tau(rho * values + math.sqrt(1 - rho**2) * generator.normal(size=40), once(values, seed=seed))
        held.append(found.low <= known <= found.high)
    assert 0.8 <= np.mean(held) <= 0.98


def test_regret_by_hand():
    truth = once([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    assert regret([6, 5, 4, 3, 2, 1], truth) == 0
    assert regret([0, 1, 2, 3, 4, 5], truth) == 1  # the best five by score are 0.5 to 4
    assert regret([0, 1, 2, 3, 4, 5], truth, top=2) == 4
    assert regret([1, 1, 1, 1, 1, 1], truth, top=1) == 4.5  # equal scores count against the score
    assert regret([math.nan, 1, 2, 3, 4, 5], truth, top=5) == 1  # what failed is never chosen first


def test_a_missing_score_is_the_lowest():
    truth = once([1, 2, 3, 4])
    assert tau([math.nan, 2, 3, 4], truth).value == 1
    assert tau([1, 2, 3, math.nan], truth).value == 0
    assert tau([math.nan, math.nan, 3, 4], truth).value == pytest.approx(stats.kendalltau([0, 0, 3, 4], range(4))[0])


def test_nothing_is_said_where_nothing_can_be():
    level = tau([1, 1, 1, 1], once([1, 2, 3, 4]))
    assert all(math.isnan(each) for each in (level.value, level.low, level.high))
    assert not level.excludes_zero
    assert math.isnan(tau([1, 2, 3], once([1, 2, 3], [1, 10, 100]), band=True).value)
    # One candidate differs from all others: a third of the resamples lack it, and an interval of the rest would lie.
    lone = tau(range(12), once([0] * 11 + [1]))
    assert lone.value > 0
    assert math.isnan(lone.low)
    assert reliability(once([0] * 11 + [1])).ties == pytest.approx(55 / 66)


def test_ties_of_the_seeds_by_hand():
    runs = ((1.0, 1.2), (2.0, 2.4), (2.5,), (4.0,))
    truth = Truth(runs=runs, latency_ms=np.full(4, 10.0))
    sd = math.sqrt((0.02 + 0.08) / 2)
    assert truth.seed_sd == pytest.approx(sd)
    assert truth.values.tolist() == pytest.approx([1.1, 2.2, 2.5, 4.0])
    # 2.2 and 2.5 are 0.3 apart, less than two standard deviations (0.45): the one pair that the score gets wrong.
    score = [1, 3, 2, 4]
    assert tau(score, truth).value == pytest.approx(4 / 6)
    assert tau_without_ties(score, truth) == 1
    assert tau_without_ties(score, truth, band=True) == 1
    found = reliability(truth)
    assert found.ties == pytest.approx(1 / 6)
    assert found.twice == 2


def test_the_truth_is_no_more_reliable_than_its_seeds():
    generator = np.random.default_rng(6)
    clean = generator.normal(size=300)
    noisy = clean[:, None] + generator.normal(0, 0.5, (300, 2))
    found = reliability(Truth(runs=tuple(map(tuple, noisy)), latency_ms=np.exp(generator.uniform(3, 6, 300))))
    assert found.seed_sd == pytest.approx(0.5, rel=0.1)
    assert found.tau.value == pytest.approx(2 / math.pi * math.asin(1 / 1.25), abs=0.06)
    # The mean of two runs has variance 1 + 0.125, and agrees with the clean truth by its correlation.
    wanted = 2 / math.pi * math.asin(1 / math.sqrt(1.125))
    assert found.ceiling == pytest.approx(wanted, abs=0.04)
    assert found.ceiling_band == pytest.approx(wanted, abs=0.06)
    alone = reliability(once(clean))
    assert alone.twice == 0
    assert math.isnan(alone.ceiling)
    assert math.isnan(alone.tau.value)
    assert alone.ties == 0


def test_the_best_of_many_looks_better_than_it_is():
    generator = np.random.default_rng(7)
    values = generator.normal(size=40)
    noise = {str(i): generator.normal(size=40) for i in range(30)}
    here, there = chosen_fairly(noise, once(values), band=False)
    assert here > 0.25
    assert there < 0.12
    here, there = chosen_fairly({"a": values, **noise}, once(values), band=False)
    assert (here, there) == (1, 1)
