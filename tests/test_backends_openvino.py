"""OpenVINO: the precision, threads and device that a target asks for are those of the compiled model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nas.backends import Loaded
from nas.backends import openvino as backend
from nas.build import Network, example_inputs
from nas.device import Target
from nas.errors import NasError, UsageError
from tests.test_onnx_networks import perturbed, two_resnets

FP32 = Target(device="cpu", runtime="openvino", precision="fp32")
BF16 = replace(FP32, precision="bf16")


@pytest.fixture(autouse=True)
def _installed() -> None:
    if reason := backend.unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def network() -> Network:
    return perturbed(two_resnets()).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return example_inputs(two_resnets(), generator=torch.Generator().manual_seed(0))


def error(loaded: Loaded, network: Network, inputs: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        expected = network(**inputs).numpy()
    return float(np.abs(loaded() - expected).max() / np.abs(expected).max())


def test_float32_is_float32_though_bf16_is_the_default(network: Network, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(network, inputs, FP32)
    assert error(loaded, network, inputs) < 1e-5
    described = loaded.describe()
    assert (described["precision"], described["provider"], described["threads"]) == ("fp32", "CPU", 1)


def test_bf16_is_asked_of_every_layer_that_multiplies(network: Network, inputs: dict[str, Tensor]) -> None:
    try:
        loaded = backend.load(network, inputs, BF16)
    except NasError as refused:
        if "does not compute in it on this CPU" not in refused.message:
            raise
        pytest.skip(refused.message)
    assert loaded.describe()["precision"] == "bf16"
    assert 1e-4 < error(loaded, network, inputs) < 0.1, "not the rounding of bf16"


def test_a_layer_in_another_precision_is_named() -> None:
    model = _compiled("bf16", layers=[("Convolution", "f32")] * 2 + [("FullyConnected", "bf16"), ("Softmax", "f32")])
    with pytest.raises(NasError, match=r"asks for bf16; .* on this CPU: 2 Convolution$"):
        backend._check(model, BF16)
    backend._check(_compiled("bf16", layers=[("Convolution", "bf16"), ("Softmax", "f32")]), BF16)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_refused(precision: str, network: Network, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match=f"precision is '{precision}', allowed here: bf16, fp32"):
        backend.load(network, inputs, replace(FP32, precision=precision))


def test_the_output_of_a_call_is_not_overwritten_by_the_next(network: Network, inputs: dict[str, Tensor]) -> None:
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    loaded = backend.load(network, given, FP32)
    first = loaded()
    kept = first.copy()
    given["sample"] += 1.0  # the inputs are bound, not copied
    assert not np.array_equal(loaded(), kept)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "changed",
    [{"precision": "bf16"}, {"threads": 4}, {"devices": ["GPU.0"]}],
    ids=str,
)
def test_what_was_compiled_is_read_back(changed: dict[str, Any]) -> None:
    backend._check(_compiled(), FP32)
    with pytest.raises(NasError, match="OpenVINO compiled for"):
        backend._check(_compiled(**changed), FP32)


def _compiled(precision: str = "f32", threads: int = 1, devices: tuple[str, ...] = ("CPU",), layers: Any = ()) -> Any:
    said = {
        "INFERENCE_PRECISION_HINT": types.SimpleNamespace(get_type_name=lambda: precision),
        "INFERENCE_NUM_THREADS": threads,
        "EXECUTION_DEVICES": devices,
    }
    told = [{"layerType": layer, "runtimePrecision": found} for layer, found in layers]
    operators = [
        types.SimpleNamespace(
            get_rt_info=lambda info=info: {k: types.SimpleNamespace(value=v) for k, v in info.items()}
        )
        for info in told
    ]
    return types.SimpleNamespace(
        get_property=said.__getitem__,
        get_runtime_model=lambda: types.SimpleNamespace(get_ordered_ops=lambda: operators),
    )
