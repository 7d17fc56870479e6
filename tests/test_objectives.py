"""The contract of every objective, found by listing the folder, and what each one's value must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas import registry
from nas.errors import NasError, UsageError
from nas.objectives import Objective, Outputs, objective, total

NAMES = registry.plugins("nas.objectives")


def outputs(seed: int, *, null: bool = True, rows: int = 4, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, 3, 4, 4, generator=generator) for _ in range(2))
    if grad:
        first.requires_grad_()
        second.requires_grad_()
    return Outputs(velocity=first, null_velocity=second if null else None)


def value(each: Objective, student: Outputs, teacher: Outputs) -> Tensor:
    return total((each,), student, teacher)[0]


def rows_of(given: Outputs, index: slice) -> Outputs:
    assert given.null_velocity is not None
    return Outputs(velocity=given.velocity[index], null_velocity=given.null_velocity[index])


def test_the_folder_holds_objectives() -> None:
    assert {"output", "text"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_finite_and_positive_apart_from_the_teacher(self, name: str) -> None:
        loss = value(objective(name), outputs(0), outputs(1))
        assert loss.shape == ()
        assert bool(torch.isfinite(loss))
        assert float(loss) > 0

    def test_minimum_where_student_equals_teacher(self, name: str) -> None:
        student, teacher = outputs(0, grad=True), outputs(0)
        loss = value(objective(name), student, teacher)
        loss.backward()
        assert float(loss.detach()) == 0
        assert student.velocity.grad is not None
        assert float(student.velocity.grad.abs().max()) == 0

    def test_gradient_to_the_student_only(self, name: str) -> None:
        student, teacher = outputs(0, grad=True), outputs(1, grad=True)
        value(objective(name), student, teacher).backward()
        assert student.velocity.grad is not None
        assert float(student.velocity.grad.abs().max()) > 0
        assert teacher.velocity.grad is None
        assert teacher.null_velocity is not None
        assert teacher.null_velocity.grad is None

    def test_gradient_step_lowers_it(self, name: str) -> None:
        student, teacher = outputs(0, grad=True), outputs(1)
        before = value(objective(name), student, teacher)
        before.backward()
        assert student.velocity.grad is not None
        moved = Outputs(velocity=student.velocity - student.velocity.grad, null_velocity=student.null_velocity)
        assert float(value(objective(name), moved, teacher).detach()) < float(before.detach())

    def test_batch_mean(self, name: str) -> None:
        each, student, teacher = objective(name), outputs(0), outputs(1)
        single = [value(each, rows_of(student, slice(i, i + 1)), rows_of(teacher, slice(i, i + 1))) for i in range(4)]
        torch.testing.assert_close(value(each, student, teacher), torch.stack(single).mean())

    def test_bfloat16_is_near_float32(self, name: str) -> None:
        student, teacher = outputs(0), outputs(1)
        half = [
            Outputs(
                velocity=o.velocity.bfloat16(),
                null_velocity=None if o.null_velocity is None else o.null_velocity.bfloat16(),
            )
            for o in (student, teacher)
        ]
        loss = value(objective(name), *half)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, value(objective(name), student, teacher), rtol=0.02, atol=0)

    def test_weight_multiplies_the_total_and_not_the_terms(self, name: str) -> None:
        student, teacher = outputs(0), outputs(1)
        plain, terms = total((objective(name),), student, teacher)
        heavy, heavy_terms = total((objective(name, weight=3.0),), student, teacher)
        torch.testing.assert_close(heavy, 3 * plain)
        assert {k: float(v) for k, v in terms.items()} == {k: float(v) for k, v in heavy_terms.items()}

    def test_settings_are_frozen(self, name: str) -> None:
        with pytest.raises(AttributeError):
            objective(name).weight = 2.0  # type: ignore[misc]


def constant(velocity: float, null: float | None) -> Outputs:
    full = torch.full((2, 1, 2, 2), velocity)
    return Outputs(velocity=full, null_velocity=None if null is None else torch.full((2, 1, 2, 2), null))


def test_output_values() -> None:
    each = objective("output")
    assert not each.needs_null
    assert float(value(each, constant(3, None), constant(1, None))) == 4
    # With predictions without a caption, the mean of both errors: (4 + 9) / 2.
    assert float(value(each, constant(3, 4), constant(1, 1))) == 6.5
    assert float(value(each, constant(3, 4), constant(1, None))) == 4


def test_text_sees_only_the_difference() -> None:
    each = objective("text")
    assert each.needs_null
    assert float(value(each, constant(3, 2), constant(8, 7))) == 0
    assert float(value(each, constant(3, 2), constant(8, 5))) == 4


def test_text_gradient_reaches_both_predictions() -> None:
    student = outputs(0, grad=True)
    value(objective("text"), student, outputs(1)).backward()
    assert student.null_velocity is not None
    assert student.velocity.grad is not None
    assert student.null_velocity.grad is not None
    torch.testing.assert_close(student.null_velocity.grad, -student.velocity.grad)


def test_text_without_null_is_an_error() -> None:
    with pytest.raises(NasError, match="without a caption"):
        value(objective("text"), constant(1, None), constant(1, 1))


def test_several_objectives_add_up() -> None:
    student, teacher = outputs(0), outputs(1)
    both = (objective("output"), objective("text", weight=0.5))
    loss, terms = total(both, student, teacher)
    assert set(terms) == {"output", "text"}
    torch.testing.assert_close(loss, terms["output"] + 0.5 * terms["text"])


def test_unknown_objective_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'output'"):
        objective("outputs")
