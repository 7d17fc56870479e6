"""onnxruntime: the provider that a sheet asks for is the one that ran, or an error."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from nas.backends import _gpu, _providers
from nas.backends import onnxruntime as backend
from nas.build import build, example_inputs
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters.onnx import weights
from tests.test_onnx_networks import perturbed, two_resnets

CPU = Target(device="cpu", runtime="onnxruntime", precision="fp32")
GPU = Target(device="h200", runtime="onnxruntime", precision="fp16")
CHIP = "NVIDIA H200"
CUDA, TENSORRT = _providers.CUDA, "TensorrtExecutionProvider"


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return example_inputs(two_resnets(), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inline_bytes", [weights.INLINE_BYTES, 1000])
def test_networks_run_on_the_cpu_from_memory_or_from_a_file(
    inline_bytes: int, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "INLINE_BYTES", inline_bytes)
    network = perturbed(two_resnets())
    with torch.no_grad():
        expected = network.eval()(**inputs).numpy()
    loaded = backend.load(network, inputs, CPU)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # what is loaded does not follow the module
    np.testing.assert_allclose(loaded(), expected, rtol=1e-4, atol=1e-5)
    assert loaded.describe()["provider"] == "CPUExecutionProvider"
    assert loaded.device_ms is None
    assert "chip" not in loaded.describe()


@pytest.mark.parametrize("last", [False, True])
def test_weights_in_any_memory_format(last: bool, inputs: dict[str, Tensor]) -> None:
    network = perturbed(two_resnets()).eval()
    with torch.no_grad():
        expected = network(**inputs).numpy()
    network = network.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    np.testing.assert_allclose(backend.load(network, inputs, CPU)(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"provider": CUDA}, "CUDAExecutionProvider needs the option 'gpu'"),
        ({"gpu": CHIP}, "CPUExecutionProvider does not take the option 'gpu'"),
        ({"provider": 1}, "'provider' .* must be a text, got 1"),
        ({"provider_options": "fast"}, "'provider_options' .* must be a table, got 'fast'"),
        ({"providers": [CUDA]}, "unknown option 'providers' .* did you mean 'provider'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match=words):
        backend.load(build(two_resnets()), inputs, CPU, options)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (CPU, {"provider": CUDA, "gpu": CHIP}, r"device is 'cpu', but its \[options\] name the GPU"),
        (GPU, {}, "device is 'h200', allowed here: cpu"),
        (
            Target(device="mac", runtime="onnxruntime", precision="fp32"),
            {"provider": _providers.COREML},
            "allowed.* fp16",
        ),
        (Target(device="mac", runtime="onnxruntime", precision="bf16"), {"provider": TENSORRT, "gpu": CHIP}, "'bf16'"),
    ],
)
def test_what_a_provider_cannot_give_is_refused(
    target: Target, options: dict[str, Any], words: str, inputs: dict[str, Tensor]
) -> None:
    with pytest.raises(UsageError, match=words):
        backend.load(build(two_resnets()), inputs, target, options)


def test_a_provider_that_is_not_here_is_named_with_those_that_are(inputs: dict[str, Tensor]) -> None:
    asked = next(p for p in onnxruntime.get_all_providers() if p not in onnxruntime.get_available_providers())
    options = {"provider": asked} | ({"gpu": CHIP} if asked in _providers._ON_NVIDIA else {})
    with pytest.raises(NasError, match=f"asks for {asked}; onnxruntime .* has here: .*CPUExecutionProvider"):
        backend.load(build(two_resnets()), inputs, GPU, options)


def test_another_gpu_or_an_unclear_one_is_refused(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    for names, words in (
        (("NVIDIA L4",), "is for the GPU 'NVIDIA H200'; nvidia-smi finds here: NVIDIA L4"),
        (("NVIDIA L4", CHIP), "GPUs of several kinds"),
    ):
        monkeypatch.setattr(_gpu, "names", lambda found=names: found)
        with pytest.raises(NasError, match=words):
            backend.load(build(two_resnets()), inputs, GPU, {"provider": CUDA, "gpu": CHIP})


def test_a_provider_that_hands_everything_to_the_cpu_is_found_out(inputs: dict[str, Tensor]) -> None:
    """A real session of a real provider that runs no node of ours, and says nothing."""
    asked = "AzureExecutionProvider"
    if asked not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {asked}")
    with pytest.raises(NasError, match=rf"asks for {asked}, but (\d+) of \1 nodes ran on CPUExecutionProvider .*Conv"):
        backend.load(build(two_resnets()), inputs, CPU, {"provider": asked})


def test_a_session_that_runs_where_asked_is_described_by_its_profile(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of another provider, with the CPU's standing in for it."""
    monkeypatch.setattr(backend, "CPU", "none")
    monkeypatch.setattr(backend, "_check", lambda *given: None)
    network = perturbed(two_resnets())
    loaded = backend.load(network, inputs, CPU, {"provider": _providers.CPU})
    described = loaded.describe()
    assert described["nodes"] == described["nodes_on_provider"] > 4  # type: ignore[operator]
    assert described["copies"] == "included"
    with torch.no_grad():
        np.testing.assert_allclose(loaded(), network.eval()(**inputs).numpy(), rtol=1e-4, atol=1e-5)


