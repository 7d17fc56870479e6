"""Every loss in the training loop: a student cut from its teacher learns, the teacher stays as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from loss_cases import losses, value
from tiny_lesson import write_teacher
from torch import Tensor, nn

from nas import targets
from nas.batches import WHOLE, Batch, Batches, Outputs, Part
from nas.bench import embedded_lesson
from nas.build import build
from nas.diffusion import Conditioning, FlowDenoiser
from nas.distill import TrainSettings, predict, train
from nas.edit import RemoveBlock
from nas.inherit import inherit
from nas.network import NetworkSpec
from nas.objectives import Objective, objective
from nas.targets import Fresh, Lesson
from nas.teachers import EmbeddedTeacher, GaussianTeacher
from nas.teachers.embedded import network_spec

SETTINGS = TrainSettings(steps=16, batch=4, lr=1e-3, warmup=1, decay_share=0.3)
ALONE: dict[str, dict[str, Any]] = {
    **{name: {} for name in losses()},
    "self_attention": {"last_features": False},  # its two terms pull at the same layers
}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    found = embedded_lesson(write_teacher(tmp_path_factory.mktemp("teacher")), "shapes")[1]
    with torch.no_grad():
        # As initialised, the block that is going to be removed hardly moves the output.
        teacher_of(found).denoiser.network.get_submodule("mid_block.resnets.0.conv2").weight.mul_(20)
    return found


@dataclass(frozen=True)
class Same:
    """One batch at every step, so that a loss can be followed."""

    data: Batches
    step: int = 0

    @property
    def size(self) -> int:
        return self.data.size

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        return self.data.batch(self.step, part)


def teacher_of(lesson: Lesson) -> EmbeddedTeacher:
    assert isinstance(lesson.teacher, EmbeddedTeacher)
    return lesson.teacher


def student_of(lesson: Lesson, spec: NetworkSpec | None = None) -> FlowDenoiser:
    """The teacher without its middle, with what is left of its weights; or another network, new."""
    teacher = teacher_of(lesson)
    if spec is not None:
        return FlowDenoiser(build(spec, seed=0), teacher.preconditioner, patch=teacher.settings.patch)
    whole = network_spec(teacher.settings)
    cut = RemoveBlock(block="mid_block.resnets.0").apply(whole)
    network = build(cut, "meta")
    state, _ = inherit(cut, whole, teacher.denoiser.network.state_dict())
    network.load_state_dict(state, assign=True)
    return FlowDenoiser(network, teacher.preconditioner, patch=teacher.settings.patch)


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]


def lines(
    lesson: Lesson, student: FlowDenoiser, *objectives: Objective, steps: int = SETTINGS.steps
) -> list[dict[str, float]]:
    """The terms of every step on one batch; nothing of the teacher may have changed."""
    teacher = teacher_of(lesson)
    before = weights(teacher)
    data, settings = Same(Fresh(lesson=lesson, size=4)), replace(SETTINGS, steps=steps)
    trained = train(student, data, objectives, settings, teacher=teacher, report_every=1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(teacher), strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    return [line.terms for line in trained.history]


@pytest.mark.parametrize(("name", "settings"), ALONE.items(), ids=ALONE)
def test_a_student_cut_from_its_teacher_lowers_every_term(lesson: Lesson, name: str, settings: dict[str, Any]) -> None:
    found = lines(lesson, student_of(lesson), objective(name, **settings))
    assert found[0]
    assert found[0].keys() == found[-1].keys()
    # Of a balanced loss the terms have the value of the data's, which falls as far as the teacher agrees with it.
    least = 1.0 if name == "multi_level" else 0.9
    assert all(0 < found[-1][term] < least * found[0][term] for term in found[0])


@pytest.mark.parametrize("name", ["features", "multi_level"])
def test_a_narrower_student_learns_through_projections(lesson: Lesson, name: str) -> None:
    settings = teacher_of(lesson).settings
    narrow = student_of(lesson, network_spec(replace(settings, widths=(4, 8), head_width=4)))
    found = lines(lesson, narrow, objective(name))
    assert sum(found[-1].values()) < sum(found[0].values())


def test_the_published_sum_of_three_losses(lesson: Lesson) -> None:
    # BK-SDM, KOALA and SSD-1B: the data's loss, the output's and one of layers.
    three = (objective("task"), objective("output", weight=0.5), objective("layers", weight=0.5))
    found = lines(lesson, student_of(lesson), *three)
    assert found[0].keys() == {"task", "output", "layers"}
    assert found[-1]["task"] + 0.5 * (found[-1]["output"] + found[-1]["layers"]) < 0.9 * (
        found[0]["task"] + 0.5 * (found[0]["output"] + found[0]["layers"])
    )


def test_losses_of_layers_beside_each_other_see_their_own_layers(lesson: Lesson) -> None:
    ways = {
        "features": objective("features"),
        "layers": objective("layers"),
        "self_attention": objective("self_attention", last_features=False),
    }
    alone = {name: lines(lesson, student_of(lesson), each, steps=1)[0][name] for name, each in ways.items()}
    together = lines(lesson, student_of(lesson), *ways.values(), steps=1)[0]
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_datas_loss_alone_needs_no_teacher(lesson: Lesson) -> None:
    data = Same(Fresh(lesson=lesson, size=4))
    trained = train(student_of(lesson), data, (objective("task"),), SETTINGS, report_every=1)
    assert trained.history[-1].loss < trained.history[0].loss


# ------------------------------------------------------------------ captions dropped for both alike


class Asked:
    """Remembers the text that a network is asked with."""

    def __init__(self, inner: nn.Module) -> None:
        self.texts: list[Tensor] = []
        inner.register_forward_pre_hook(lambda _, given: self.texts.append(given[2].detach().clone()))


def test_teacher_and_student_are_asked_without_the_same_captions(lesson: Lesson) -> None:
    student, teacher = student_of(lesson), copy.deepcopy(teacher_of(lesson))
    seen = [Asked(student.network), Asked(teacher.denoiser.network)]
    data = Fresh(lesson=lesson, size=4, null_every=2)
    settings = replace(SETTINGS, steps=3)
    train(student, data, (objective("output"), objective("features")), settings, teacher=teacher)
    ours, theirs = (torch.stack(each.texts[-3:]) for each in seen)  # the first are of choosing projections
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        dropped = (ours == teacher.null_text().tokens).all(-1).all(-1)
    assert dropped.tolist() == [[True, False] * 2] * 3


def test_a_cached_answer_is_that_to_the_dropped_caption() -> None:
    teacher = GaussianTeacher(mean=torch.zeros(3, 4, 4), sd=torch.tensor(0.5), pull=2.0)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 3, 4, 4, generator=generator), torch.rand(6, generator=generator)
    text = Conditioning(tokens=1 + torch.rand(6, 4, 8, generator=generator))
    said = Outputs(velocity=teacher.velocity(x, t, text), null_velocity=teacher.velocity(x, t, teacher.null_text(6)))
    whole = Batch(x=x, t=t, text=text, null_text=teacher.null_text(), teacher=said)
    given = targets.drop_captions(whole, 2)
    assert [bool((row == 0).all()) for row in given.text.tokens] == [True, False] * 3
    # A student that is its teacher has nothing to learn.
    asked: Any = teacher
    assert float(value(objective("output"), predict(asked, given, with_null=False), given.teacher, given)) == 0
