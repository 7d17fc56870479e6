"""Exporters: every one keeps the contract; ONNX files compute what the module computes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas import registry
from nas.build import build_block
from nas.errors import NasError, UsageError
from nas.exporters import in_forward_order, onnx
from nas.network import BlockSpec
from tests.block_specs import SPECS

NAMES = registry.plugins("nas.exporters")


class Mix(nn.Module):
    """Two inputs whose roles differ, and a dropout that tells training mode from eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.drop(self.linear(x)) + 2 * shift
        return y if gate is None else y * gate


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


@pytest.fixture
def mix() -> Mix:
    torch.manual_seed(0)
    return Mix()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"gate": torch.randn(1, 2), "shift": torch.randn(1, 2), "x": torch.randn(1, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    plugin = registry.load("nas.exporters", name)
    assert list(inspect.signature(plugin.export).parameters)[:3] == ["module", "inputs", "path"]
    reason = plugin.unavailable()
    assert reason is None or isinstance(reason, str)


def test_inputs_are_put_in_the_order_of_forward(mix: Mix, inputs: dict[str, Tensor]) -> None:
    assert list(in_forward_order(mix, inputs)) == ["x", "shift", "gate"]
    del inputs["gate"]
    assert list(in_forward_order(mix, inputs)) == ["x", "shift"]


@pytest.mark.parametrize(("drop", "add", "named"), [("x", None, "x"), (None, "text", "text")])
def test_wrong_inputs_are_named(
    mix: Mix, inputs: dict[str, Tensor], drop: str | None, add: str | None, named: str
) -> None:
    inputs = {key: value for key, value in inputs.items() if key != drop}
    if add:
        inputs[add] = torch.zeros(1)
    with pytest.raises(UsageError, match=rf"missing or not known: {named}\)"):
        in_forward_order(mix, inputs)


def test_onnx_computes_the_same_and_keeps_the_mode(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    mix.train()
    path = onnx.export(mix, inputs, tmp_path / "deep" / "mix.onnx")
    assert mix.training
    assert onnx.verify(path, mix, inputs) < 1e-6
    assert mix.training
    other = {name: tensor + 1.0 for name, tensor in inputs.items()}
    assert onnx.verify(path, mix, other) < 1e-6


def test_verify_sees_another_weight(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    path = onnx.export(mix, inputs, tmp_path / "mix.onnx")
    with torch.no_grad():
        mix.linear.bias += 0.25
    expected = float((0.25 * inputs["gate"]).abs().max())
    assert onnx.verify(path, mix, inputs) == pytest.approx(expected, rel=1e-3)


def test_a_module_too_large_for_one_file_is_refused(
    mix: Mix, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "INLINE_BYTES", 20)
    with pytest.raises(NasError, match=r"Mix has 0\.0 GB of weights; only networks made of blocks"):
        onnx.export(mix, inputs, tmp_path / "mix.onnx")
    assert not list(tmp_path.iterdir())


def test_an_operator_without_onnx_form_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NasError, match="Inverse cannot be written as ONNX") as caught:
        onnx.export(Inverse(), {"x": torch.eye(3)[None]}, tmp_path / "i.onnx")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("spec", [spec for spec, _ in SPECS.values()], ids=lambda spec: spec.name)
def test_every_block_kind_exports_to_onnx(spec: BlockSpec, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = build_block(spec)
    inputs = {name: torch.randn(1, *shape) for name, shape in spec.inputs}
    path = onnx.export(module, inputs, tmp_path / "block.onnx")
    assert onnx.verify(path, module, inputs) < 2e-5


def test_tvm_library_needs_a_known_ending(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    tvm = registry.load("nas.exporters", "tvm")
    with pytest.raises(UsageError, match=r"\.tar or \.so, got 'mix\.onnx'"):
        tvm.export(mix, inputs, tmp_path / "mix.onnx")


@pytest.mark.slow
def test_tvm_writes_a_library(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    tvm = registry.load("nas.exporters", "tvm")
    path = tvm.export(mix, inputs, tmp_path / "mix.tar")
    assert path.stat().st_size > 1000
