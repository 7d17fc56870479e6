"""A network timed beside its prediction: scripted clocks, refusals, and onnxruntime's profile read back to blocks."""

from __future__ import annotations

import json
import math
import types
from dataclasses import replace

import numpy as np
import pytest

from nas.backends import Loaded
from nas.backends._onnx_nodes import GraphNode, NodeProfile, NodeTime, fastest_call, owners, profile_nodes
from nas.build import build, example_inputs
from nas.device import find_target
from nas.errors import NasError, UsageError
from nas.measure.timing import Clocks
from nas.network import NetworkSpec
from nas.profile import candidate_subject
from nas.profile import measured as measuring
from nas.profile.measured import Measured, available_bytes, backend_of, check_memory, measure
from nas.space import load_space
from nas.trace import block_trace

BLOCKS = ("conv_in", "down_blocks.0.resnets.0", "up_blocks.0.resnets.0")
SHEET = find_target("cpu-onnxruntime")


@pytest.fixture(scope="module")
def spec() -> NetworkSpec:
    return candidate_subject(load_space("decoder").at_resolution(64).reference("taesd"), "taesd").spec


# Whose node it is


def node(name: str, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> GraphNode:
    return GraphNode(name=name, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([node("conv_in::/conv/Conv")], ["conv_in"]),
        ([node("down_blocks.0.resnets.0::/conv1/Conv_nchwc", ("r1",), ("r2",))], ["down_blocks.0.resnets.0"]),
        ([node("up_blocks.0.resnets.0::/MatMul/MatMulAddFusion/")], ["up_blocks.0.resnets.0"]),
        ([node("Gelu_token_419", ("x",), ("conv_in::/ff/Mul_3_output_0",))], ["conv_in"]),
        (
            [node("conv_in::/Conv", ("x",), ("t1",)), node("ReorderOutput_3", ("t1",), ("t2",)), node("R4", ("t2",))],
            ["conv_in", "conv_in", "conv_in"],
        ),
        ([node("ReorderInput_9", ("x",), ("t",)), node("out_nchwc", ("t",), ("out",))], [None, None]),
        ([node("conv_inn::/Conv"), node("down_blocks.0::/Conv"), node("Conv_7")], [None, None, None]),
        # The name goes before the output, and the output before the writer of what is read.
        (
            [
                node("conv_in::/Conv", (), ("t",)),
                node("up_blocks.0.resnets.0::/Add", ("t",), ("conv_in::/y",)),
                node("Fused_1", ("t",), ("up_blocks.0.resnets.0::/z",)),
            ],
            ["conv_in", "up_blocks.0.resnets.0", "up_blocks.0.resnets.0"],
        ),
    ],
    ids=["name", "blocked", "fused", "output", "writer", "nothing known", "other prefixes", "order"],
)
def test_owner_of_a_node(nodes, found):
    assert [owners(nodes, BLOCKS)[n.name] for n in nodes] == found


def event(cat: str, name: str, ts: int, dur: int, op: str = "Conv") -> dict:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}}


def test_the_fastest_call_is_read_and_what_is_unmapped_is_told():
    events = [
        event("Session", "model_loading_uri", 0, 10),
        event("Session", "model_run", 100, 90),
        event("Node", "conv_in::/Conv_kernel_time", 110, 60),
        event("Session", "model_run", 200, 50),
        event("Node", "conv_in::/Conv_fence_before", 205, 9),
        event("Node", "conv_in::/Conv_kernel_time", 210, 30),
        event("Node", "stray_kernel_time", 241, 6, op="Add"),
    ]
    found = fastest_call(events, {"conv_in::/Conv": "conv_in", "stray": None})
    assert (found.call_ms, found.calls) == (0.05, 2)
    assert found.kernel_ms == pytest.approx(0.036)
    assert found.by_block() == {"conv_in": pytest.approx(0.030)}
    assert list(found.by_operator()) == ["Conv", "Add"]
    assert found.mapped_share == pytest.approx(30 / 36)
    assert [n.name for n in found.unmapped] == ["stray"]
    with pytest.raises(NasError, match="holds no call"):
        fastest_call(events[:1], {})


def test_onnxruntime_is_mapped_back_to_blocks(spec):
    names = [block.name for block in spec.blocks]
    found = profile_nodes(build(spec, seed=0).eval(), example_inputs(spec), SHEET.target, names, calls=2)
    assert found.calls == 2
    assert found.mapped_share > 0.99
    assert set(found.by_block()) <= set(names)
    # Every block with a convolution runs at least one kernel of its own.
    working = {b.name for b in spec.blocks if any(op.kind == "conv" for op in block_trace(b).ops)}
    assert working <= set(found.by_block())
    assert "Conv" in found.by_operator()


