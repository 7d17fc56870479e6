"""The proxy and its cached targets with an untrained teacher: what is equal for all, scored and cached."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny_lesson import candidate, write_teacher
from torch import Tensor, nn

from nas import quality, targets
from nas.batches import Part
from nas.diffusion import Conditioning, FlowDenoiser, noised
from nas.errors import NasError
from nas.objectives import Outputs
from nas.quality import ProxySettings, fidelity_of, score, small_copy, student
from nas.targets import Cached, Fresh, Prompted, Rows, TargetSettings

SETTINGS = ProxySettings(width_divisor=32, norm_groups=2, steps=3, batch=4, held_rows=16, seeds=(0, 1))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NAS_CACHE", str(tmp_path))
    targets._load.cache_clear()
    yield tmp_path / "targets"
    targets._load.cache_clear()


def rows_of(teacher: str, settings: TargetSettings) -> tuple[Rows, Rows]:
    lesson = quality.embedded_lesson(teacher, "shapes")[1]
    return targets.cached_targets(quality.teacher_hash(teacher), lambda: lesson, settings)


# Targets


def test_targets_are_what_the_teacher_says(teacher: str, cache: Path) -> None:
    train, held = rows_of(teacher, TargetSettings(rows=8, held_rows=8))
    loaded, lesson = quality.embedded_lesson(teacher, "shapes")
    batch = held.batch(slice(0, 8))
    torch.testing.assert_close(
        batch.teacher.velocity, loaded.velocity(batch.x, batch.t, batch.text), rtol=2e-3, atol=2e-3
    )
    assert batch.null_text is not None
    assert batch.teacher.null_velocity is not None
    null = loaded.velocity(batch.x, batch.t, batch.null_text.expand(8))
    torch.testing.assert_close(batch.teacher.null_velocity, null, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.null_text.tokens, lesson.text([None]).tokens)
    assert len(train) == 8
    assert batch.x.dtype == torch.float32


def test_a_longer_cache_begins_with_a_shorter_ones_rows(teacher: str, cache: Path) -> None:
    short, held = rows_of(teacher, TargetSettings(rows=8, held_rows=4))
    long, more = rows_of(teacher, TargetSettings(rows=300, held_rows=8))
    assert torch.equal(long.x[:8], short.x)
    assert torch.equal(long.velocity[:8], short.velocity)
    assert torch.equal(more.x[:4], held.x)
    assert not torch.equal(long.x[256:264], long.x[:8])
    other, _ = rows_of(teacher, TargetSettings(rows=8, held_rows=4, seed=1))
    assert not torch.equal(other.x, short.x)


def test_half_of_the_held_out_rows_have_captions_nobody_trains_on(teacher: str, cache: Path) -> None:
    train, held = rows_of(teacher, TargetSettings(rows=256, held_rows=64))
    lesson = quality.embedded_lesson(teacher, "shapes")[1]
    task = lesson.task
    secret = lesson.text(task.captions("held-out")).tokens  # type: ignore[attr-defined]

    def is_secret(text: Tensor) -> Tensor:
        return torch.stack([(row - secret).abs().amax(dim=(1, 2)).min() < 1e-5 for row in text])

    assert not bool(is_secret(train.text).any())
    assert is_secret(held.text).tolist() == [True, False] * 32
    # Nor is any of the others a training row.
    assert not bool((held.x[:, None, 0, 0, :4] == train.x[None, :, 0, 0, :4]).all(-1).any())


def test_targets_are_computed_once(teacher: str, cache: Path) -> None:
    calls = []
    lesson = quality.embedded_lesson(teacher, "shapes")[1]

    def load() -> targets.Lesson:
        calls.append(1)
        return lesson

    settings, progress = TargetSettings(rows=300, held_rows=4), []
    targets.cached_targets("digest", load, settings, lambda done, total: progress.append((done, total)))
    targets.cached_targets("digest", load, settings)
    assert len(calls) == 1
    assert progress == [(256, 304), (304, 304), (304, 304)]
    assert [p.suffix for p in sorted(cache.iterdir())] in ([".lock", ".safetensors"], [".safetensors"])
    # Another teacher, other rows: other files.
    assert len({targets.cache_path(d, s) for d in "ab" for s in (settings, replace(settings, seed=1))}) == 4


def test_cached_batches_take_turns() -> None:
    rows = made_rows(10)
    data = Cached(rows=rows, size=4)
    assert torch.equal(data.batch(0).x, rows.x[:4])
    assert torch.equal(data.batch(1).x, rows.x[4:8])
    assert torch.equal(data.batch(2).x, rows.x[:4])  # the two rows left over are never a short batch
    assert data.batch(0).teacher.null_velocity is not None
    with pytest.raises(NasError, match="10 rows has no batch of 11"):
        Cached(rows=rows, size=11).batch(0)


def test_dropped_captions_come_with_the_answer_to_no_caption() -> None:
    rows = made_rows(8)
    batch = Cached(rows=rows, size=8, null_every=4).batch(0)
    assert batch.teacher.null_velocity is None
    dropped = torch.arange(8) % 4 == 0
    assert torch.equal(batch.text.tokens[dropped], rows.null_text.expand(2, -1, -1))
    assert torch.equal(batch.teacher.velocity[dropped], rows.null_velocity[dropped])
    assert torch.equal(batch.text.tokens[~dropped], rows.text[~dropped])
    assert torch.equal(batch.teacher.velocity[~dropped], rows.velocity[~dropped])


@pytest.mark.parametrize("null_every", [0, 3])
def test_fresh_batches_are_a_function_of_the_step(teacher: str, null_every: int) -> None:
    _, lesson = quality.embedded_lesson(teacher, "shapes")
    data = Fresh(lesson=lesson, size=6, null_every=null_every)
    first, again, next_one = data.batch(5), data.batch(5), data.batch(6)
    x, t = first.point()
    assert torch.equal(x, again.point()[0])
    assert not torch.equal(x, next_one.point()[0])
    assert torch.equal(x, noised(first.images_needed(), x * 0 + first.noise, t))
    assert first.teacher is None  # the loop asks it
    null = lesson.text([None])
    without = [bool(torch.allclose(text, null.tokens[0])) for text in first.text.tokens]
    assert without == ([True, False, False] * 2 if null_every else [False] * 6)
    placed = [bool(torch.allclose(field, null.layout[0])) for field in first.text.layout]
    assert placed == without


@pytest.mark.parametrize("kind", [Fresh, Prompted])
def test_parts_of_a_fresh_batch_make_the_whole(teacher: str, kind: type) -> None:
    _, lesson = quality.embedded_lesson(teacher, "shapes")
    data = kind(lesson=lesson, size=6, null_every=4)
    whole, parts = data.batch(2), [data.batch(2, Part(index, 3)) for index in range(3)]
    # Not bit-equal: the text encoder sees fewer rows at once.
    torch.testing.assert_close(Conditioning.cat([part.text for part in parts]).tokens, whole.text.tokens)
    for name in ("clean", "noise", "t") if kind is Fresh else ():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_prompts_come_without_images(teacher: str) -> None:
    _, lesson = quality.embedded_lesson(teacher, "shapes")
    data = Prompted(lesson=lesson, size=5, seed=3)
    batch, again, other = data.batch(1), data.batch(1), data.batch(2)
    assert torch.equal(batch.text.tokens, again.text.tokens)
    assert not torch.equal(batch.text.tokens, other.text.tokens)
    assert len(batch) == data.size == 5
    assert torch.equal(batch.null_text.tokens, lesson.text([None]).tokens)
    with pytest.raises(NasError, match="prompts only"):
        batch.point()
    held = Prompted(lesson=lesson, size=5, splits=("held-out",)).batch(0).text.tokens
    secret = lesson.text(lesson.task.captions("held-out")).tokens  # type: ignore[attr-defined]
    assert all((row - secret).abs().amax(dim=(1, 2)).min() < 1e-5 for row in held)


# Scores


def made_rows(count: int) -> Rows:
    generator = torch.Generator().manual_seed(4)

    def images() -> Tensor:
        return torch.randn(count, 3, 8, 8, generator=generator).half().float()

    return Rows(
        x=images(),
        t=torch.rand(count, generator=generator) * 0.9 + 0.05,
        text=torch.randn(count, 2, 4, generator=generator),
        velocity=images(),
        null_velocity=images(),
        null_text=torch.zeros(1, 2, 4),
    )


class Stub(FlowDenoiser):
    """Answers a fixed function of the rows: the teacher's velocity with a known error."""

    def __init__(self, rows: Rows, answer: str, preconditioner: object) -> None:
        super().__init__(nn.Identity(), preconditioner)  # type: ignore[arg-type]
        self.rows, self.answer = rows, answer

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        count = len(x) // 2
        found = [next(i for i in range(len(self.rows)) if torch.equal(self.rows.x[i], row)) for row in x[:count]]
        conditional, null = self.rows.velocity[found], self.rows.null_velocity[found]
        if self.answer == "skip":
            return self.preconditioner.skip(x, t)
        if self.answer == "deaf":
            return torch.cat([null, null])
        skip = self.preconditioner.skip(x, t)[:count]
        off = 0.1 * (conditional - skip)
        return torch.cat([conditional - off, null - off])


