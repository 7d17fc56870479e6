"""The student that the distillation benchmarks train: the embedded teacher without three of its blocks.

It keeps the teacher's text encoder and caption layout, as students keep a pipeline's text encoders, and starts from the
teacher's weights (the way of BK-SDM and KOALA: remove blocks, inherit the rest).
"""

from __future__ import annotations

from typing import Any

from nas.build import Network, build
from nas.diffusion import FlowDenoiser
from nas.edit import check_wiring
from nas.features import body
from nas.inherit import inherit
from nas.network import NetworkSpec
from nas.targets import Lesson
from nas.teachers import teacher_digest
from nas.trace import trace_block

REMOVED = ("mid_block.resnets.0", "up_blocks.0.resnets.0", "up_blocks.0.attentions.0")


def teacher_network(lesson: Lesson) -> Network:
    """The teacher's UNet."""
    teacher: Any = lesson.teacher
    network = body(teacher)
    assert isinstance(network, Network)
    return network


def student_spec(lesson: Lesson) -> NetworkSpec:
    """The teacher's UNet without `REMOVED`."""
    whole = teacher_network(lesson).spec
    kept = tuple(block for block in whole.blocks if block.name not in REMOVED)
    spec = NetworkSpec(name="embedded-student", input=whole.input, blocks=kept)
    check_wiring(spec)
    return spec


def student(lesson: Lesson, seed: int, *, inherited: bool = True) -> FlowDenoiser:
    """It behind the teacher's preconditioner, from the teacher's weights or from a seed's."""
    teacher: Any = lesson.teacher
    spec, network = student_spec(lesson), teacher_network(lesson)
    made = build(spec, seed=seed)
    if inherited:
        origin = {block.name: block.name for block in spec.blocks}
        state, _ = inherit(spec, network.spec, network.state_dict(), seed=seed, origin=origin)
        made.load_state_dict(state)
    return FlowDenoiser(made, teacher.preconditioner, patch=teacher.settings.patch)


def about() -> dict[str, str]:
    """What `nas sample` and `nas evaluate` must know of a student's file."""
    return {"teacher": "embedded", "teacher_digest": teacher_digest("embedded"), "task": "shapes"}


def macs(spec: NetworkSpec) -> int:
    """Multiply-accumulates of one call for one image."""
    return sum(op.macs for block in spec.blocks for op in trace_block(block))


def params(network: Network) -> int:
    """How many weights it has."""
    return sum(parameter.numel() for parameter in network.parameters())
