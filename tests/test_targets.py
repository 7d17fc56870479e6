"""Cached and fresh examples of an untrained teacher: what is equal for all students."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from proxy_case import made_rows
from torch import Tensor

from nas import bench, targets, teachers
from nas.batches import Part
from nas.diffusion import Conditioning, noised
from nas.errors import NasError
from nas.objectives import Outputs
from nas.targets import Cached, Fresh, Prompted, Rows, TargetSettings


def rows_of(teacher: str, settings: TargetSettings) -> tuple[Rows, Rows]:
    lesson = bench.embedded_lesson(teacher, "shapes")[1]
    return targets.cached_targets(bench.teacher_hash(teacher), lambda: lesson, settings)


def test_targets_are_what_the_teacher_says(teacher: str, cache: Path) -> None:
    train, held = rows_of(teacher, TargetSettings(rows=8, held_rows=8))
    loaded, lesson = bench.embedded_lesson(teacher, "shapes")
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
    lesson = bench.embedded_lesson(teacher, "shapes")[1]
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
    lesson = bench.embedded_lesson(teacher, "shapes")[1]

    def load() -> targets.Lesson:
        calls.append(1)
        return lesson

    settings, progress = TargetSettings(rows=300, held_rows=4), []
    targets.cached_targets("digest", load, settings, lambda done, total: progress.append((done, total)))
    targets.cached_targets("digest", load, settings)
    assert len(calls) == 1
    assert progress == [(256, 304), (300, 304), (304, 304)]
    assert len(list(cache.glob("*.rows"))) == 3  # training and held-out rows, and the text of no caption
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
    _, lesson = bench.embedded_lesson(teacher, "shapes")
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
    _, lesson = bench.embedded_lesson(teacher, "shapes")
    data = kind(lesson=lesson, size=6, null_every=4)
    whole, parts = data.batch(2), [data.batch(2, Part(index, 3)) for index in range(3)]
    # Not bit-equal: the text encoder sees fewer rows at once.
    torch.testing.assert_close(Conditioning.cat([part.text for part in parts]).tokens, whole.text.tokens)
    for name in ("clean", "noise", "t") if kind is Fresh else ():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_prompts_come_without_images(teacher: str) -> None:
    _, lesson = bench.embedded_lesson(teacher, "shapes")
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


def test_outputs_without_null_are_left_alone() -> None:
    batch = made_rows(4).batch(slice(0, 4))
    plain = replace(batch, teacher=Outputs(velocity=batch.teacher.velocity))
    assert targets.drop_captions(plain, 2) is plain


def test_a_full_disk_costs_a_search_its_cache_and_nothing_else(
    teacher: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, _ = rows_of(teacher, TargetSettings(rows=8, held_rows=8))
    shutil.rmtree(cache.parent)
    targets._load.cache_clear()

    def full(*_: object) -> None:
        raise NasError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    for module in (targets.files, teachers.files):
        monkeypatch.setattr(module, "atomic_write", full)
    found, _ = rows_of(teacher, TargetSettings(rows=8, held_rows=8))
    assert torch.equal(found.x, wanted.x)
    assert torch.equal(found.velocity, wanted.velocity)
    assert torch.equal(found.null_text, wanted.null_text)
    assert len(caplog.records) == 1  # for training rows, held-out rows and the text of no caption together
    assert "No space left" in caplog.text