def test_scores_have_their_closed_form(teacher: str) -> None:
    rows, preconditioner = made_rows(6), quality.embedded_lesson(teacher, "shapes")[0].preconditioner
    skip = fidelity_of(Stub(rows, "skip", preconditioner), rows)
    assert skip.quality_db == pytest.approx(0, abs=1e-5)
    assert skip.text_error == pytest.approx(1, abs=1e-6)
    near = fidelity_of(Stub(rows, "near", preconditioner), rows)
    assert near.quality_db == pytest.approx(20, abs=1e-4)  # a tenth of the residual is left
    assert near.text_error == pytest.approx(0, abs=1e-6)
    assert near.loss == pytest.approx(0.01 * skip.loss, rel=1e-4)
    deaf = fidelity_of(Stub(rows, "deaf", preconditioner), rows)
    assert deaf.text_error == pytest.approx(1, abs=1e-6)
    assert deaf.text_db == pytest.approx(0, abs=1e-5)


def test_score_is_the_median_of_its_seeds_and_repeats(teacher: str) -> None:
    settings = replace(SETTINGS, seeds=(0, 1, 2))
    found = score(candidate(), teacher, settings)
    again = score(candidate(), teacher, settings)
    assert found.seeds_db == again.seeds_db
    assert len(set(found.seeds_db)) == 3
    assert found.quality_db == sorted(found.seeds_db)[1]
    mean = sum(found.seeds_db) / 3
    assert found.quality_sd == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in found.seeds_db) / 2))
    assert found.text_db == pytest.approx(-20 * math.log10(found.text_error))
    assert found.params > 0
    assert score(candidate(), teacher, replace(SETTINGS, seeds=(1,))).seeds_db == found.seeds_db[1:2]
    assert score(candidate(), teacher, replace(SETTINGS, seeds=(1,))).quality_sd == 0


