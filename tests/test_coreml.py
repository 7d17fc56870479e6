"""Core ML packages: what the file holds is what the module is; prediction itself needs a Mac."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.build import build, build_block, example_inputs
from nas.errors import NasError, UsageError
from nas.exporters import coreml
from nas.families import network
from nas.network import BlockSpec
from nas.space import load_space
from tests.block_specs import SPECS

if reason := coreml.unavailable():
    pytest.skip(reason, allow_module_level=True)

with coreml.calm():
    from coremltools.proto import MIL_pb2


class Pair(nn.Module):
    """Two inputs and outputs, a convolution, a linear layer, attention, and a dropout that tells the modes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 96, 3, padding=1)
        self.linear = nn.Linear(96, 96)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.drop(self.conv(x)).flatten(2).transpose(1, 2)
        query = self.linear(tokens)
        return F.gelu(F.scaled_dot_product_attention(query, text, text), approximate="tanh"), F.gelu(tokens)


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    # Not in the order of forward.
    return {"text": torch.randn(1, 7, 96), "x": torch.randn(1, 64, 4, 6)}


@pytest.fixture(scope="module")
def package(pair: Pair, inputs: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coreml.export(pair, inputs, tmp_path_factory.mktemp("coreml") / "deep" / "pair.mlpackage")


def test_inputs_and_outputs_are_named_and_half(package: Path) -> None:
    held = coreml.contents(package)
    assert held.inputs == {"x": ((1, 64, 4, 6), "float16"), "text": ((1, 7, 96), "float16")}
    assert held.outputs == {"out": ((1, 24, 96), "float16"), "out_1": ((1, 24, 96), "float16")}


def test_operators_are_those_of_the_module(package: Path) -> None:
    held = coreml.contents(package)
    multiplying = {name: held.operators[name] for name in coreml.MULTIPLYING if name in held.operators}
    assert multiplying == {"conv": 1, "linear": 1, "matmul": 2}
    assert held.products == 4
    assert held.operators["softmax"] == 1


def test_both_forms_of_gelu_stay_what_they_are(package: Path) -> None:
    (block,) = coreml.open_package(package).get_spec().mlProgram.functions["main"].block_specializations.values()
    constants = {
        op.outputs[0].name: op.attributes["val"].immediateValue.tensor.strings.values
        for op in block.operations
        if op.type == "const"
    }
    modes = [constants[op.inputs["mode"].arguments[0].name][0] for op in block.operations if op.type == "gelu"]
    assert sorted(modes) == ["EXACT", "TANH_APPROXIMATION"]


def test_times_and_their_angles_keep_their_digits(tmp_path: Path) -> None:
    spec = SPECS["time_embedding"][0]
    path = coreml.export(build_block(spec), {"timestep": torch.tensor([999.0])}, tmp_path / "time.mlpackage")
    assert coreml.contents(path).inputs == {"timestep": ((1,), "float32")}
    (block,) = coreml.open_package(path).get_spec().mlProgram.functions["main"].block_specializations.values()
    made_by = {output.name: op for op in block.operations for output in op.outputs}
    waves = [op for op in block.operations if op.type in ("sin", "cos")]
    assert len(waves) == 2
    for op in [*waves, *(made_by[wave.inputs["x"].arguments[0].name] for wave in waves)]:
        assert op.outputs[0].type.tensorType.dataType == MIL_pb2.DataType.FLOAT32
    (last,) = (op for op in block.operations if op.outputs[0].name == "out")
    assert last.outputs[0].type.tensorType.dataType == MIL_pb2.DataType.FLOAT16


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, scale=3.0)


def test_an_argument_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NasError, match=r"coremltools drops scale=3\.0 of the operator aten\.scaled_dot_product"):
        coreml.export(Scaled(), {"x": torch.ones(1, 4, 8)}, tmp_path / "s.mlpackage")


def test_weights_are_the_modules_own(package: Path, pair: Pair) -> None:
    from coremltools.optimize.coreml import get_weights_metadata

    stored = [meta.val for meta in get_weights_metadata(coreml.open_package(package), weight_threshold=1000).values()]
    for wanted in (pair.conv.weight, pair.linear.weight):
        half = wanted.detach().numpy().astype(np.float16)
        assert any(value.shape == half.shape and np.array_equal(value, half) for value in stored)


