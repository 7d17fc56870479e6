"""The task shapes: its captions and split, its scenes, and a checker that must accept and refuse the right ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from nas import registry
from nas.errors import NasError, UsageError
from nas.tasks.shapes import Caption, Task, Thing, detect, parse
from nas.tasks.shapes.captions import COLOURS, RELATIONS, SHAPES, TOKENS
from nas.tasks.shapes.scenes import BACKGROUND, distances, pixel_centres


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(count: int = 200, relations: int = 4, split: str = "all") -> tuple[Task, list[Caption], Tensor]:
    task = Task(relations=relations)
    captions = task.sample(count, split, generator())
    return task, captions, task.render(captions, generator(1))


def two_objects(task: Task, count: int = 100) -> list[Caption]:
    return [c for c in task.sample(2 * count, "all", generator()) if c.second is not None][:count]


RED_CIRCLE, BLUE_SQUARE = Thing(colour="red", shape="circle"), Thing(colour="blue", shape="square")


class TestCaptions:
    def test_is_a_plugin(self) -> None:
        assert "shapes" in registry.plugins("nas.tasks")
        assert registry.load("nas.tasks", "shapes").Task is Task

    @pytest.mark.parametrize("relations", [2, 4])
    def test_counts_and_split(self, relations: int) -> None:
        task = Task(relations=relations)
        train, held_out = task.captions("train"), task.captions("held-out")
        assert len(task.captions("all")) == 18 + relations * 18 * 17
        assert len(held_out) == 31 * relations
        assert set(train) | set(held_out) == set(task.captions("all"))
        assert not set(train) & set(held_out)
        assert all(caption.second is not None for caption in held_out)

    def test_a_held_out_scene_is_held_out_from_both_sides(self) -> None:
        held_out = Task(relations=4).captions("held-out")
        assert {c.reading_order for c in held_out} == set(Task(relations=2).captions("held-out"))
        assert not {c.reading_order for c in Task(relations=4).captions("train")} & set(held_out)

    def test_split_never_moves(self) -> None:
        texts = [caption.text for caption in Task().captions("held-out")]
        assert texts[:2] == ["a red circle left of a magenta square", "a red square left of a cyan circle"]

    def test_reading_order(self) -> None:
        mirrored = Caption(first=RED_CIRCLE, relation="right of", second=BLUE_SQUARE)
        assert mirrored.reading_order == Caption(first=BLUE_SQUARE, relation="left of", second=RED_CIRCLE)
        below = Caption(first=RED_CIRCLE, relation="below", second=BLUE_SQUARE)
        assert below.reading_order == Caption(first=BLUE_SQUARE, relation="above", second=RED_CIRCLE)

    def test_identical_objects_are_refused(self) -> None:
        with pytest.raises(NasError, match="two different objects"):
            Caption(first=RED_CIRCLE, relation="above", second=RED_CIRCLE)

    def test_parse_reads_back_every_caption(self) -> None:
        for caption in Task(relations=4).captions("all"):
            assert parse(caption.text) == caption

    def test_unknown_words(self) -> None:
        with pytest.raises(UsageError, match="colours red, green"):
            parse("a purple circle")
        with pytest.raises(UsageError, match="did you mean 'held-out'"):
            Task().captions("held_out")
        with pytest.raises(UsageError, match="must be 2 or 4, got 3"):
            Task(relations=3)

    def test_tokens_tell_captions_apart(self) -> None:
        task = Task(relations=4)
        rows = task.tokens([None, *task.captions("all")])
        assert rows.shape == (1 + 18 + 4 * 18 * 17, TOKENS)
        assert rows.dtype == torch.long
        assert len(rows.unique(dim=0)) == len(rows)
        assert int(rows.max()) < task.vocabulary_size
        assert task.tokens([]).shape == (0, TOKENS)

    def test_a_quarter_of_the_sample_has_one_object(self) -> None:
        sampled = Task().sample(4000, "train", generator())
        assert sum(c.second is None for c in sampled) / 4000 == pytest.approx(0.25, abs=0.03)
        assert all(c.second is not None for c in Task().sample(50, "held-out", generator()))


class TestScenes:
    def test_range_shape_and_background(self) -> None:
        task, _, images = scenes()
        assert images.shape[1:] == task.image_shape
        assert float(images.min()) >= -1
        assert float(images.max()) <= 1
        corners = torch.stack([images[:, :, 0, 0], images[:, :, 0, -1]])
        expected = torch.tensor(BACKGROUND) / 127.5 - 1
        assert torch.allclose(corners, expected.expand_as(corners), atol=1e-6)
        assert task.background == pytest.approx(expected.tolist())

    def test_the_seed_decides_the_scene(self) -> None:
        task, captions, images = scenes(8)
        assert torch.equal(images, task.render(captions, generator(1)))
        assert not torch.equal(images, task.render(captions, generator(2)))

    def test_shapes_have_equal_area_and_their_centroid_at_the_middle(self) -> None:
        x, y = pixel_centres()
        fine = torch.linspace(-12, 12, 601, dtype=torch.float64)
        dx, dy = torch.meshgrid(fine, fine, indexing="xy")
        inside = distances(dx, dy, torch.tensor(5.0)) < 0
        area = inside.sum((1, 2)) * 0.04**2
        assert area.tolist() == pytest.approx([torch.pi * 25] * 3, rel=1e-2)
        for mask in inside:
            assert float(dx[mask].mean()) == pytest.approx(0, abs=0.04)
            assert float(dy[mask].mean()) == pytest.approx(0, abs=0.04)
        assert (float(x[3, 7]), float(y[3, 7])) == (7.5, 3.5)

    def test_detected_places_obey_every_relation(self) -> None:
        for relation in RELATIONS:
            caption = Caption(first=RED_CIRCLE, relation=relation, second=BLUE_SQUARE)
            for objects in detect(Task(relations=4).render([caption] * 16, generator())):
                place = {o.colour: o for o in objects}
                right, down = place["blue"].x - place["red"].x, place["blue"].y - place["red"].y
                along = {"left of": right, "above": down, "right of": -right, "below": -down}[relation]
                assert along > 5

    def test_grid(self) -> None:
        task, _, images = scenes(10)
        grid = task.grid(images, columns=4)
        assert grid.shape == (3 * 33 - 1, 4 * 33 - 1, 3)
        assert grid.dtype == np.uint8
        assert tuple(grid[0, 0]) == BACKGROUND
        assert grid[0, 32].tolist() == [255, 255, 255]


class TestChecker:
    def test_clean_scenes_are_all_correct(self) -> None:
        task, captions, images = scenes(300)
        means = task.check(images, captions).means()
        assert means == dict.fromkeys(means, 1.0)

    def test_noise_and_blur(self) -> None:
        task, captions, images = scenes(100)
        noise = torch.randn(images.shape, generator=generator(2))
        assert task.check(images + 0.1 * noise, captions).means()["correct"] > 0.99
        assert task.check(images + 0.2 * noise, captions).means()["correct"] > 0.95
        assert task.check(images + 0.6 * noise, captions).means()["correct"] < 0.2
        blurred = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 0.5, 0.5)))
        assert task.check(blurred, captions).means()["correct"] > 0.98

    def test_another_caption_is_refused(self) -> None:
        task, captions, images = scenes(200)
        others = [*captions[1:], captions[0]]
        wrong = np.array([a != b for a, b in zip(captions, others, strict=True)])
        scores = task.check(images, [o.reading_order for o in others])
        same = np.array([a.reading_order == b.reading_order for a, b in zip(captions, others, strict=True)])
        assert not scores.correct[wrong & ~same].any()

    def test_one_colour_changed(self) -> None:
        task = Task(relations=4)
        captions = two_objects(task)
        changed = []
        for caption in captions:
            second = caption.second
            assert second is not None
            left = [c for c in COLOURS if c not in (second.colour, caption.first.colour)]
            changed.append(dataclasses.replace(caption, second=dataclasses.replace(second, colour=left[0])))
        scores = task.check(task.render(captions, generator(1)), changed)
        assert scores.count.all()
        assert not scores.colour.any()
        assert not scores.correct.any()

    def test_one_shape_changed(self) -> None:
        task = Task(relations=4)
        captions = [c for c in two_objects(task) if c.first.colour != c.things[1].colour]
        changed = []
        for caption in captions:
            shape = next(s for s in SHAPES if s != caption.first.shape)
            changed.append(dataclasses.replace(caption, first=dataclasses.replace(caption.first, shape=shape)))
        scores = task.check(task.render(captions, generator(1)), changed)
        assert scores.colour.all()
        assert scores.relation.all()
        assert not scores.shape.any()

    def test_shapes_exchanged_between_the_objects_are_not_bound(self) -> None:
        drawn = Caption(first=RED_CIRCLE, relation="above", second=BLUE_SQUARE)
        asked = parse("a red square above a blue circle")
        scores = Task().check(Task().render([drawn] * 16, generator()), [asked] * 16)
        assert scores.colour.all()
        assert not scores.shape.any()

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_relation_changed(self, relation: str) -> None:
        task = Task(relations=4)
        captions = two_objects(task)
        asked = [dataclasses.replace(c, relation=relation) for c in captions]
        scores = task.check(task.render(captions, generator(1)), asked)
        expected = np.array([c.relation == relation for c in captions])
        assert scores.shape.all()
        assert (scores.relation == expected).all()
        assert (scores.correct == expected).all()

    def test_missing_and_extra_objects(self) -> None:
        task = Task()
        pair, alone = parse("a red circle above a blue square"), parse("a red circle")
        assert not task.check(task.render([alone] * 8, generator()), [pair] * 8).count.any()
        assert not task.check(task.render([pair] * 8, generator()), [alone] * 8).count.any()
        empty = torch.tensor(task.background).view(1, 3, 1, 1).expand(1, *task.image_shape)
        scores = task.check(empty, [pair])
        flags = (scores.count, scores.colour, scores.shape, scores.relation)
        assert not np.any(flags)

    def test_a_shapeless_blob_has_no_shape(self) -> None:
        image = torch.tensor(Task().background).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
        image[:, :, 14:16, 4:28] = torch.tensor([1.0, -0.6, -0.6]).view(1, 3, 1, 1)
        (found,) = detect(image)[0]
        assert (found.colour, found.shape, found.area) == ("red", "", 48.0)
        assert (found.x, found.y) == pytest.approx((16.0, 15.0))

    def test_relation_mean_is_over_the_images_that_ask_for_one(self) -> None:
        task = Task()
        pair, alone = parse("a red circle above a blue square"), parse("a red circle")
        images = task.render([pair, alone, alone], generator())
        upside_down = parse("a blue square above a red circle")
        assert task.check(images, [upside_down, alone, alone]).means()["relation"] == 0.0
        assert task.check(images, [upside_down, alone, alone]).means()["correct"] == pytest.approx(2 / 3)
        assert np.isnan(task.check(images[1:], [alone, alone]).means()["relation"])

    def test_bad_images_are_refused(self) -> None:
        task, captions, images = scenes(2)
        with pytest.raises(NasError, match="one caption each"):
            task.check(images, captions[:1])
        with pytest.raises(NasError, match="not finite"):
            task.check(images * float("nan"), captions)