def test_more_steps_learn_more(teacher: str) -> None:
    short = score(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
    longer = score(candidate(), teacher, replace(SETTINGS, seeds=(0,), steps=40))
    assert longer.quality_db > short.quality_db + 0.5


def test_a_seed_changes_only_the_initialisation(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, int]] = []
    plain = quality.train

    def spy(fresh: FlowDenoiser, data: Cached, objectives: object, schedule: object) -> object:
        weights = next(fresh.parameters()).detach()
        seen.append((data.batch(1).x, int(weights.sum().mul(1e6))))
        return plain(fresh, data, objectives, schedule)  # type: ignore[arg-type]

    monkeypatch.setattr(quality, "train", spy)
    score(candidate(), teacher, SETTINGS)
    score(candidate(conv_0="separable-1"), teacher, SETTINGS)
    assert len(seen) == 4
    assert all(torch.equal(x, seen[0][0]) for x, _ in seen)
    assert seen[0][1] != seen[1][1]


def test_text_weight_asks_for_both_answers(teacher: str) -> None:
    settings = replace(SETTINGS, seeds=(0,), text_weight=1.0)
    assert len(settings.objectives) == 2
    with_text = score(candidate(), teacher, settings)
    assert with_text.quality_db != score(candidate(), teacher, replace(SETTINGS, seeds=(0,))).quality_db


