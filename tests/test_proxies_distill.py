"""Short distillation as a proxy, with an untrained teacher."""

from __future__ import annotations

import json
import math
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from proxy_case import SETTINGS
from tiny_lesson import candidate
from torch import Tensor

from nas.bench import run
from nas.diffusion import FlowDenoiser
from nas.quality import score as scored
from nas.targets import Cached


def test_score_is_the_median_of_its_seeds_and_repeats(teacher: str) -> None:
    settings = replace(SETTINGS, seeds=(0, 1, 2))
    found = scored(candidate(), teacher, settings)
    again = scored(candidate(), teacher, settings)
    assert found.seeds == again.seeds
    assert len(set(found.seeds)) == 3
    assert found.value == sorted(found.seeds)[1]
    mean = sum(found.seeds) / 3
    assert found.value_sd == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in found.seeds) / 2))
    assert found.text is not None
    assert found.params > 0
    assert scored(candidate(), teacher, replace(SETTINGS, seeds=(1,))).seeds == found.seeds[1:2]
    assert scored(candidate(), teacher, replace(SETTINGS, seeds=(1,))).value_sd == 0


def test_more_steps_learn_more(teacher: str) -> None:
    short = scored(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
    longer = scored(candidate(), teacher, replace(SETTINGS, seeds=(0,), steps=40))
    assert longer.value > short.value + 0.5


def test_a_seed_changes_only_the_initialisation(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, int]] = []
    plain = run.train

    def spy(fresh: FlowDenoiser, data: Cached, objectives: object, schedule: object, **rest: object) -> object:
        weights = next(fresh.parameters()).detach()
        seen.append((data.batch(1).x, int(weights.sum().mul(1e6))))
        return plain(fresh, data, objectives, schedule, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "train", spy)
    scored(candidate(), teacher, SETTINGS)
    scored(candidate(conv_0="separable-1"), teacher, SETTINGS)
    assert len(seen) == 4
    assert all(torch.equal(x, seen[0][0]) for x, _ in seen)
    assert seen[0][1] != seen[1][1]


def test_text_weight_asks_for_both_answers(teacher: str) -> None:
    settings = replace(SETTINGS, seeds=(0,), text_weight=1.0)
    assert len(settings.objectives) == 2
    with_text = scored(candidate(), teacher, settings)
    assert with_text.value != scored(candidate(), teacher, replace(SETTINGS, seeds=(0,))).value


def test_score_leaves_the_thread_count_alone(teacher: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        scored(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_score_in_worker_processes_is_the_same(teacher: str, cache: Path) -> None:
    settings = replace(SETTINGS, seeds=(0,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(scored, candidate(), teacher, settings) for _ in range(2)]
        found = [job.result().value for job in jobs]
    assert found == [scored(candidate(), teacher, settings).value] * 2


def test_quality_and_settings_travel(teacher: str) -> None:
    found = scored(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
    assert pickle.loads(pickle.dumps(found)) == found
    assert json.loads(json.dumps(asdict(SETTINGS)))["seeds"] == [0, 1]