def event(name: str, op: str, provider: str) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op, "provider": provider}}


def test_strayed_products_are_counted_and_named() -> None:
    chosen = _providers.Settings(provider=CUDA, gpu=CHIP)
    ran = [event(f"c{i}", "Conv", CUDA) for i in range(7)]
    shapes = [event("s", "Shape", "CPUExecutionProvider"), event("g", "Gather", "CPUExecutionProvider")]
    others = [{"cat": "Session", "name": "model_run"}, {"cat": "Node", "name": "c0_fence_before", "args": {}}]
    assert _providers.shares([*ran, *shapes, *others], chosen, GPU) == {"nodes": 9, "nodes_on_provider": 7}
    strayed = [event(f"m{i}", "FusedMatMul", "CPUExecutionProvider") for i in range(3)]
    with pytest.raises(NasError, match=r"5 of 12 nodes ran on CPUExecutionProvider \(among them: 3 FusedMatMul\)"):
        _providers.shares([*ran, *shapes, *strayed], chosen, GPU)
    with pytest.raises(NasError, match=r"2 of 2 nodes ran on CPU.* \(among them: none that multiplies\)"):
        _providers.shares(shapes, chosen, GPU)
    with pytest.raises(NasError, match="no node ran"):
        _providers.shares([], chosen, GPU)


def test_cuda_keeps_float32_unless_told_otherwise() -> None:
    assert _providers.Settings(provider=CUDA, gpu=CHIP).passed == {"use_tf32": "0"}
    told = _providers.Settings(provider=CUDA, gpu=CHIP, provider_options={"use_tf32": 1, "arena": "x"})
    assert told.passed == {"use_tf32": "1", "arena": "x"}
    assert _providers.Settings(provider=TENSORRT, gpu=CHIP).passed == {}


def test_half_precision_leaves_the_callers_module_alone(inputs: dict[str, Tensor]) -> None:
    network = build(two_resnets())
    half, halved = backend._in_precision(network, inputs, GPU)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {t.dtype for t in halved.values()} == {torch.float16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert backend._in_precision(network, inputs, CPU)[0] is network


def session(**changed: Any) -> Any:
    said = {"providers": [_providers.CPU], "threads": 1, "type": "tensor(float)", "options": {}} | changed
    return types.SimpleNamespace(
        get_providers=lambda: said["providers"],
        get_session_options=lambda: types.SimpleNamespace(intra_op_num_threads=said["threads"]),
        get_outputs=lambda: [types.SimpleNamespace(type=said["type"])],
        get_provider_options=lambda: {said["providers"][0]: said["options"]},
    )


@pytest.mark.parametrize(
    "changed",
    [{"providers": ["OtherProvider", _providers.CPU]}, {"threads": 0}, {"type": "tensor(float16)"}],
    ids=str,
)
def test_what_the_session_settled_on_is_read_back(changed: dict[str, Any]) -> None:
    backend._check(session(), CPU, [_providers.CPU])
    with pytest.raises(NasError, match="onnxruntime returns"):
        backend._check(session(**changed), CPU, [_providers.CPU])


def test_a_provider_option_that_was_not_taken_is_an_error() -> None:
    found = session(providers=[CUDA, _providers.CPU], type="tensor(float16)", options={"use_tf32": "1"})
    backend._check(found, GPU, [CUDA, _providers.CPU], {"use_tf32": "1"})
    with pytest.raises(NasError, match=r"CUDAExecutionProvider has use_tf32 = '1', .* asks for '0'"):
        backend._check(found, GPU, [CUDA, _providers.CPU], {"use_tf32": "0"})


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_a_real_gpu_computes_what_the_cpu_computes(precision: str, tolerance: float, inputs: dict[str, Tensor]) -> None:
    if CUDA not in onnxruntime.get_available_providers() or not _gpu.names():
        pytest.skip("no CUDA device, or an onnxruntime without CUDA")
    network = perturbed(two_resnets()).eval()
    target = Target(device="gpu", runtime="onnxruntime", precision=precision)
    loaded = backend.load(network, inputs, target, {"provider": CUDA, "gpu": _gpu.names()[0]})
    with torch.no_grad():
        expected = network(**inputs).numpy()
    np.testing.assert_allclose(loaded(), expected, atol=tolerance, rtol=tolerance)
    assert loaded.describe()["copies"] == "excluded"
    assert loaded.device_ms is not None
    assert 0 < loaded.device_ms(20) < 1e3