def test_small_copy_keeps_the_structure(teacher: str) -> None:
    loaded = quality.embedded_lesson(teacher, "shapes")[0]
    chosen = candidate(depth_2=2, conv_1="separable-2")
    small = small_copy(chosen, loaded, ProxySettings())
    from nas.families import network

    full = network(chosen)
    assert [(b.name, b.kind, b.skip) for b in small.blocks] == [(b.name, b.kind, b.skip) for b in full.blocks]
    by_name = {b.name: b for b in small.blocks}
    for block in full.blocks:
        if block.kind == "transformer":
            assert block.setting("channels") == 16 * by_name[block.name].setting("channels")  # type: ignore[operator]
            assert block.setting("kv_heads") == by_name[block.name].setting("kv_heads")
            assert block.setting("depth") == by_name[block.name].setting("depth")
    assert (small.input.channels, small.input.height, small.input.text_width) == (48, 8, 8)


def test_a_student_starts_from_its_seed(teacher: str) -> None:
    loaded = quality.embedded_lesson(teacher, "shapes")[0]
    spec = small_copy(candidate(), loaded, SETTINGS)
    one, same, other = (student(spec, loaded, 4, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert student(spec, loaded, 4, 0).preconditioner == loaded.preconditioner


def test_widths_that_do_not_divide_are_named(teacher: str) -> None:
    loaded = quality.embedded_lesson(teacher, "shapes")[0]
    with pytest.raises(NasError, match="head width 64 cannot be divided by the proxy's 7"):
        small_copy(candidate(), loaded, replace(SETTINGS, width_divisor=7))
    with pytest.raises(NasError, match="norm groups"):
        small_copy(candidate(), loaded, replace(SETTINGS, width_divisor=16, norm_groups=16))


def test_score_leaves_the_thread_count_alone(teacher: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        score(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_score_in_worker_processes_is_the_same(teacher: str, cache: Path) -> None:
    settings = replace(SETTINGS, seeds=(0,))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(score, candidate(), teacher, settings) for _ in range(2)]
        found = [job.result().quality_db for job in jobs]
    assert found == [score(candidate(), teacher, settings).quality_db] * 2
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_quality_and_settings_travel(teacher: str) -> None:
    found = score(candidate(), teacher, replace(SETTINGS, seeds=(0,)))
    assert pickle.loads(pickle.dumps(found)) == found
    assert json.loads(json.dumps(asdict(SETTINGS)))["seeds"] == [0, 1]


def test_a_teacher_without_text_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_load_teacher", lambda name: object())
    with pytest.raises(NasError, match="has no text encoder"):
        quality.embedded_lesson("some/unet", "shapes")


# What is said about it


def test_cannot_see_states_the_run() -> None:
    sentences = quality.cannot_see(ProxySettings(steps=7, batch=3, width_divisor=8))
    assert "divided by 8 after 7 steps on 21 drawn" in sentences[0]
    assert any("cross-attention" in sentence for sentence in sentences)


def test_fidelity_card_only_for_the_settings_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    folder = tmp_path / "reports" / "benchmarks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(quality, "teacher_hash", lambda teacher: f"digest of {teacher}")
    assert quality.fidelity(SETTINGS, "embedded") is None
    (folder / "proxy_rank.json").write_text(
        json.dumps({"proxy": asdict(SETTINGS), "teacher_digest": "digest of embedded", "kendall": 0.5})
    )
    card = quality.fidelity(SETTINGS, "embedded")
    assert card is not None
    assert card["kendall"] == 0.5
    assert quality.fidelity(replace(SETTINGS, steps=4), "embedded") is None
    assert quality.fidelity(SETTINGS, "another.safetensors") is None


def test_outputs_without_null_are_left_alone() -> None:
    batch = made_rows(4).batch(slice(0, 4))
    plain = replace(batch, teacher=Outputs(velocity=batch.teacher.velocity))
    assert targets.drop_captions(plain, 2) is plain
