"""The torch backends: settings, one compiled graph or an error, and GPUs by what of CUDA can be stood in for here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.backends import _gpu, _torch, torch_compile, torch_eager
from nas.build import build_block
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.network import block

CPU = Target(device="cpu", runtime="torch-eager", precision="fp32")
COMPILED = Target(device="cpu", runtime="torch-compile", precision="fp32")
GPU = Target(device="h200", runtime="torch-eager", precision="bf16")
CHIP = "NVIDIA H200"


class Half(nn.Module):
    """A product, a convolution and an index: what precision and memory format must and must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.table = nn.Embedding(5, 8)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.conv(x) + self.table(which)[:, :, None, None]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


@pytest.fixture
def module() -> Half:
    torch.manual_seed(0)
    return Half()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(1, 4, 6, 6), "which": torch.tensor([3])}


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


# On the CPU.


def test_refuses_another_precision_of_the_module(module: Half, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(NasError, match="bfloat16"):
        torch_eager.load(module.bfloat16(), inputs, CPU)


def test_notices_threads_changed_behind_its_back(
    module: Half, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = torch_eager.load(module, inputs, CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(NasError, match="runs on 7 threads"):
        loaded()


def test_the_cpu_is_timed_by_the_caller_and_has_no_chip_of_its_own(module: Half, inputs: dict[str, Tensor]) -> None:
    loaded = torch_eager.load(module, inputs, CPU)
    assert loaded.device_ms is None
    assert "chip" not in loaded.describe()
    np.testing.assert_array_equal(loaded(), module(**inputs).detach().numpy())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu": 1}, "option 'gpu' of backend torch-eager must be of type str, got 1"),
        ({"gpu": CHIP, "channels_last": 1}, "'channels_last' .* must be of type bool, got 1"),
        ({"gpu": CHIP, "matmul": "fast"}, "'matmul' .* must be highest or tf32, got 'fast'"),
        ({"channels_last": True}, r"'channels_last' is for a GPU, but \[options\] names no gpu"),
        ({"gpus": CHIP}, "unknown option 'gpus' .* did you mean 'gpu'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _torch.settings(options, "torch-eager")


# Compiled.


def small() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    spec = block("s", "stem", {"x": (4, 5, 5)}, in_channels=4, out_channels=8)
    return build_block(spec), {"x": torch.randn(1, 4, 5, 5)}


def compiled() -> Any:
    if reason := torch_compile.unavailable():
        pytest.skip(reason)
    return torch_compile


@pytest.mark.slow
def test_a_block_is_compiled_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = compiled()
    module, inputs = small()
    loaded = backend.load(module, inputs, COMPILED)
    expected = module(**inputs).detach().numpy()
    np.testing.assert_allclose(loaded(), expected, atol=1e-5)
    described = loaded.describe()
    assert (described["graphs"], described["graph_breaks"], described["mode"]) == (1, 0, "default")
    assert described["simd"]
    before = torch_compile._counted()
    # Many modules of one class: none may push another out, or run uncompiled. The kept result is found again.
    others = [backend.load(small()[0], inputs, COMPILED) for _ in range(10)]
    assert torch_compile._counted()["graphs"] == before["graphs"] + 10
    for other in (loaded, *others):
        np.testing.assert_allclose(other(), expected, atol=1e-5)
    assert torch_compile._counted()["graphs"] == before["graphs"] + 10
    with pytest.raises(NasError, match=r"torch\.compile refuses Broken"):
        backend.load(Broken(), inputs, COMPILED)
    monkeypatch.setattr(torch, "compile", lambda call, **named: call)  # what TORCH_COMPILE_DISABLE makes of it
    with pytest.raises(NasError, match="made 0 graphs"):
        backend.load(small()[0], inputs, COMPILED)


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ({"graphs": 0, "graph_breaks": 0, "skipped_cuda_graphs": 0}, "made 0 graphs"),
        ({"graphs": 3, "graph_breaks": 2, "skipped_cuda_graphs": 0}, "made 3 graphs with 2 graph breaks"),
        ({"graphs": 1, "graph_breaks": 0, "skipped_cuda_graphs": 1}, "skipped 1 CUDA graphs"),
    ],
)
def test_what_was_not_compiled_is_an_error(counted: dict[str, int], words: str) -> None:
    with pytest.raises(NasError, match=words):
        torch_compile.check(counted, COMPILED)
    torch_compile.check({"graphs": 1, "graph_breaks": 0, "skipped_cuda_graphs": 0}, COMPILED)


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CXX", "c++-of-ours")
    assert torch_compile.unavailable() == "torch.compile needs a C++ compiler, and c++-of-ours is not installed"
    module, inputs = small()
    with pytest.raises(NasError, match=r"c\+\+-of-ours is not installed"):
        torch_compile.load(module, inputs, COMPILED)


def test_modes_are_those_of_the_device() -> None:
    module, inputs = small()
    with pytest.raises(UsageError, match=r"'mode' .* must be one of default on the CPU, got 'reduce-overhead'"):
        torch_compile.load(module, inputs, COMPILED, {"mode": "reduce-overhead"})
    on_gpu = Target(device="h200", runtime="torch-compile", precision="bf16")
    with pytest.raises(UsageError, match="max-autotune-no-cudagraphs on a GPU, got 'fast'"):
        torch_compile.load(module, inputs, on_gpu, {"mode": "fast", "gpu": CHIP})


def test_two_modules_of_one_class_have_code_of_their_own() -> None:
    calls = [torch_compile.own_code(Half()) for _ in range(2)]
    assert len({id(call.__code__) for call in calls}) == 2  # type: ignore[attr-defined]


# On a GPU: the refusals and the placing with CUDA's answers stood in for, the timing with events of our own.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What CUDA answers."""
    answers: dict[str, Any] = {"names": ["NVIDIA L4", CHIP], "capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(answers["names"]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: answers["names"][i if isinstance(i, int) else 1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: answers["capability"])
    monkeypatch.setattr(_gpu, "figures", lambda gpu: {"driver": "1.2"})
    return answers


def test_the_gpu_is_found_by_its_name(cuda: dict[str, Any]) -> None:
    assert _torch.find(CHIP, GPU) == torch.device("cuda", 1)
    cuda["names"] = ["NVIDIA L4"]
    with pytest.raises(NasError, match=r"is for the GPU 'NVIDIA H200'; torch .* finds here: NVIDIA L4"):
        _torch.find(CHIP, GPU)
    cuda["names"] = []
    with pytest.raises(NasError, match="finds here: none"):
        _torch.find(CHIP, GPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cpu"}, r"device is 'cpu', but its \[options\] name the GPU"),
        ({"threads": 2}, "threads is 2"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"batch": 2}, "batch 2"),
    ],
)
def test_a_gpu_target_is_refused_for_what_it_cannot_be(
    change: dict[str, Any], words: str, module: Half, inputs: dict[str, Tensor], cuda: dict[str, Any]
) -> None:
    wanted = Target(**{**GPU.__dict__, **change})
    with pytest.raises(NasError, match=words):
        torch_eager.load(module, inputs, wanted, {"gpu": CHIP})


def test_bf16_by_emulation_is_refused(module: Half, inputs: dict[str, Tensor], cuda: dict[str, Any]) -> None:
    cuda["capability"] = (7, 5)
    with pytest.raises(NasError, match="only by emulation"):
        torch_eager.load(module, inputs, GPU, {"gpu": CHIP})


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_copy_is_placed_as_asked(
    last: bool,
    precision: str,
    dtype: torch.dtype,
    module: Half,
    inputs: dict[str, Tensor],
    cuda: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_torch, "find", lambda gpu, target: torch.device("meta"))
    chosen = _torch.settings({"gpu": CHIP, "channels_last": last, "matmul": "tf32"}, "torch-eager")
    target = Target(device="h200", runtime="torch-eager", precision=precision)
    placed = _torch.place(module.train(), inputs, target, chosen, "torch-eager")
    assert {p.dtype for p in placed.module.parameters()} == {dtype}
    assert (placed.inputs["x"].dtype, placed.inputs["which"].dtype) == (dtype, torch.int64)
    assert not placed.module.training
    assert module.training, "the caller's module was changed"
    assert next(module.parameters()).dtype == torch.float32
    weight, x = placed.module.conv.weight, placed.inputs["x"]
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last) is last
    assert x.is_contiguous(memory_format=torch.channels_last) is last
    described = placed.description
    assert (described["chip"], described["precision"], described["matmul"]) == (CHIP, precision, "tf32")
    assert described["memory_format"] == ("channels_last" if last else "contiguous")
    assert (described["capability"], described["driver"]) == ("9.0", "1.2")
    assert torch.get_float32_matmul_precision() == "high"
    placed.check()
    torch.set_float32_matmul_precision("highest")
    with pytest.raises(NasError, match="torch's settings are now"):
        placed.check()


