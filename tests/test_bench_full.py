"""The bench at full size: a tiny published teacher, latents from disk, candidates as they are."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import latents_case
import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor, nn

from nas import proxies, targets
from nas.batches import Batch
from nas.bench import Bench, FullBench, ProxySettings, bench_of, distilled, nothing, stored
from nas.bench import run as running
from nas.cache import TargetSettings, cache_targets
from nas.diffusion import FLOW, Conditioning, NativeDenoiser
from nas.errors import NasError, UsageError
from nas.space import Candidate, load_space
from nas.teachers import load_teacher

SPACE = """
family = "unet"
summary = "a toy of Stable Diffusion's shape"
sources = ["made for tests"]
[input]
latent_channels = 4
latent_height = 8
latent_width = 8
pixels_per_latent = 2
text_tokens = 8
text_width = 16
[fixed]
stages = 2
downscale = 2
head_width = 8
norm_groups = 4
width_1 = 16
resnets_0 = 1
resnets_1 = 1
depth_0 = 0
depth_1 = 1
self_attention_0 = false
self_attention_1 = true
conv_0 = "full"
conv_1 = "full"
attention = "mqa"
qk_norm = "none"
ffn_ratio = 2
[choices]
width_0 = [8, 16]
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("teacher")
    tiny.unet().save_pretrained(folder)
    DDPMScheduler(clip_sample=False, steps_offset=1, **tiny.SCALED_LINEAR).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(latents_case, "SHAPE", (4, 8, 8))
    monkeypatch.setattr(latents_case, "TOKENS", (tiny.TOKENS, tiny.TEXT_WIDTH))
    latents_case.write(tmp_path / "data", rows=24, shard_rows=10)
    return str(tmp_path / "data")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    targets._load.cache_clear()
    yield tmp_path / "cache"
    targets._load.cache_clear()


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    (tmp_path / "toy.toml").write_text(SPACE)
    return load_space(str(tmp_path / "toy.toml")).candidate(width_0=8)


def settings(data: str, **changes: Any) -> ProxySettings:
    return ProxySettings(
        **{"task": "latents", "data": data, "steps": 3, "batch": 4, "held_rows": 10, "lr": 1e-3, **changes}
    )


def same(one: Batch, other: Batch) -> bool:
    parts = zip(one.text.parts(), other.text.parts(), strict=True)
    return torch.equal(one.point()[0], other.point()[0]) and all(torch.equal(a, b) for (_, a), (_, b) in parts)


def test_the_task_chooses_the_bench(teacher: str, data: str) -> None:
    assert type(bench_of("embedded", ProxySettings())) is Bench
    made = bench_of(teacher, settings(data))
    assert type(made) is FullBench
    assert pickle.loads(pickle.dumps(made)) == made
    assert type(pickle.loads(pickle.dumps(made))) is FullBench
    with pytest.raises(UsageError, match="knows no device 'gpu'"):
        bench_of(teacher, settings(data), "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(NasError, match="0 CUDA devices"):
            bench_of(teacher, settings(data), "cuda")


def test_a_candidate_is_trained_at_its_full_size_with_the_teachers_schedule(
    teacher: str, data: str, candidate: Candidate
) -> None:
    made = bench_of(teacher, settings(data, steps=16, lr=5e-3))
    spec = made.spec(candidate)
    assert spec.blocks[0].setting("out_channels") == 8
    fresh = made.student(spec, 0)
    assert isinstance(fresh, NativeDenoiser)
    assert fresh.schedule.prediction == "noise"
    before = made.judge(fresh.eval())
    _, found, curve = distilled(fresh, made)
    assert found.quality_db > before.quality_db + 0.3
    assert curve[-1].step == 16
    # A network of zeros adds nothing, which is 0 dB by definition.
    for name, parameter in fresh.named_parameters():
        if "conv_out" in name:
            nn.init.zeros_(parameter)
    silent = made.judge(fresh.eval())
    assert silent.quality_db == pytest.approx(0, abs=1e-4)
    assert silent.text_error == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["distill", "params"])
def test_proxies_take_it_as_it_is(name: str, teacher: str, data: str, candidate: Candidate) -> None:
    made = bench_of(teacher, settings(data, proxy=name))
    one, again = (proxies.proxy(name).score(candidate, made) for _ in range(2))
    assert math.isfinite(one.value)
    assert one.value == again.value


def test_held_out_rows_are_no_training_rows_and_answered_once(teacher: str, data: str, cache: Path) -> None:
    made, done = bench_of(teacher, settings(data)), []
    made.prepare(lambda *each: done.append(each))
    assert done == [(8, 10), (10, 10)]
    bench_of(teacher, settings(data)).prepare(lambda *each: done.append(each))
    assert len(done) == 2
    assert len(list((cache / "targets").glob("*.rows"))) == 1
    captions = [tuple(row) for row in made.held.batch(slice(0, 10)).text.tokens[:, 0, :3].tolist()]
    trained = {tuple(row) for step in range(7) for row in made.data.batch(step).text.tokens[:, 0, :3].tolist()}
    assert len(set(captions)) == 10
    assert len(trained) == 14  # a pass over all others, and none of these
    assert not trained & set(captions)
    # Fewer held-out rows are the first of more.
    fewer = bench_of(teacher, settings(data, held_rows=4)).held
    assert same(fewer.batch(slice(0, 4)), made.held.batch(slice(0, 4)))


