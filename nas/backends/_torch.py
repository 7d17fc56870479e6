"""What eager and compiled PyTorch share: a module placed on the CPU or on a GPU as a target asks, and timed there.

Settings such as the number of threads and TF32 are torch's for the whole process. They are set when a module is loaded
and looked at again at each call, so that no row can come from settings that something else changed in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.backends import Loaded, _gpu, check_options, cores, require
from nas.device import Target
from nas.errors import NasError, UsageError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MATMUL = {"highest": "highest", "tf32": "high"}  # ours -> torch's


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The [options] of a torch sheet.

    Attributes:
        gpu: the GPU's name as CUDA tells it ("NVIDIA H200"); empty: the CPU. The others are for a GPU only.
        channels_last: images as [B, H, W, C] in memory, which its convolutions prefer.
        matmul: "highest" (float32 as it is) or "tf32" (float32 rounded to 10 bits before it is multiplied).
    """

    gpu: str = ""
    channels_last: bool = False
    matmul: str = "highest"


OPTIONS = tuple(Settings.__dataclass_fields__)


def settings(options: Mapping[str, Any] | None, runtime: str, also: Collection[str] = ()) -> Settings:
    """The settings that a sheet asks for; options in `also` are the caller's own.

    Raises:
        UsageError: an option that is unknown, of the wrong form, or without meaning on a CPU.
    """
    given = {k: v for k, v in check_options(options, {*OPTIONS, *also}, runtime=runtime).items() if k in OPTIONS}
    for name, value in given.items():
        wanted: Any = type(getattr(Settings, name))
        if type(value) is not wanted:
            raise UsageError(f"option {name!r} of backend {runtime} must be of type {wanted.__name__}, got {value!r}")
    found = Settings(**given)
    if found.matmul not in _MATMUL:
        raise UsageError(f"option 'matmul' of backend {runtime} must be {' or '.join(_MATMUL)}, got {found.matmul!r}")
    if not found.gpu and (idle := sorted(set(given) - {"gpu"})):
        raise UsageError(f"backend {runtime}: option {idle[0]!r} is for a GPU, but [options] names no gpu")
    return found


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A module and its inputs where a target wants them.

    Attributes:
        device: the CPU or one GPU.
        description: what holds for it, read back from torch.
        check: raises a NasError when torch's settings are no longer those asked for.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    device: torch.device
    description: Mapping[str, str | int]
    check: Callable[[], None]


def place(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, chosen: Settings, runtime: str) -> Placed:
    """`module` in eval mode as the target asks: itself on the CPU, a copy on a GPU.

    Raises:
        UsageError: a precision, device or number of threads that torch cannot give here.
        NasError: the module is not in float32, or the GPU is not the one that the options name.
    """
    if chosen.gpu:
        _gpu.refuse_cpu(target, chosen.gpu)
        require(target, inputs, runtime=runtime, precisions=_DTYPES, threads={1}, devices=None)
        return _on_gpu(module, inputs, target, chosen)
    require(target, inputs, runtime=runtime, precisions={"fp32"}, threads=cores())
    return _on_cpu(module, inputs, target)


