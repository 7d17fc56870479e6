"""Inheriting from a parent: which parent, what of it, and that it is trained once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_lesson import write_teacher
from tiny_space import write_space

from nas.bench import Bench, ProxySettings, distilled, one_thread
from nas.proxies import _shared, inherit
from nas.proxies._shared import largest
from nas.space import SearchSpace

SETTINGS = ProxySettings(
    proxy="inherit", width_divisor=32, norm_groups=2, steps=0, shared_steps=24, batch=4, held_rows=16, lr=3e-3
)

pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def bench(teacher: str) -> Bench:
    return Bench(teacher, SETTINGS)


def test_the_largest_candidate_scores_as_its_parent(space: SearchSpace, bench: Bench) -> None:
    chosen = largest(space, bench)
    found = inherit.score(chosen, bench)
    with one_thread():
        fresh = bench.student(bench.spec(chosen), 0)
        _, parent, _ = distilled(fresh, replace(bench, settings=_shared.training(bench)))
    assert found.value == pytest.approx(parent.quality_db, abs=1e-4)
    assert found.text == pytest.approx(parent.text_db, abs=1e-4)
    assert inherit.inherited_share(chosen, bench) == 1.0


def test_what_a_smaller_candidate_inherits_helps_it(space: SearchSpace, bench: Bench) -> None:
    values = {**largest(space, bench).choices, "depth_2": 1}
    alike, other = (space.candidate(**{**values, "conv_1": kind}) for kind in ("full", "separable-2"))
    shares = [inherit.inherited_share(each, bench) for each in (alike, other)]
    assert shares[0] == 1.0
    assert 0.3 < shares[1] < 1.0
    found, again = inherit.score(alike, bench), inherit.score(alike, bench)
    with one_thread():
        untrained = bench.judge(bench.student(bench.spec(alike), 0).eval())
    assert found.value > untrained.quality_db + 0.5
    assert (found.value, found.text) == (again.value, again.text)
    longer = inherit.score(alike, replace(bench, settings=replace(SETTINGS, steps=4)))
    assert longer.curve[-1].step == 4
    assert longer.value != found.value


def test_a_killed_run_ends_in_the_same_bits(space: SearchSpace, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherit, "CHECKPOINT_EVERY", 2)
    short = replace(bench, settings=replace(SETTINGS, shared_steps=6))
    path, said = inherit.parent_path(space, short, 0), []
    inherit.prepare(space, short, lambda done, total: said.append((done, total)))
    assert said == [(step, 6) for step in range(1, 7)]
    whole = inherit.load_network(path).state_dict()
    path.unlink()
    said.clear()

    def killed(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inherit.prepare(space, short, killed)
    assert not path.exists()
    inherit.prepare(space, short, lambda done, total: said.append((done, total)))
    assert said[-2:] == [(5, 6), (6, 6)]
    assert (1, 6) not in said
    resumed = inherit.load_network(path).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not path.with_suffix(".partial").exists()
    inherit.prepare(space, short, lambda done, total: pytest.fail("trained twice"))


def test_every_seed_has_a_parent_of_its_own(space: SearchSpace, bench: Bench) -> None:
    both = replace(bench, settings=replace(SETTINGS, shared_steps=2, seeds=(0, 1)))
    said: list[tuple[int, int]] = []
    found = inherit.score(largest(space, both), both)
    assert len(set(found.seeds)) == 2
    assert found.value_sd > 0
    one, other = (inherit.load_network(inherit.parent_path(space, both, seed)).state_dict() for seed in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    inherit.parent_path(space, both, 1).unlink()
    inherit.prepare(space, both, lambda done, total: said.append((done, total)))
    assert said == [(3, 4), (4, 4)]


def test_another_teacher_or_space_is_another_file(space: SearchSpace, bench: Bench, tmp_path: Path) -> None:
    paths = {
        inherit.parent_path(space, bench, 0),
        inherit.parent_path(space, Bench(write_teacher(tmp_path, seed=1), SETTINGS), 0),
        inherit.parent_path(write_space(tmp_path, depth_2=[1]), bench, 0),
        inherit.parent_path(space, replace(bench, settings=replace(SETTINGS, shared_steps=3)), 0),
    }
    assert len(paths) == 4