def test_held_out_answers_are_the_teachers(teacher: str, data: str) -> None:
    batch = bench_of(teacher, settings(data)).held.batch(slice(2, 7))
    asked = load_teacher(teacher)
    x, t = batch.point()
    assert batch.teacher is not None
    assert batch.teacher.null_velocity is not None
    assert len(x) == 5
    with torch.no_grad():
        said = asked.velocity(x, t, batch.text)
        null = asked.velocity(x, t, batch.null_text.like(batch.text))
    torch.testing.assert_close(batch.teacher.velocity, said, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.teacher.null_velocity, null, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(said, null, atol=1e-2)


def test_answers_that_lie_with_the_data_are_taken(
    teacher: str, data: str, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = bench_of(teacher, settings(data))
    assert live.asked is not None
    assert live.data.batch(0).teacher is None
    cache_targets(Path(data), TargetSettings(teacher=teacher))
    made = bench_of(teacher, settings(data))
    assert made.asked is None
    assert made.digest != live.digest
    asked: list[int] = []
    plain = NativeDenoiser.velocity

    def spy(self: NativeDenoiser, *given: Any) -> Tensor:
        asked.append(id(self))
        return plain(self, *given)

    student = made.student(made.spec(candidate), 0)
    monkeypatch.setattr(NativeDenoiser, "velocity", spy)
    _, found, _ = distilled(student, made)
    assert math.isfinite(found.quality_db)
    assert id(made._loaded) not in asked  # type: ignore[attr-defined]
    batch = made.held.batch(slice(0, 4))
    with torch.no_grad():
        said = load_teacher(teacher).velocity(*batch.point(), batch.text)
    assert batch.teacher is not None
    torch.testing.assert_close(batch.teacher.velocity, said, rtol=2e-2, atol=2e-2)


def test_bf16_is_the_teachers_too_and_its_answers_are_of_their_own(teacher: str, data: str, cache: Path) -> None:
    whole, half = (bench_of(teacher, settings(data, precision=each)) for each in ("fp32", "bf16"))
    assert next(half.asked.parameters()).dtype == torch.bfloat16
    assert next(whole.asked.parameters()).dtype == torch.float32
    one, other = (each.held.batch(slice(0, 8)).teacher for each in (whole, half))
    assert len(list((cache / "targets").glob("*.rows"))) == 2
    assert one is not None
    assert other is not None
    assert not torch.equal(one.velocity, other.velocity)
    torch.testing.assert_close(one.velocity, other.velocity, rtol=0.1, atol=0.3)


def test_what_does_not_fit_is_refused(teacher: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(NasError, match="24 rows; 21 held-out ones and a batch of 4 need 25"):
        bench_of(teacher, settings(data, held_rows=21)).prepare()
    with pytest.raises(UsageError, match="needs a folder"):
        bench_of(teacher, replace(settings(data), data=None)).prepare()
    with pytest.raises(NasError, match="draws pictures of its own task"):
        bench_of("embedded", settings(data)).prepare()
    with pytest.raises(NasError, match="has latents"):
        _ = bench_of(teacher, settings(data)).lesson
    (tmp_path / "other.toml").write_text(SPACE.replace("latent_height = 8", "latent_height = 16"))
    wide = load_space(str(tmp_path / "other.toml")).candidate(width_0=8)
    with pytest.raises(NasError, match="latent height 16 where the data has 8"):
        bench_of(teacher, settings(data)).spec(wide)


class Silent(nn.Module):
    def forward(self, sample: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(sample)


def test_nothing_is_what_a_network_of_zeros_says(teacher: str) -> None:
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.8])
    text = Conditioning(tokens=torch.zeros(3, 2, 4))
    silent = NativeDenoiser(Silent(), load_teacher(teacher).schedule, lambda network, sample, *_: network(sample))
    torch.testing.assert_close(nothing(silent, x, t, text), silent.velocity(x, t, text))
    # Of predicted noise 0: x0 = x / (1 - t), between the levels of the schedule to their precision.
    torch.testing.assert_close(nothing(silent, x, t, text), -x / (1 - t).view(-1, 1, 1, 1), rtol=1e-3, atol=1e-3)
    flow = NativeDenoiser(nn.Linear(1, 1), FLOW)
    assert torch.equal(nothing(flow, x, t, text), torch.zeros_like(x))


def test_out_of_memory_names_the_batch_that_fits(
    teacher: str, data: str, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain, tried, room = bench_of(teacher, settings(data)), running.train, [], {"rows": 0}

    def scarce(fresh: Any, batches: Any, objectives: Any, schedule: Any, **rest: Any) -> Any:
        tried.append(schedule.batch)
        if schedule.batch > room["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert len(batches.batch(0)) == schedule.batch
        return plain(fresh, batches, objectives, schedule, **rest)

    monkeypatch.setattr(running, "train", scarce)
    for most, words in ((1, "a batch of 1 fits"), (0, "not even a batch of 1 fits")):
        tried.clear()
        room["rows"] = most
        with pytest.raises(NasError, match=f"out of memory on cpu with a batch of 4; {words}"):
            distilled(made.student(made.spec(candidate), 0), made)
        assert tried == [4, 2, 1]


def test_one_teacher_is_kept_for_all_candidates(teacher: str, data: str) -> None:
    stored._load_teacher.cache_clear()
    first, second = (bench_of(teacher, settings(data)).asked for _ in range(2))
    assert first is second
