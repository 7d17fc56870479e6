"""Backends: every file in the folder keeps the contract, computes what torch computes, and refuses the rest."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas import registry
from nas.backends import Loaded, cores
from nas.build import build_block
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.network import block

NAMES = registry.plugins("nas.backends")
_SLOW = {"torch_compile", "tvm"}  # they compile for many seconds
COMPILING = [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in NAMES]


def backend(name: str) -> types.ModuleType:
    module = registry.load("nas.backends", name)
    reason = module.unavailable()
    if reason:
        pytest.skip(reason)
    return module


def target(name: str) -> Target:
    return Target(device="cpu", runtime=backend(name).NAME, precision="fp32")


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    spec = block(
        "t",
        "transformer",
        {"x": (16, 4, 4), "text": (3, 12)},
        channels=16,
        depth=1,
        head_width=8,
        kv_heads=1,
        text_width=12,
        self_attention=True,
        cross_attention=True,
        qk_norm="rms_norm",
        ffn_ratio=2,
        norm_groups=4,
    )
    return build_block(spec)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    # Not in the order of forward: a backend that numbers its inputs must sort them.
    return {"text": torch.randn(1, 3, 12), "x": torch.randn(1, 16, 4, 4)}


def test_the_folder_holds_the_runtimes() -> None:
    assert {"onnxruntime", "openvino", "torch_compile", "torch_eager", "tvm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_unavailable_is_a_reason_or_none(name: str) -> None:
    reason = registry.load("nas.backends", name).unavailable()
    assert reason is None or (isinstance(reason, str) and reason)


@pytest.mark.parametrize("name", COMPILING)
def test_runs_what_torch_runs_and_says_what_ran(name: str, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    loaded = backend(name).load(module, inputs, target(name))
    assert isinstance(loaded, Loaded)
    with torch.no_grad():
        expected = module.eval()(**inputs).numpy()
    first, second = loaded(), loaded()
    np.testing.assert_allclose(first, expected, atol=2e-5)
    np.testing.assert_array_equal(first, second)
    described = loaded.describe()
    assert described["runtime"] == backend(name).NAME
    assert described["precision"] == "fp32"
    assert described["threads"] == 1
    assert described["provider"]
    assert any(str(value)[0].isdigit() and "." in str(value) for value in described.values()), "no version is told"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"device": "iphone"}, "device is 'iphone'"),
        ({"runtime": "coreml"}, "runtime is 'coreml'"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": cores().stop}, "threads is"),
        ({"batch": 2}, "batch 2"),
    ],
)
def test_refuses_what_it_cannot_do_exactly(
    name: str, change: dict[str, Any], named: str, module: nn.Module, inputs: dict[str, Tensor]
) -> None:
    with pytest.raises(NasError, match=named):
        backend(name).load(module, inputs, replace(target(name), **change))


def test_a_missing_package_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("onnxruntime", "openvino", "tvm"):
        reason = registry.load("nas.backends", name).unavailable()
        assert reason is not None
        assert name in reason
        assert "not installed" in reason


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_it_does_not_have_is_refused(name: str, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match=r"unknown option 'colour' in \[options\]"):
        backend(name).load(module, inputs, target(name), {"colour": True})


def test_usage_errors_have_their_exit_code(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError) as caught:
        backend("onnxruntime").load(module, inputs, replace(target("onnxruntime"), precision="fp16"))
    assert caught.value.exit_code == 2
    assert "fp32" in caught.value.message