# Timing


class World:
    """Time passes only when a subject runs: a block takes 3 ms per MAC-bearing operator, the whole 10 % more."""

    NAME = "scripted"

    def __init__(self) -> None:
        self.now = 0.0
        self.loads = 0

    def unavailable(self) -> str | None:
        return None

    def load(self, module, inputs, target, options):
        self.loads += 1
        ms = 3.0 * sum(1 for m in module.modules() if type(m).__name__ == "Conv2d")
        ms *= 1.1 if hasattr(module, "spec") else 1.0

        def run():
            self.now += ms / 1e3
            return np.zeros(1)

        return Loaded(run=run, description={"runtime": "scripted", "threads": 1})

    @property
    def clocks(self) -> Clocks:
        return Clocks(wall=lambda: self.now, cpu=lambda: self.now)


@pytest.fixture
def world(monkeypatch):
    made = World()
    monkeypatch.setattr(measuring, "registry", types.SimpleNamespace(load=lambda package, name: made))
    return made


def scripted_sheet():
    return replace(SHEET, target=replace(SHEET.target, runtime="scripted"), chip="another chip")


def test_blocks_alone_are_held_against_the_whole(spec, world):
    said = []
    found = measure(spec, scripted_sheet(), lambda *r: said.append(r), clocks=world.clocks, available=lambda: 10**12)
    distinct = {block.key for block in spec.blocks}
    assert found.distinct == len(distinct) < len(spec.blocks)
    assert world.loads == len(distinct) + 1
    assert list(found.blocks_ms) == [block.name for block in spec.blocks]
    assert found.block_sum_over_whole == pytest.approx(1 / 1.1)
    assert found.whole_ms == pytest.approx(1.1 * sum(found.blocks_ms.values()))
    assert len(found.samples_ms) >= 7
    assert found.contention == pytest.approx(1.0)
    assert found.other_chip == "another chip"
    assert found.nodes is None
    assert found.best_ms == found.blocks_ms
    assert said[0][0] == "load"
    json.dumps(found.to_json(), allow_nan=False)


def test_a_measured_whole_is_divided_as_its_kernels_are():
    nodes = (
        NodeTime(name="a", operator="Conv", ms=6.0, block="conv_in"),
        NodeTime(name="b", operator="Add", ms=3.0, block="head"),
        NodeTime(name="c", operator="Add", ms=1.0, block=None),
    )
    found = Measured(
        whole_ms=5.0,
        samples_ms=(5.0,),
        cpu_samples_ms=(5.0,),
        blocks_ms={"conv_in": 2.5, "head": 2.0},
        distinct=2,
        statistic="min_cpu",
        protocol="",
        contention=1.0,
        environment={},
        chip="",
        nodes=NodeProfile(nodes=nodes, call_ms=11.0, calls=3),
    )
    assert found.in_network_ms == {"conv_in": pytest.approx(3.0), "head": pytest.approx(1.5)}
    assert sum(found.in_network_ms.values()) == pytest.approx(found.nodes.mapped_share * found.whole_ms)
    assert found.best_ms == found.in_network_ms
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [n["name"] for n in data["nodes"]["unmapped"]] == ["c"]
    assert data["nodes"]["mapped_share"] == pytest.approx(0.9)


def test_numbers_that_are_not_finite_are_refused(spec, world, monkeypatch):
    broken = Loaded(run=lambda: np.array([math.nan]), description={})
    monkeypatch.setattr(world, "load", lambda *_: broken)
    with pytest.raises(NasError, match="not finite"):
        measure(spec, scripted_sheet(), available=lambda: 10**12)


def test_a_device_without_a_backend_is_refused():
    with pytest.raises(UsageError, match="iphone cannot be measured from here: its sheet names no backend"):
        backend_of(find_target("iphone"))


def test_a_backend_that_cannot_run_says_why(world, monkeypatch):
    monkeypatch.setattr(world, "unavailable", lambda: "the package scripted is not installed")
    with pytest.raises(
        NasError, match="cpu-onnxruntime cannot be measured here: the package scripted is not installed"
    ):
        backend_of(SHEET)


def test_a_network_that_does_not_fit_is_refused(spec):
    weights = 4 * sum(block_trace(block).params for block in spec.blocks)
    check_memory(spec, SHEET, 10**12)
    with pytest.raises(NasError, match=r"needs about [\d.]+ GB of memory .* 0\.0 GB are free"):
        check_memory(spec, SHEET, weights)
    assert available_bytes() > 10**6
