"""ExecuTorch: programs compute what torch computes, XNNPACK runs every product, and threads are what was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.backends import executorch as backend
from nas.build import build, build_block, example_inputs
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters import executorch as exporter
from nas.families import network
from nas.network import BlockSpec
from nas.space import load_space
from tests.block_specs import SPECS

TARGET = Target(device="cpu", runtime="executorch", precision="fp32")
needs_executorch = pytest.mark.skipif(exporter.unavailable() is not None, reason=str(exporter.unavailable()))


class Mix(nn.Module):
    """Attention, both forms of GELU, and a dropout that tells training mode from eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        query = self.drop(self.linear(x))
        mixed = F.gelu(F.scaled_dot_product_attention(query, text, text), approximate="tanh")
        return mixed, F.gelu(query)


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class Doubles(nn.Module):
    """A product in float64, which XNNPACK does not take."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        return torch.bmm(wide, wide).to(torch.float32)


@pytest.fixture
def mix() -> Mix:
    torch.manual_seed(0)
    return Mix()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    # Not in the order of forward.
    return {"text": torch.randn(1, 2, 5, 16), "x": torch.randn(1, 2, 7, 16)}


# Without the package


def test_attention_written_out_is_torchs_own() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(query, key, value, scale=scale)
        torch.testing.assert_close(exporter.attention(query, key, value, scale=scale), expected)
    for wrong in ({"attn_mask": torch.ones(5, 7)}, {"is_causal": True}, {"enable_gqa": True}):
        with pytest.raises(NasError, match="masked, causal or grouped"):
            exporter.attention(query, key, value, **wrong)


def test_gelu_written_out_is_torchs_own() -> None:
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(exporter.tanh_gelu(x, "tanh"), F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-5)
    assert exporter.tanh_gelu(x) is NotImplemented


def test_a_missing_package_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable() == exporter.unavailable() == "the package executorch is not installed"


def test_the_ending_is_checked_first(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.pte, got 'mix\.onnx'"):
        exporter.export(mix, inputs, tmp_path / "mix.onnx")


# With it


@needs_executorch
def test_a_program_computes_the_same_and_keeps_the_mode(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    mix.train()
    path = exporter.export(mix, inputs, tmp_path / "deep" / "mix.pte")
    assert mix.training
    # The exact form of GELU instead of its approximation would be off by 5e-4.
    assert exporter.verify(path, mix, inputs) < 2e-6
    assert mix.training
    assert exporter.verify(path, mix, {name: 2 * tensor for name, tensor in inputs.items()}) < 2e-6


@needs_executorch
def test_verify_sees_another_weight(mix: Mix, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    path = exporter.export(mix, inputs, tmp_path / "mix.pte")
    with torch.no_grad():
        mix.linear.weight *= 3
    assert exporter.verify(path, mix, inputs) > 1e-3


@needs_executorch
def test_every_product_is_delegated(mix: Mix, inputs: dict[str, Tensor]) -> None:
    lowered = exporter.lower(mix, inputs)
    assert (lowered.delegated["linear"], lowered.delegated["bmm"], lowered.delegated["_softmax"]) == (1, 2, 1)
    # What torch's own decomposition of attention guards masked rows with.
    assert not {"where", "eq", "logical_not", "any"} & {*lowered.portable, *lowered.delegated}
    assert lowered.partitions >= 1


@needs_executorch
@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Inverse(), "Inverse cannot be written as ExecuTorch: .*linalg_inv"),
        (Doubles(), "XNNPACK does not take its bmm"),
    ],
)
def test_what_cannot_be_lowered_is_one_sentence(module: nn.Module, named: str) -> None:
    with pytest.raises(NasError, match=named) as caught:
        exporter.lower(module, {"x": torch.eye(3)[None]})
    assert "\n" not in caught.value.message


@needs_executorch
def test_the_backend_says_what_ran_where(mix: Mix, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(mix, inputs, TARGET)
    with torch.no_grad():
        expected = mix.eval()(**inputs)[0].numpy()
    np.testing.assert_allclose(loaded(), expected, atol=2e-6)
    described = loaded.describe()
    assert described["threads"] == 1
    assert described["delegated"] >= 4
    assert "bmm" not in str(described["portable"])


@needs_executorch
def test_threads_are_set_and_watched(mix: Mix, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(mix, inputs, TARGET)
    backend.library()._unsafe_reset_threadpool(2)
    with pytest.raises(NasError, match=r"runs on 2 threads, target .* asks for 1"):
        loaded()
    assert backend.load(mix, inputs, TARGET).describe()["threads"] == 1
    loaded()


@needs_executorch
def test_a_pool_of_another_size_is_refused(
    mix: Mix, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.library(), "_threadpool_get_thread_count", lambda: 5)
    monkeypatch.setattr(backend.library(), "_unsafe_reset_threadpool", lambda count: None)
    with pytest.raises(NasError, match="runs on 5 threads"):
        backend.load(mix, inputs, TARGET)


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec, _ in SPECS.values()], ids=lambda spec: spec.name)
def test_every_block_kind_runs(spec: BlockSpec, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = build_block(spec)
    given = {name: torch.randn(1, *shape) for name, shape in spec.inputs}
    path = exporter.export(module, given, tmp_path / "block.pte")
    assert exporter.verify(path, module, given) < 2e-5


@needs_executorch
@pytest.mark.slow
def test_a_whole_network_runs(tmp_path: Path) -> None:
    space = load_space("decoder")
    spec = network(space.at_resolution(4 * space.input.pixels_per_latent).reference(space.references[0].name))
    module, given = build(spec, seed=0), example_inputs(spec)
    assert exporter.verify(exporter.export(module, given, tmp_path / "network.pte"), module, given) < 1e-4