def test_weight_bytes_follow_precision_and_compression(
    package: Path, pair: Pair, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    elements = pair.conv.weight.numel() + pair.linear.weight.numel()
    assert coreml.contents(package).weight_bytes == pytest.approx(2 * elements, rel=0.02)
    full = coreml.export(pair, inputs, tmp_path / "full.mlpackage", precision="fp32")
    assert coreml.contents(full).weight_bytes == pytest.approx(4 * elements, rel=0.02)
    assert {dtype for _, dtype in coreml.contents(full).inputs.values()} == {"float32"}
    for weights, bits in (("int8", 8), ("6-bit", 6), ("4-bit", 4)):
        small = coreml.export(pair, inputs, tmp_path / "small.mlpackage", weights=weights)
        assert coreml.contents(small).weight_bytes == pytest.approx(elements * bits / 8, rel=0.04)


def test_a_package_is_replaced_and_the_mode_is_kept(pair: Pair, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "pair.mlpackage"
    (path / "old").mkdir(parents=True)
    pair.train()
    assert coreml.export(pair, inputs, path) == path
    assert pair.training
    assert not (path / "old").exists()


def test_nothing_is_printed_and_no_filter_stays(
    pair: Pair, inputs: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from coremltools.converters.mil.mil.passes import pass_pipeline

    before = pass_pipeline.tqdm
    coreml.export(pair, inputs, tmp_path / "pair.mlpackage", weights="int8")
    assert capfd.readouterr() == ("", "")
    assert pass_pipeline.tqdm is before
    assert not logging.getLogger("coremltools").filters


def test_an_operator_without_core_ml_form_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NasError, match=r"Inverse cannot be written as Core ML: .*linalg_inv") as caught:
        coreml.export(Inverse(), {"x": torch.eye(3)[None]}, tmp_path / "i.mlpackage")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "i.mlpackage").exists()


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("pair.mlmodel", {}, r"ends in \.mlpackage, got 'pair\.mlmodel'"),
        ("pair.mlpackage", {"precision": "fp8"}, "unknown precision 'fp8'"),
        ("pair.mlpackage", {"weights": "5-bit"}, "unknown weights '5-bit'.*4-bit, 6-bit, int8"),
    ],
)
def test_what_it_cannot_write_is_refused(
    name: str, options: dict[str, str], named: str, pair: Pair, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=named):
        coreml.export(pair, inputs, tmp_path / name, **options)


def test_a_package_that_lost_a_product_is_refused(
    pair: Pair, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml, "products", lambda program: 5)
    with pytest.raises(NasError, match="has 4 matrix products and convolutions, the module has 5"):
        coreml.export(pair, inputs, tmp_path / "pair.mlpackage")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML predicts here")
def test_parity_is_not_checked_off_macos(package: Path, pair: Pair, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(NasError, match="not checked here: Core ML predicts only on macOS"):
        coreml.verify(package, pair, inputs)


def test_what_may_differ_follows_precision_and_is_open_for_compressed_weights() -> None:
    assert coreml.allowed(precision="fp32") < coreml.allowed()
    assert coreml.allowed(weights="4-bit") is None


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML predicts only on macOS")
def test_it_computes_what_torch_computes(package: Path, pair: Pair, inputs: dict[str, Tensor]) -> None:
    assert coreml.verify(package, pair, inputs) < coreml.allowed()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec, _ in SPECS.values()], ids=lambda spec: spec.name)
def test_every_block_kind_converts(spec: BlockSpec, tmp_path: Path) -> None:
    torch.manual_seed(2)
    given = {name: torch.randn(1, *shape) for name, shape in spec.inputs}
    held = coreml.contents(coreml.export(build_block(spec), given, tmp_path / "block.mlpackage"))
    assert set(held.inputs) == set(given)
    assert next(iter(held.outputs)) == coreml.OUTPUT
    assert len(held.outputs) == len(spec.writes)


@pytest.mark.slow
def test_a_whole_network_converts(tmp_path: Path) -> None:
    space = load_space("decoder")
    spec = network(space.at_resolution(4 * space.input.pixels_per_latent).reference(space.references[0].name))
    given = example_inputs(spec)
    path = coreml.export(build(spec), given, tmp_path / "network.mlpackage")
    assert coreml.contents(path).inputs == {"sample": ((1, *spec.inputs["x"]), "float16")}
