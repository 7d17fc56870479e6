"""The timing loop against a clock of our own."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from nas.measure.timing import Samples, describe, time_group
from tests.measure_cases import QUICK, World


@pytest.fixture
def world() -> World:
    return World()


def test_each_sample_is_one_subjects_own_time(world: World) -> None:
    runs = {"a": world.subject("a", lambda n: 3.0, waiting=2.0), "b": world.subject("b", lambda n: 50.0)}
    samples = time_group(runs, protocol=QUICK, seed=0, clocks=world.clocks)
    assert samples["a"].cpu_ms == pytest.approx([3.0] * 7)
    assert samples["a"].wall_ms == pytest.approx([6.0] * 7)
    assert samples["b"].cpu_ms == pytest.approx([50.0] * 7)
    assert samples["a"].contention == pytest.approx(2.0)
    assert samples["b"].contention == pytest.approx(1.0)


def test_repeats_are_interleaved_and_reordered(world: World) -> None:
    runs = {name: world.subject(name, lambda n: 5.0) for name in "abcd"}
    time_group(runs, protocol=QUICK, seed=0, clocks=world.clocks)
    timed = world.calls[-4 * QUICK.repeats :]
    rounds = [tuple(timed[i : i + 4]) for i in range(0, len(timed), 4)]
    assert all(sorted(once) == list("abcd") for once in rounds)
    assert len(set(rounds)) > 1


def test_warm_up_goes_on_until_stable_and_is_not_kept(world: World) -> None:
    warm = [90.0, 60.0, 30.0]
    run = world.subject("a", lambda n: warm[n] if n < len(warm) else 10.0)
    samples = time_group({"a": run}, protocol=QUICK, seed=0, clocks=world.clocks)
    assert set(np.round(samples["a"].cpu_ms, 6)) == {10.0}
    # Three slow calls, the first fast one, and two near it; then the repeats.
    assert len(world.calls) == 6 + QUICK.repeats


def test_warm_up_of_an_unstable_subject_ends(world: World) -> None:
    run = world.subject("a", lambda n: 10.0 * (1 + n % 2))
    time_group({"a": run}, protocol=QUICK, seed=0, clocks=world.clocks)
    assert len(world.calls) == QUICK.most_warm_up + QUICK.repeats


def test_a_tiny_subject_is_called_often_per_sample(world: World) -> None:
    run = world.subject("a", lambda n: 0.3)
    samples = time_group({"a": run}, protocol=QUICK, seed=0, clocks=world.clocks)
    assert samples["a"].cpu_ms == pytest.approx([0.3] * 7)
    assert len(world.calls) == 3 + 7 * 4


def test_a_quick_subject_is_sampled_more_often(world: World) -> None:
    protocol = replace(QUICK, round_ms=20.0, most_per_round=3)
    runs = {"quick": world.subject("quick", lambda n: 5.0), "slow": world.subject("slow", lambda n: 15.0)}
    samples = time_group(runs, protocol=protocol, seed=0, clocks=world.clocks)
    assert len(samples["quick"].cpu_ms) == 21
    assert len(samples["slow"].cpu_ms) == 7


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_collection_is_off_while_timing(world: World, collecting: bool) -> None:
    seen = []
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        run = world.subject("a", lambda n: seen.append(gc.isenabled()) or 5.0)  # type: ignore[func-returns-value]
        time_group({"a": run}, protocol=QUICK, seed=0, clocks=world.clocks)
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert not any(seen)


def test_statistics() -> None:
    samples = Samples(wall_ms=(9.0, 5.0, 7.0), cpu_ms=(4.0, 3.0, 6.0))
    assert samples.latency("min_cpu") == 3.0
    assert samples.latency("min_wall") == 5.0
    assert samples.latency("median_wall") == 7.0
    assert "min_cpu" in describe(QUICK, "min_cpu")
