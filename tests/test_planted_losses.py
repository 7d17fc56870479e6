"""Deliberate bugs, one at a time, and the test that notices each: what no bug survives is a test.

| bug planted | where | test that fails |
| --- | --- | --- |
| noise used where the clean image is expected | `nas.diffusion.denoisers.clean_and_noise` | `test_objectives_oracles.test_prediction_types_of_one_function_give_one_loss` |
| a native v prediction used as noise | `Schedule.prediction` of a denoiser | the same |
| "noise" and "clean" weighted the other way round | `nas.objectives.output.space_weight` | `test_objectives_oracles.test_a_space_is_the_difference_of_such_predictions` |
| the data's velocity with the wrong sign | `nas.batches.Batch.velocity` | the same, for the objective task |
| no stop of the gradient on the ratio | `nas.objectives.multi_level.ratio` | `test_objectives_oracles.test_balanced_gradients_do_not_see_the_scale_of_the_teachers_loss` |
| one ratio for the whole batch | the same | `test_objectives_oracles.test_every_example_is_balanced_on_its_own` |
| no guard of the ratio | the same | `test_objectives_oracles.test_a_student_that_equals_its_teacher_is_left_to_the_data` |
| data and teacher swapped over the schedule | `nas.objectives.multi_level.data_share` | `test_objectives_oracles.test_the_middle_of_the_schedule_follows_the_data_and_its_ends_the_teacher` |
| the teacher gets a gradient | `squared` of every loss, without its stop | `test_objectives.TestContract.test_gradient_to_the_student_only` |
| earlier layers counted again and again (`x += x + ...`) | `summed` of every loss of layers | `test_objectives.test_layers_are_summed_each_once` and its like |
| a sum over the batch instead of its mean | `squared` of every loss | `test_objectives.TestContract.test_batch_mean` |
| both sides masked where the teacher is large | `nas.objectives.features.masked` | `test_objectives.test_masks_remove_outliers_of_each_side_on_its_own` |
| up stages paired by their own number | `nas.objectives._taps.stage_taps` | `test_objectives_taps.test_stages_of_bk_sdm_tiny` |
| up units paired by their own number | `nas.objectives._taps.plan` | `test_objectives_taps.test_layers_of_koalas_networks_pair_as_inheritance_does` |
| the teacher's top layers instead of its bottom ones | `nas.objectives._taps.matched` | `test_objectives_taps.test_matched_layers_are_those_of_the_corresponding_transformer` |
| the teacher drops captions of its own | `nas.distill.turns.answer` | `test_objectives_training.test_teacher_and_student_are_asked_without_the_same_captions` |
| a caption dropped for the student alone | `nas.targets.drop_captions` | `test_objectives_training.test_a_cached_answer_is_that_to_the_dropped_caption` |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import test_objectives as values
import test_objectives_oracles as oracles
import test_objectives_taps as taps
import test_objectives_training as training
import torch
from torch import Tensor

from nas import diffusion, targets
from nas.batches import Batch
from nas.distill import turns
from nas.features import Tap
from nas.objectives import _taps, features, layers, multi_level, output, self_attention, task, text

# pytest reads a module's names for fixtures: the tests of dropped captions want this one.
lesson = training.lesson

Patch = pytest.MonkeyPatch
SQUARED = {
    "output": output,
    "task": task,
    "text": text,
    "features": features,
    "self_attention": self_attention,
    "layers": layers,
    "multi_level": multi_level,
}


def noticed(monkeypatch: Patch, *tests: Callable[[], None]) -> None:
    """Each of the tests fails with what is planted, and holds without."""
    for test in tests:
        with pytest.raises(AssertionError):
            test()
    monkeypatch.undo()
    for test in tests:
        test()


# ------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("space", ["velocity", "noise", "clean"])
def test_noise_used_as_the_clean_image(monkeypatch: Patch, space: str) -> None:
    real = diffusion.clean_and_noise
    monkeypatch.setattr("nas.diffusion.denoisers.clean_and_noise", lambda *given: tuple(reversed(real(*given))))
    noticed(monkeypatch, partial(oracles.test_prediction_types_of_one_function_give_one_loss, space))


def test_a_native_velocity_used_as_noise(monkeypatch: Patch) -> None:
    real = oracles.native

    def confused(kind: str, sharpness: float) -> diffusion.NativeDenoiser:
        made = real(kind, sharpness)
        if kind == "velocity":
            made.schedule = replace(made.schedule, prediction="noise")
        return made

    monkeypatch.setattr(oracles, "native", confused)
    noticed(monkeypatch, partial(oracles.test_prediction_types_of_one_function_give_one_loss, "noise"))


@pytest.mark.parametrize("space", ["noise", "clean"])
@pytest.mark.parametrize("name", ["output", "task"])
def test_spaces_swapped(monkeypatch: Patch, name: str, space: str) -> None:
    real, other = output.space_weight, {"noise": "clean", "clean": "noise"}
    monkeypatch.setattr(SQUARED[name], "space_weight", lambda space, given: real(other[space], given))
    noticed(monkeypatch, partial(oracles.test_a_space_is_the_difference_of_such_predictions, name, space))


def test_the_datas_velocity_has_the_wrong_sign(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Batch, "velocity", property(lambda given: given.clean - given.noise))
    noticed(monkeypatch, partial(oracles.test_a_space_is_the_difference_of_such_predictions, "task", "noise"))


# -------------------------------------------------------------------------------------- balanced


def test_the_ratio_has_a_gradient(monkeypatch: Patch) -> None:
    monkeypatch.setattr(multi_level, "ratio", lambda task, teaching: task / teaching)
    noticed(monkeypatch, partial(oracles.test_balanced_gradients_do_not_see_the_scale_of_the_teachers_loss, 1e8))


def test_one_ratio_for_the_whole_batch(monkeypatch: Patch) -> None:
    monkeypatch.setattr(multi_level, "ratio", lambda task, teaching: (task.mean() / teaching.mean()).detach())
    value = oracles.test_balanced_losses_have_the_value_of_the_datas_loss
    noticed(monkeypatch, oracles.test_every_example_is_balanced_on_its_own, value)


def test_an_unguarded_ratio(monkeypatch: Patch) -> None:
    monkeypatch.setattr(multi_level, "ratio", lambda task, teaching: (task / teaching).detach())
    minimum = partial(values.TestContract().test_minimum_where_student_teacher_and_data_agree, "multi_level", {})
    noticed(monkeypatch, oracles.test_a_student_that_equals_its_teacher_is_left_to_the_data, minimum)


def test_data_and_teacher_swapped_over_the_schedule(monkeypatch: Patch) -> None:
    real = multi_level.data_share
    monkeypatch.setattr(multi_level, "data_share", lambda t: 1 - real(t))
    noticed(monkeypatch, oracles.test_the_middle_of_the_schedule_follows_the_data_and_its_ends_the_teacher)


# ------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("name", ["output", "text", "self_attention", "layers", "multi_level"])
def test_the_teacher_gets_a_gradient(monkeypatch: Patch, name: str) -> None:
    monkeypatch.setattr(SQUARED[name], "squared", lambda a, b: (a - b).square().flatten(1).mean(1))
    noticed(monkeypatch, partial(values.TestContract().test_gradient_to_the_student_only, name, {}))


def test_the_teacher_of_features_gets_a_gradient(monkeypatch: Patch) -> None:
    def leaky(self: Any, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().flatten(1).mean(1)

    monkeypatch.setattr(features.Objective, "_difference", leaky)
    noticed(monkeypatch, partial(values.TestContract().test_gradient_to_the_student_only, "features", {}))


@pytest.mark.parametrize("name", ["features", "layers", "self_attention", "multi_level"])
def test_earlier_layers_counted_again(monkeypatch: Patch, name: str) -> None:
    def doubling(differences: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for difference in differences.values():
            total = total + (total + difference)  # the published re-implementation's x += x + ...
        return total

    monkeypatch.setattr(SQUARED[name], "summed", doubling)
    if name in ("features", "layers"):
        noticed(monkeypatch, partial(values.test_layers_are_summed_each_once, name))
    elif name == "self_attention":
        noticed(monkeypatch, values.test_self_attention_and_last_features_are_terms_of_their_own)
    else:  # balanced losses do not see their own value; unscaled ones do
        noticed(monkeypatch, oracles.test_balanced_losses_have_the_value_of_the_datas_loss)


@pytest.mark.parametrize("name", SQUARED)
def test_a_sum_over_the_batch(monkeypatch: Patch, name: str) -> None:
    monkeypatch.setattr(SQUARED[name], "squared", lambda a, b: (a - b.detach()).square().sum().expand(len(a)))
    noticed(monkeypatch, partial(values.TestContract().test_batch_mean, name, {}))


def test_one_mask_for_both_sides(monkeypatch: Patch) -> None:
    real, held = features.masked, []

    def shared(feature: Tensor, mask_sd: float) -> Tensor:
        held.append(feature)
        return real(feature, mask_sd) if len(held) == 1 else feature * (real(held[0], mask_sd) != 0)

    monkeypatch.setattr(features, "masked", shared)
    noticed(monkeypatch, values.test_masks_remove_outliers_of_each_side_on_its_own)


# ------------------------------------------------------------------------------------------- taps


def test_up_stages_paired_by_their_own_number(monkeypatch: Patch) -> None:
    def by_number(student: Any, teacher: Any, *, middle: bool) -> tuple[Tap, ...]:
        found = [block.name for block in _taps.blocks_of(student.names)]
        last = {".".join(name.split(".")[:2]): name for name in found if not name.startswith("mid_block")}
        return tuple(Tap(student=name, teacher=name) for name in last.values())

    monkeypatch.setattr(_taps, "stage_taps", by_number)
    noticed(monkeypatch, taps.test_stages_of_bk_sdm_tiny)


def test_up_units_paired_by_their_own_number(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_taps, "plan", lambda student, teacher: {block.name: block.name for block in student.blocks})
    noticed(monkeypatch, partial(taps.test_layers_of_koalas_networks_pair_as_inheritance_does, "koala-700m", 0))


def test_top_layers_instead_of_bottom_ones(monkeypatch: Patch) -> None:
    real, other = _taps.matched, {"first": "last", "last": "first", "interleave": "interleave"}
    monkeypatch.setattr(_taps, "matched", lambda match, count, total: real(other[match], count, total))
    noticed(
        monkeypatch,
        partial(taps.test_matched_layers_are_those_of_the_corresponding_transformer, "first", [0, 1, 2, 3, 4, 5]),
    )


# ------------------------------------------------------------------------------- dropped captions


def test_the_teacher_drops_captions_of_its_own(monkeypatch: Patch, lesson: targets.Lesson) -> None:
    real = turns.answer

    def own(teacher: Any, given: Batch, **settings: Any) -> Any:
        other = torch.arange(len(given)) % 2 == 1
        return real(teacher, replace(given, text=given.text.where(other, given.null_text)), **settings)

    monkeypatch.setattr(turns, "answer", own)
    noticed(monkeypatch, partial(training.test_teacher_and_student_are_asked_without_the_same_captions, lesson))


def test_a_caption_dropped_for_the_student_alone(monkeypatch: Patch) -> None:
    def text_only(given: Batch, every: int, first: int = 0) -> Batch:
        dropped = torch.arange(len(given)) % every == 0
        return replace(given, text=given.text.where(dropped, given.null_text))

    monkeypatch.setattr(targets, "drop_captions", text_only)
    noticed(monkeypatch, training.test_a_cached_answer_is_that_to_the_dropped_caption)