def _on_cpu(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Placed:
    other = {str(p.dtype) for p in module.parameters() if p.dtype != torch.float32}
    if other:
        raise NasError(f"target {target.slug} is fp32, but the module has parameters in {', '.join(sorted(other))}")
    torch.set_num_threads(target.threads)

    def check() -> None:
        if torch.get_num_threads() != target.threads:
            raise NasError(
                f"torch runs on {torch.get_num_threads()} threads, target {target.slug} asks for {target.threads}"
            )

    return Placed(
        module=module.eval(),
        inputs=dict(inputs),
        device=torch.device("cpu"),
        description={
            "provider": torch.backends.cpu.get_cpu_capability(),
            "precision": "fp32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        check=check,
    )


def _on_gpu(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, chosen: Settings) -> Placed:
    device = find(chosen.gpu, target)
    dtype = _DTYPES[target.precision]
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8:
        raise NasError(f"target {target.slug}: {chosen.gpu} computes bf16 only by emulation")
    form = torch.channels_last if chosen.channels_last else torch.preserve_format
    moved = copy.deepcopy(module).eval().to(device=device, dtype=dtype)
    if chosen.channels_last:
        moved = moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.set_float32_matmul_precision(_MATMUL[chosen.matmul])
    torch.backends.cudnn.allow_tf32 = chosen.matmul == "tf32"
    torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest of cuDNN's kernels, as a deployment would
    wanted = _gpu_settings()

    def check() -> None:
        if (found := _gpu_settings()) != wanted:
            raise NasError(f"torch's settings are now {found}, target {target.slug} was loaded with {wanted}")

    return Placed(
        module=moved,
        inputs={name: cast(tensor, dtype, form).to(device) for name, tensor in inputs.items()},
        device=device,
        description=_describe_gpu(device, moved, chosen),
        check=check,
    )


def _gpu_settings() -> dict[str, str | bool]:
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def find(gpu: str, target: Target) -> torch.device:
    """The GPU of that name.

    Raises:
        NasError: torch sees none of that name.
    """
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return torch.device("cuda", _gpu.place(gpu, found, target, f"torch {torch.__version__}"))


def cast(tensor: Tensor, dtype: torch.dtype, form: torch.memory_format = torch.preserve_format) -> Tensor:
    """A floating-point tensor in `dtype`, and in `form` if it is an image; whole numbers stay as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype=dtype, memory_format=form if tensor.ndim == 4 else torch.preserve_format)


def _describe_gpu(device: torch.device, module: nn.Module, chosen: Settings) -> dict[str, str | int]:
    major, minor = torch.cuda.get_device_capability(device)
    images = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]  # of others both forms are alike
    last = bool(images) and all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
    return {
        "provider": "cuda",
        "chip": torch.cuda.get_device_name(device),
        "precision": precision_of(module),
        "threads": 1,
        "memory_format": "channels_last" if last or (chosen.channels_last and not images) else "contiguous",
        "matmul": chosen.matmul,
        "capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cudnn": int(torch.backends.cudnn.version() or 0),
        "torch": torch.__version__,
        **_gpu.figures(chosen.gpu),
    }


def precision_of(module: nn.Module) -> str:
    """The precision that all floating-point parameters have.

    Raises:
        NasError: they have several.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    found = sorted({names.get(p.dtype, str(p.dtype)) for p in module.parameters() if p.is_floating_point()})
    if len(found) > 1:
        raise NasError(f"{type(module).__name__} has parameters in {' and '.join(found)}")
    return found[0] if found else "fp32"


def loaded(
    call: Callable[[], Tensor | tuple[Tensor, ...]], placed: Placed, description: Mapping[str, str | int]
) -> Loaded:
    """What a backend returns for `call`, which computes on the placed inputs.

    On a GPU `run` returns a copy of the output on the CPU and `device_ms` is timed by events on the GPU's own stream:
    it has in it what the GPU waits for the next kernel to be launched, but no copy.
    """

    @torch.inference_mode()
    def run() -> np.ndarray:
        placed.check()
        found = call()
        output = found[0] if isinstance(found, tuple) else found
        # numpy has no bf16; an output of another precision than asked would not be what the target describes.
        if placed.device.type != "cpu" and output.dtype != _DTYPES[str(description["precision"])]:
            raise NasError(f"the output is in {output.dtype}, the target asks for {description['precision']}")
        return output.float().cpu().numpy()

    @torch.inference_mode()
    def device_ms(calls: int) -> float:
        placed.check()
        with torch.cuda.device(placed.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(placed.device)
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / calls

    return Loaded(run=run, description=dict(description), device_ms=device_ms if placed.device.type == "cuda" else None)
