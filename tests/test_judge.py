"""Scores of the embedded task: shapes-FD tells good drawings from bad, and everyone is compared at the same noise."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_lesson import candidate, write_teacher
from torch import Tensor
from torch.nn import functional

from nas import bench
from nas.batches import stream
from nas.diffusion import Conditioning
from nas.errors import NasError, UsageError
from nas.judge import (
    EmbeddedPipeline,
    compare,
    drawn,
    drawn_and_timed,
    frechet_distance,
    grid,
    pipeline_of,
    psnr_db,
    reference,
    scores,
    shapes_distance,
    shapes_statistics,
    write_png,
)
from nas.judge.scoring import Counting
from nas.judge.shapes_features import FILE, drawings, drawn_statistics, feature_net, floor
from nas.paths import package_data
from nas.students import Sampling, TrainedStudent, load_student, save_student
from nas.tasks.shapes import Task
from nas.tasks.shapes.captions import COLOURS, SHAPES

FAST = Sampling(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def pipeline(name: str) -> EmbeddedPipeline:
    return EmbeddedPipeline(lesson=bench.embedded_lesson(name, "shapes")[1])


@pytest.fixture(scope="module")
def real() -> Tensor:
    return torch.cat(list(drawings(256, "all", 5)))


def student(name: str, path: Path = Path("network.safetensors"), **about: Any) -> TrainedStudent:
    """A student that is the teacher itself."""
    loaded, _ = bench.embedded_lesson(name, "shapes")
    return TrainedStudent(denoiser=loaded, sampling=FAST, about=about, path=path)  # type: ignore[arg-type]


# The feature net


def test_the_shipped_file_is_the_one_on_record() -> None:
    path = package_data("judge", FILE)
    record = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert len(content) == record["bytes"] < 300_000
    assert record["command"].startswith("python benchmarks/train_feature_net.py")
    assert record["accuracy"]["all_classes"] > 0.97
    assert record["references"]["drawings"]["count"] == reference("drawings.all").count
    assert record["references"]["teacher"]["count"] == reference("teacher.held-out").count


def test_the_net_tells_what_is_drawn(real: Tensor) -> None:
    captions = Task().sample(256, "all", stream(5, 0))
    said = feature_net()(real)
    ordered = [caption.reading_order for caption in captions]
    wanted = {
        "first_colour": [COLOURS.index(c.first.colour) for c in ordered],
        "first_shape": [SHAPES.index(c.first.shape) for c in ordered],
        "relation": [0 if c.second is None else 1 + ["left of", "above"].index(c.relation) for c in ordered],
    }
    for head, right in wanted.items():
        share = (said[head].argmax(1) == torch.tensor(right)).float().mean()
        assert float(share) > 0.95, head


def test_the_shipped_reference_is_made_of_its_drawings() -> None:
    found, shipped = drawn_statistics(split="held-out"), reference("drawings.held-out")
    assert found.count == shipped.count == 8192
    np.testing.assert_allclose(found.mean, shipped.mean, atol=1e-4)
    assert frechet_distance(found, shipped) < 1e-3


def test_real_drawings_are_nearest_and_damage_is_far(real: Tensor) -> None:
    blurred = functional.interpolate(functional.avg_pool2d(real, 4), scale_factor=4, mode="bilinear")
    noise = torch.randn(real.shape, generator=stream(0))
    found = {
        "real": shapes_distance(real),
        "grain": shapes_distance(real + 0.3 * noise),
        "more grain": shapes_distance(real + 0.8 * noise),
        "blurred": shapes_distance(blurred),
        "upside down": shapes_distance(real.flip(2)),
        "eight over and over": shapes_distance(real[:8].repeat(32, 1, 1, 1)),
        "empty": shapes_distance(torch.full_like(real, -0.75)),
    }
    assert found["real"] < 3
    assert found["real"] < found["grain"] < found["more grain"]
    for damage in ("blurred", "upside down", "eight over and over", "more grain"):
        assert found["real"] * 3 < found[damage] < found["empty"], damage


def test_a_set_is_compared_with_what_is_asked_for(real: Tensor) -> None:
    assert shapes_distance(real, shapes_statistics(real)) == pytest.approx(0, abs=1e-6)
    assert shapes_distance(real, "teacher.all") > shapes_distance(real, "drawings.all")
    captions = Task().sample(64, "held-out", stream(1))
    # Fewer drawings are further away by chance alone: why the floor is given beside every distance.
    assert floor(captions, "drawings.held-out") > floor(captions * 8, "drawings.held-out")
    assert floor(captions) == floor(captions)


def test_what_cannot_be_judged_is_refused(real: Tensor) -> None:
    with pytest.raises(NasError, match=r"images \[B, 3, 32, 32\], got \[4, 3, 16, 16\]"):
        shapes_distance(torch.zeros(4, 3, 16, 16))
    with pytest.raises(NasError, match="not finite"):
        shapes_distance(real[:4] * float("nan"))
    with pytest.raises(UsageError, match=r"did you mean 'drawings.all'"):
        shapes_distance(real, "drawing.all")
    with pytest.raises(UsageError, match="unknown split"):
        list(drawings(4, "every", 0))


# Scores


def test_scores_of_the_embedded_task(pipeline: EmbeddedPipeline) -> None:
    lesson = pipeline.lesson
    found = scores(lesson.teacher, lesson, FAST, prompts=6, batch=4)
    shares = {"count", "colour", "shape", "relation", "two_objects", "correct"}
    assert set(found) == shares | {"shapes_fd", "shapes_fd_floor", "images_per_second", "evaluations"}
    assert found["evaluations"] == 4  # two steps, each of two texts
    assert found["images_per_second"] > 0
    assert found["shapes_fd"] > found["shapes_fd_floor"]  # its network was never trained
    again = scores(lesson.teacher, lesson, FAST, prompts=6, batch=4)
    assert {k: v for k, v in again.items() if k != "images_per_second"} == {
        k: v for k, v in found.items() if k != "images_per_second"
    }
    other = scores(lesson.teacher, lesson, FAST, prompts=6, batch=4, seed=1)
    assert other["shapes_fd"] != found["shapes_fd"]
    few = scores(lesson.teacher, lesson, Sampling(times=(1.0, 0.6, 0.3)), prompts=6, split="all")
    assert few["evaluations"] == 3


def test_real_drawings_have_full_marks(pipeline: EmbeddedPipeline) -> None:
    captions = pipeline.random_prompts(64, 3)
    pictures = pipeline.real(captions, 3)
    found = pipeline.judged(pictures, captions)
    assert found["correct"] == 1
    assert found["shapes_fd"] < 3 * found["shapes_fd_floor"]
    assert pipeline.right(pictures, captions) == [True] * 64
    wrong = pipeline.judged(pictures.flip(0), captions)
    assert wrong["correct"] < 0.5
    assert wrong["shapes_fd"] == pytest.approx(found["shapes_fd"])  # a set has no order: what the checker is for


@pytest.mark.parametrize(("count", "calls"), [(3, 4), (7, 6), (8, 4)])
def test_speed_is_of_a_warm_batch(pipeline: EmbeddedPipeline, count: int, calls: int) -> None:
    captions = pipeline.random_prompts(count, 0)
    counting: Any = Counting(pipeline.teacher)
    pictures, found = drawn_and_timed(counting, pipeline, FAST, captions, batch=4)
    assert torch.allclose(pictures, drawn(pipeline.teacher, pipeline, FAST, captions, batch=4), atol=1e-5)
    assert (found.batch, found.calls, found.evaluations) == (min(4, count), 2, 4.0)
    # Three or seven images have no second full batch, so one is drawn again.
    assert counting.calls == calls
    assert found.images_per_second > 0


def test_what_a_slow_network_takes_is_seen(pipeline: EmbeddedPipeline) -> None:
    class Slow:
        calls = 0

        def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            self.calls += 1
            time.sleep(0.5 if self.calls == 1 else 0.05)  # the first call warms up
            return x

    slow: Any = Slow()
    once = Sampling(steps=1, guidance=1.0)
    found = drawn_and_timed(slow, pipeline, once, pipeline.random_prompts(9, 0), batch=3)[1]
    assert 6 < found.images_per_second < 3 / 0.05
    assert found.evaluations == 1


def test_a_network_that_diverged_is_said_to_have(pipeline: EmbeddedPipeline) -> None:
    class Broken:
        def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            return x / 0

    with pytest.raises(NasError, match="not finite"):
        drawn(Broken(), pipeline, FAST, pipeline.random_prompts(2, 0))  # type: ignore[arg-type]


def test_noise_depends_on_the_batch_and_its_number_alone(pipeline: EmbeddedPipeline) -> None:
    captions = pipeline.random_prompts(6, 0)
    whole = drawn(pipeline.teacher, pipeline, FAST, captions, batch=4)
    assert torch.allclose(drawn(pipeline.teacher, pipeline, FAST, captions[:4], batch=4), whole[:4], atol=1e-5)
    assert not torch.allclose(drawn(pipeline.teacher, pipeline, FAST, captions[4:], batch=4), whole[4:], atol=1e-5)


# Side by side


def test_a_student_that_is_its_teacher_draws_what_it_draws(name: str, pipeline: EmbeddedPipeline) -> None:
    told: list[str] = []
    found = compare(
        student(name),
        pipeline,
        pipeline.random_prompts(4, 0),
        steps=(1, 2),
        teacher_steps=(2, 3),
        batch=3,
        report=lambda stage, done, total, note: told.append(stage),
    )
    assert [(row.who, row.steps) for row in found.rows] == [
        ("student", 1),
        ("student", 2),
        ("teacher", 2),
        ("teacher", 3),
        ("real", 0),
    ]
    assert torch.equal(found.pictures["student 2"], found.pictures["teacher 2"])
    one, two, same, last, drawings_row = (row.scores for row in found.rows)
    assert two["teacher_psnr_db"] == same["teacher_psnr_db"] > one["teacher_psnr_db"]
    assert "teacher_psnr_db" not in last
    assert two["shapes_fd"] == same["shapes_fd"]
    assert drawings_row["correct"] == 1
    assert math.isnan(found.rows[-1].images_per_second)
    assert (found.rows[0].evaluations, found.rows[3].evaluations, found.rows[0].batch) == (2, 6, 3)
    assert found.against == "real drawings"
    assert len(found.prompts) == 4
    assert all(isinstance(text, str) for text in found.prompts)
    assert told[0] == "student, 1 step"
    assert told[-1] == "judge"


def test_other_metrics_see_pictures_texts_and_what_is_real(name: str, pipeline: EmbeddedPipeline) -> None:
    class Brightness:
        name, compares = "brightness", True
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def score(self, pictures: Tensor, texts: Any, against: Tensor | None) -> float:
            assert against is not None
            self.seen.append((len(pictures), len(against)))
            return float(pictures.mean() - against.mean())

    captions = pipeline.random_prompts(2, 0)
    found = compare(student(name), pipeline, captions, teacher_steps=(1,), metrics=[Brightness()])
    assert [("brightness" in row.scores) for row in found.rows] == [True, True, False]
    given = compare(
        student(name), pipeline, captions, teacher_steps=(1,), metrics=[Brightness()], against=torch.zeros(7, 3, 32, 32)
    )
    assert given.against == "given pictures"
    assert Brightness.seen[-1] == (2, 7)
    assert "brightness" in given.rows[-1].scores


def test_the_teacher_has_guidance_where_the_student_has_learnt_it(name: str, pipeline: EmbeddedPipeline) -> None:
    captions = pipeline.random_prompts(2, 0)
    few = replace(student(name), sampling=Sampling(times=(1.0,), guidance=1.0))
    found = compare(few, pipeline, captions, teacher_steps=(1,))
    assert found.teacher_guidance == 2.0
    assert [row.evaluations for row in found.rows[:2]] == [1, 2]
    plain = replace(student(name), sampling=replace(FAST, guidance=3.0))
    assert compare(plain, pipeline, captions, teacher_steps=(1,)).teacher_guidance == 3.0
    given = compare(few, pipeline, captions, teacher_steps=(1,), teacher_guidance=1.0)
    assert given.rows[1].evaluations == 1


def test_a_comparison_of_nothing_is_refused(name: str, pipeline: EmbeddedPipeline) -> None:
    captions = pipeline.random_prompts(2, 0)
    with pytest.raises(UsageError, match="at least 2 prompts, got 1"):
        compare(student(name), pipeline, captions[:1])
    with pytest.raises(UsageError, match="teacher at some number"):
        compare(student(name), pipeline, captions, teacher_steps=())
    few = replace(student(name), sampling=Sampling(times=(1.0, 0.5)))
    with pytest.raises(UsageError, match="possible are 1, 2"):
        compare(few, pipeline, captions, steps=(4,))


def test_the_pipeline_of_a_student_is_its_teachers(name: str, tmp_path: Path) -> None:
    loaded, _ = bench.embedded_lesson(name, "shapes")
    settings = bench.ProxySettings(width_divisor=32, norm_groups=2)
    denoiser = bench.student(bench.small_copy(candidate(), loaded, settings), loaded, 4, 0)
    about = {"teacher": name, "teacher_digest": bench.teacher_hash(name), "task": "shapes"}
    found = load_student(save_student(tmp_path / "network.safetensors", denoiser, FAST, about))
    pipeline = pipeline_of(found, split="all")
    assert isinstance(pipeline, EmbeddedPipeline)
    assert pipeline.split == "all"
    pictures = drawn(found.denoiser, pipeline, found.sampling, pipeline.prompts(["a red circle", "A  blue SQUARE"]))
    assert pictures.shape == (2, 3, 32, 32)
    with pytest.raises(NasError, match="another version of the teacher"):
        pipeline_of(replace(found, about=about | {"teacher_digest": "0"}))
    with pytest.raises(NasError, match="does not say which teacher"):
        pipeline_of(replace(found, about={}))


# Pictures


def test_psnr_in_closed_form() -> None:
    assert psnr_db(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)) == pytest.approx(20.0)
    assert psnr_db(torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 1.5)) == math.inf  # both are white


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(5, 8, (128, 5 * 128 + 4 * 4)), (5, 2, (3 * 128 + 2 * 4, 128 * 2 + 4))]
)
def test_small_pictures_are_enlarged_in_a_grid(
    count: int, columns: int, shape: tuple[int, int], tmp_path: Path, real: Tensor
) -> None:
    pixels = grid(real[:count], columns=columns)
    assert pixels.shape == (*shape, 3)
    assert pixels.dtype == torch.uint8
    wanted = ((real[0, :, 7, 9] + 1) * 127.5).round()
    assert torch.equal(pixels[7 * 4 + 1, 9 * 4 + 3].float(), wanted)
    with Image.open(write_png(tmp_path / "grid.png", pixels)) as image:
        assert np.array_equal(np.array(image), pixels.numpy())


def test_large_pictures_are_left_as_they_are() -> None:
    assert grid(torch.zeros(2, 3, 200, 150)).shape == (200, 301, 3)