class Events:
    """CUDA's events and its one stream: an event has happened when the work before it is done."""

    def __init__(self, ms_per_call: float) -> None:
        self.ms_per_call = ms_per_call
        self.queued = self.waited = 0.0
        self.log: list[str] = []

    def call(self) -> Tensor:
        self.log.append("call")
        self.queued += self.ms_per_call
        return torch.ones(2, dtype=torch.bfloat16)

    def event(self, *, enable_timing: bool) -> Any:
        world = self

        class Event:
            def record(self) -> None:
                world.log.append("record")
                self.at = world.queued

            def synchronize(self) -> None:
                world.log.append("wait")

            def elapsed_time(self, other: Any) -> float:
                assert world.log[-1] == "wait", "read before the work was done"
                return float(other.at - self.at)

        assert enable_timing
        return Event()


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Events(ms_per_call=2.5)
    monkeypatch.setattr(torch.cuda, "Event", world.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: world.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    checks: list[bool] = []
    placed = _torch.Placed(
        module=Half(),
        inputs={},
        device=torch.device("cuda", 0),
        description={"precision": "bf16"},
        check=lambda: checks.append(True),
    )
    loaded = _torch.loaded(world.call, placed, {"precision": "bf16"})
    assert loaded.device_ms is not None
    world.queued = 100.0  # earlier work is none of these calls'
    assert loaded.device_ms(4) == pytest.approx(2.5)
    assert world.log == ["synchronize", "record", *["call"] * 4, "record", "wait"]
    output = loaded()
    assert output.dtype == np.float32
    assert len(checks) == 2
    wrong = _torch.loaded(world.call, placed, {"precision": "fp16"})
    with pytest.raises(NasError, match=r"output is in torch\.bfloat16, the target asks for fp16"):
        wrong()


def test_mixed_precisions_of_a_module_are_told(module: Half) -> None:
    assert _torch.precision_of(module) == "fp32"
    module.table.half()
    with pytest.raises(NasError, match="parameters in fp16 and fp32"):
        _torch.precision_of(module)


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **named: Any) -> Any:
        fields = command[1].partition("=")[2].split(",")
        said = {
            "name": CHIP,
            "driver_version": "570.1",
            "clocks.max.sm": "1980 MHz",
            "clocks.sm": "345 MHz",
            "power.limit": "[N/A]",
            "mig.mode.current": "Disabled",
        }
        lines = [["NVIDIA L4"] * len(fields), [said[f] for f in fields]]
        return type("Done", (), {"returncode": 0, "stdout": "\n".join(", ".join(line) for line in lines) + "\n"})

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", answer)
    assert _gpu.names() == ("NVIDIA L4", CHIP)
    assert _gpu.figures(CHIP) == {
        "driver": "570.1",
        "max_sm_clock": "1980 MHz",
        "sm_clock_at_load": "345 MHz",
        "mig": "Disabled",
    }
    assert _gpu.figures("another") == {}
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert _gpu.names() == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", [torch_eager, torch_compile])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_a_real_gpu_computes_what_the_cpu_computes(backend: Any, precision: str, tolerance: float) -> None:
    if reason := backend.unavailable():
        pytest.skip(reason)
    gpu = torch.cuda.get_device_name(0)
    target = Target(device="gpu", runtime=backend.NAME, precision=precision)
    module, inputs = small()
    loaded = backend.load(module, inputs, target, {"gpu": gpu, "channels_last": True})
    np.testing.assert_allclose(loaded(), module(**inputs).detach().numpy(), atol=tolerance, rtol=tolerance)
    assert loaded.describe()["chip"] == gpu
    assert loaded.device_ms is not None
    assert 0 < loaded.device_ms(20) < 1e3
