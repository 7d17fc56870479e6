"""The contract of every loss, found by listing the folder, and what each one's value must be."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import FEATURES, batch, changed, losses, of_features, outputs, perfect, tensors, value
from torch import Tensor
from torch.nn import functional

from nas.batches import Batch, Outputs
from nas.errors import NasError, UsageError
from nas.objectives import objective, total

NAMES = losses()
# The contract holds for every way of comparing, not only the default one.
CASES = [
    *(pytest.param(name, {}, id=name) for name in NAMES),
    pytest.param("output", {"space": "noise"}, id="output-noise"),
    pytest.param("task", {"space": "clean"}, id="task-clean"),
    pytest.param("features", {"normalise": "teacher_norm"}, id="features-teacher_norm"),
    pytest.param("features", {"normalise": "layer_norm"}, id="features-layer_norm"),
    pytest.param("features", {"mask_sd": 2.0}, id="features-masked"),
    pytest.param("multi_level", {"scale_features": False}, id="multi_level-unscaled"),
    pytest.param("multi_level", {"points": "none"}, id="multi_level-no_layers"),
]
Settings = dict[str, object]


def test_the_folder_holds_the_losses_of_the_published_systems() -> None:
    assert {"output", "text", "task", "features", "self_attention", "layers", "multi_level"} <= set(NAMES)


@pytest.mark.parametrize(("name", "settings"), CASES)
class TestContract:
    def test_finite_and_positive_apart_from_the_teacher(self, name: str, settings: Settings) -> None:
        loss = value(objective(name, **settings), outputs(1), outputs(2), batch())
        assert loss.shape == ()
        assert bool(torch.isfinite(loss))
        assert float(loss) > 0

    def test_minimum_where_student_teacher_and_data_agree(self, name: str, settings: Settings) -> None:
        given = batch()
        student = perfect(given, grad=True)
        loss = value(objective(name, **settings), student, perfect(given), given)
        loss.backward()
        assert float(loss.detach()) == 0
        gradients = [tensor.grad for tensor in tensors(student).values() if tensor.grad is not None]
        assert gradients
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients)

    def test_gradient_to_the_student_only(self, name: str, settings: Settings) -> None:
        student, teacher = outputs(1, grad=True), outputs(2, grad=True)
        value(objective(name, **settings), student, teacher, batch()).backward()
        gradients = [tensor.grad for tensor in tensors(student).values() if tensor.grad is not None]
        assert gradients
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert max(float(gradient.abs().max()) for gradient in gradients) > 0
        assert all(tensor.grad is None for tensor in tensors(teacher).values())

    def test_gradient_step_lowers_it(self, name: str, settings: Settings) -> None:
        student, teacher, given = outputs(1, grad=True), outputs(2), batch()
        before = value(objective(name, **settings), student, teacher, given)
        before.backward()
        gradients = {key: tensor.grad for key, tensor in tensors(student).items()}

        def step(key: str, tensor: Tensor) -> Tensor:
            gradient = gradients[key]
            return tensor.detach() if gradient is None else tensor.detach() - 0.1 * gradient

        assert float(value(objective(name, **settings), changed(student, step), teacher, given)) < float(
            before.detach()
        )

    def test_batch_mean(self, name: str, settings: Settings) -> None:
        each, student, teacher, given = objective(name, **settings), outputs(1), outputs(2), batch()
        rows = [slice(i, i + 1) for i in range(4)]
        single = [value(each, student.rows(row), teacher.rows(row), given.rows(row)) for row in rows]
        assert len({float(loss) for loss in single}) == 4
        torch.testing.assert_close(value(each, student, teacher, given), torch.stack(single).mean())

    def test_bfloat16_is_near_float32(self, name: str, settings: Settings) -> None:
        student, teacher, given = outputs(1), outputs(2), batch()
        half = [changed(each, lambda _, tensor: tensor.bfloat16()) for each in (student, teacher)]
        loss = value(objective(name, **settings), half[0], half[1], given)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, value(objective(name, **settings), student, teacher, given), rtol=0.02, atol=0)

    def test_float64_stays_float64(self, name: str, settings: Settings) -> None:
        double = {"dtype": torch.float64}
        loss = value(objective(name, **settings), outputs(1, **double), outputs(2, **double), batch(**double))
        assert loss.dtype == torch.float64

    def test_weight_multiplies_the_total_and_not_the_terms(self, name: str, settings: Settings) -> None:
        student, teacher, given = outputs(1), outputs(2), batch()
        plain, terms = total((objective(name, **settings),), student, teacher, given)
        heavy, heavy_terms = total((objective(name, weight=3.0, **settings),), student, teacher, given)
        torch.testing.assert_close(heavy, 3 * plain)
        assert {k: float(v) for k, v in terms.items()} == {k: float(v) for k, v in heavy_terms.items()}

    def test_settings_are_frozen(self, name: str, settings: Settings) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            objective(name, **settings).weight = 2.0  # type: ignore[misc]

    def test_an_unknown_setting_offers_the_nearest(self, name: str, settings: Settings) -> None:
        with pytest.raises(
            UsageError, match=f"unknown setting 'wieght' in the objective {name}; did you mean 'weight'"
        ):
            objective(name, wieght=1.0)


# ----------------------------------------------------------------------------------------- velocities


def constant(velocity: float, null: float | None = None) -> Outputs:
    full = torch.full((2, 1, 2, 2), velocity)
    return Outputs(velocity=full, null_velocity=None if null is None else torch.full((2, 1, 2, 2), null))


def of_data(velocity: float, t: float = 0.25) -> Batch:
    """Two images whose own velocity is everywhere the same."""
    clean = torch.full((2, 1, 2, 2), 3.0)
    return dataclasses.replace(
        batch(rows=2), clean=clean, noise=clean + velocity, t=torch.full((2,), t), images=None, x=None
    )


def test_output_values() -> None:
    each, given = objective("output"), of_data(0)
    assert not each.needs_null
    assert each.needs_teacher
    assert float(value(each, constant(3), constant(1), given)) == 4
    # With predictions without a caption, the mean of both errors: (4 + 9) / 2.
    assert float(value(each, constant(3, 4), constant(1, 1), given)) == 6.5
    assert float(value(each, constant(3, 4), constant(1), given)) == 4


@pytest.mark.parametrize(("space", "factor"), [("velocity", 1), ("noise", 0.75**2), ("clean", 0.25**2)])
def test_spaces_weigh_the_same_error(space: str, factor: float) -> None:
    given = of_data(1)
    assert float(value(objective("output", space=space), constant(3), constant(1), given)) == 4 * factor
    assert float(value(objective("task", space=space), constant(3), None, given)) == 4 * factor


def test_task_looks_at_the_data_and_at_no_teacher() -> None:
    each = objective("task")
    assert not each.needs_teacher
    assert not each.needs_null
    assert float(value(each, constant(3), None, of_data(1))) == 4
    # How often a caption is dropped is the data's choice, so an answer without one changes nothing.
    assert float(value(each, constant(3, 9), constant(8), of_data(1))) == 4


@pytest.mark.parametrize("name", ["output", "task"])
def test_an_unknown_space_offers_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match="did you mean 'noise'"):
        objective(name, space="noises")


@pytest.mark.parametrize("name", ["task", "multi_level"])
def test_prompts_without_images_are_refused(name: str) -> None:
    given = dataclasses.replace(batch(), clean=None, noise=None, x=torch.zeros(4, 3, 4, 4))
    with pytest.raises(NasError, match="needs the noise"):
        value(objective(name), outputs(1), outputs(2), given)


def test_text_sees_only_the_difference() -> None:
    each, given = objective("text"), of_data(0)
    assert each.needs_null
    assert float(value(each, constant(3, 2), constant(8, 7), given)) == 0
    assert float(value(each, constant(3, 2), constant(8, 5), given)) == 4


def test_text_gradient_reaches_both_predictions() -> None:
    student = outputs(1, grad=True)
    value(objective("text"), student, outputs(2), batch()).backward()
    assert student.null_velocity is not None
    assert student.velocity.grad is not None
    assert student.null_velocity.grad is not None
    torch.testing.assert_close(student.null_velocity.grad, -student.velocity.grad)


def test_text_without_null_is_an_error() -> None:
    with pytest.raises(NasError, match="without a caption"):
        value(objective("text"), constant(1), constant(1, 1), of_data(0))


# ------------------------------------------------------------------------------------------- features


def maps(*levels: float) -> list[Tensor]:
    """One feature per level, two rows, of constants."""
    return [torch.full((2, 3, 2, 2), level) for level in levels]


@pytest.mark.parametrize("name", ["features", "layers"])
def test_layers_are_summed_each_once(name: str) -> None:
    student, teacher = of_features(maps(1, 2, 3), maps(0, 0, 0))
    assert float(value(objective(name), student, teacher, batch(rows=2))) == 1 + 4 + 9


def test_self_attention_and_last_features_are_terms_of_their_own() -> None:
    student, teacher = of_features(maps(1, 2, 3, 4), maps(0, 0, 0, 0))
    _, terms = total((objective("self_attention"),), student, teacher, batch(rows=2))
    assert {name: float(term) for name, term in terms.items()} == {"self_attention": 5, "last_features": 25}
    student, teacher = of_features(maps(1, 2), maps(0, 0))
    assert set(objective("self_attention")(student, teacher, batch(rows=2))) == {"self_attention"}


@pytest.mark.parametrize("name", ["features", "layers", "self_attention", "multi_level"])
def test_a_feature_without_counterpart_is_an_error(name: str) -> None:
    given = batch(rows=2)
    student, teacher = of_features(maps(1, 2), maps(1, 2), velocity=given.velocity)
    key = next(iter(FEATURES))
    other = dataclasses.replace(teacher, features=teacher.features | {key: torch.zeros(2, 3, 4, 4)})
    with pytest.raises(NasError, match=rf"layer {key}: the student has the shape \(2, 3, 2, 2\) .* \(2, 3, 4, 4\)"):
        value(objective(name), student, other, given)
    missing = dataclasses.replace(teacher, features={})
    with pytest.raises(NasError, match="and the teacher nothing"):
        value(objective(name), student, missing, given)
    with pytest.raises(NasError, match="was given the outputs of none"):
        value(objective(name), dataclasses.replace(student, features={}), teacher, given)


def test_teacher_norm_makes_scale_irrelevant() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    each, given = objective("features", normalise="teacher_norm"), batch(rows=2)
    plain = value(each, *of_features([ours], [theirs]), given)
    scaled = value(each, *of_features([1000 * ours], [1000 * theirs]), given)
    torch.testing.assert_close(plain, scaled)
    # LAPTOP: the sum of squared differences over the teacher's sum of squares, for every example.
    expected = ((ours - theirs).square().sum((1, 2, 3)) / theirs.square().sum((1, 2, 3))).mean()
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 16, 6)], ids=["map", "tokens"])
def test_layer_norm_ignores_scale_and_shift_of_a_tokens_channels(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    each, given = objective("features", normalise="layer_norm"), batch(rows=2)
    plain = value(each, *of_features([ours], [theirs]), given)
    torch.testing.assert_close(plain, value(each, *of_features([5 * ours + 2], [theirs]), given), rtol=1e-5, atol=0)
    tokens = [each.flatten(2).transpose(1, 2) if len(shape) == 4 else each for each in (ours, theirs)]
    normed = [functional.layer_norm(each, (6,), eps=1e-6) for each in tokens]
    torch.testing.assert_close(plain, functional.mse_loss(*normed))


def test_masks_remove_outliers_of_each_side_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 16, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    theirs[0, 3, 2] = 500.0  # a massive activation
    each, given = objective("features", mask_sd=2.0), batch(rows=2)

    def kept(feature: Tensor) -> Tensor:
        return torch.stack([row.where((row - row.mean()).abs() < 2 * row.std(), torch.zeros(())) for row in feature])

    expected = functional.mse_loss(kept(ours), kept(theirs))
    torch.testing.assert_close(value(each, *of_features([ours], [theirs]), given), expected)
    assert float(expected) < 10 < float(value(objective("features"), *of_features([ours], [theirs]), given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "layernorm"}, "did you mean 'layer_norm'"),
        ({"mask_sd": 0.0}, "mask_sd must be above 0, got 0"),
        ({"mask_sd": math.nan}, "mask_sd must be above 0, got nan"),
        ({"points": "stage"}, "did you mean 'stages'"),
        ({"points": ""}, "unknown points ''"),
    ],
)
def test_bad_settings_of_features(settings: Settings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective("features", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("self_attention", {"match": "interleaved"}, "did you mean 'interleave'"),
        ("self_attention", {"stages": "decoders"}, "did you mean 'decoder'"),
        ("multi_level", {"points": "lst"}, "did you mean 'last'"),
    ],
)
def test_bad_settings_of_the_others(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective(name, **settings)


# ----------------------------------------------------------------------------------------- composition


def test_several_objectives_add_up() -> None:
    student, teacher, given = outputs(1), outputs(2), batch()
    both = (objective("output"), objective("text", weight=0.5))
    loss, terms = total(both, student, teacher, given)
    assert set(terms) == {"output", "text"}
    torch.testing.assert_close(loss, terms["output"] + 0.5 * terms["text"])


def test_unknown_objective_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'output'"):
        objective("outputs")
