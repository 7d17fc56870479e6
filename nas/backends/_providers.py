"""onnxruntime's execution providers: what a sheet may ask of one, and which of them really ran the nodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nas.backends import _gpu, check_options, cores, require
from nas.device import Target
from nas.errors import NasError, UsageError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
COREML = "CoreMLExecutionProvider"
_ON_NVIDIA = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
# Nodes that multiply, in any of their fused forms; TensorRT and Core ML run whole subgraphs as one node of their own.
_MULTIPLIES = re.compile(r"Conv|MatMul|Gemm|Attention|Einsum|LSTM|GRU")
_KERNEL = "_kernel_time"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The [options] of a sheet for onnxruntime.

    Attributes:
        provider: onnxruntime's name of it.
        gpu: the GPU's name as nvidia-smi tells it; for NVIDIA's providers, which need it.
        provider_options: passed to the provider as they are, and read back.
    """

    provider: str = CPU
    gpu: str = ""
    provider_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> dict[str, str]:
        """The provider's options as texts; CUDA would round float32 to TF32 if it were not told otherwise."""
        given = {name: str(value) for name, value in self.provider_options.items()}
        return {"use_tf32": "0", **given} if self.provider == CUDA else given


def settings(options: Mapping[str, Any] | None, runtime: str) -> Settings:
    """The settings that a sheet asks for.

    Raises:
        UsageError: an option that is unknown, of the wrong form, or of another provider.
    """
    given = check_options(options, Settings.__dataclass_fields__, runtime=runtime)
    for name, value in given.items():
        kind: Any = Mapping if name == "provider_options" else str
        if not isinstance(value, kind):
            words = "a table" if kind is Mapping else "a text"
            raise UsageError(f"option {name!r} of backend {runtime} must be {words}, got {value!r}")
    found = Settings(**given)
    if bool(found.gpu) != (found.provider in _ON_NVIDIA):
        needs = "needs the option 'gpu'" if not found.gpu else "does not take the option 'gpu'"
        raise UsageError(f"backend {runtime}: provider {found.provider} {needs}, the GPU's name as nvidia-smi tells it")
    return found


def refuse(chosen: Settings, target: Target, inputs: Mapping[str, Any], runtime: str) -> None:
    """Refuses what the provider would not honour, or what is not here.

    Raises:
        UsageError: another precision, device or number of threads than it can give.
        NasError: this onnxruntime does not have the provider, or this machine the GPU.
    """
    import onnxruntime

    precisions = {"fp32"} if chosen.provider == CPU else {"fp32", "fp16"}
    if chosen.provider == COREML and chosen.provider_options.get("MLComputeUnits") != "CPUOnly":
        precisions = {"fp16"}  # the Neural Engine's only precision, whatever the graph says
    devices = ("cpu",) if chosen.provider == CPU else None
    if chosen.gpu:
        _gpu.refuse_cpu(target, chosen.gpu)
    require(target, inputs, runtime=runtime, precisions=precisions, threads=cores(), devices=devices)
    if chosen.provider not in (here := onnxruntime.get_available_providers()):
        raise NasError(
            f"target {target.slug} asks for {chosen.provider}; onnxruntime {onnxruntime.__version__} has here:"
            f" {', '.join(here)}",
            hint="install the build of onnxruntime that has it, such as onnxruntime-gpu, in place of onnxruntime",
        )
    if chosen.gpu:
        found = _gpu.names()
        _gpu.place(chosen.gpu, found, target, "nvidia-smi")
        if len(set(found)) > 1:  # onnxruntime numbers them in another order than nvidia-smi
            raise NasError(f"target {target.slug}: this machine has GPUs of several kinds ({', '.join(found)})")


def shares(events: Sequence[Mapping[str, Any]], chosen: Settings, target: Target) -> dict[str, str | int]:
    """How much of a profiled call the provider ran.

    Args:
        events: as onnxruntime's profiler writes them.
        chosen: whose provider was asked for.
        target: named in errors.

    Raises:
        NasError: nodes that multiply ran elsewhere: onnxruntime hands to the CPU what a provider cannot take.
    """
    ran = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    strayed = Counter(
        (str(a["op_name"]), str(a["provider"]))
        for a in ran
        if a["provider"] != chosen.provider and _MULTIPLIES.search(a["op_name"])
    )
    own = sum(a["provider"] == chosen.provider for a in ran)
    if strayed or not own:
        others = Counter(str(a["provider"]) for a in ran if a["provider"] != chosen.provider)
        where = (
            ", ".join(f"{count} of {len(ran)} nodes ran on {name}" for name, count in others.items()) or "no node ran"
        )
        multiplying = ", ".join(f"{count} {op}" for (op, _), count in sorted(strayed.items())) or "none that multiplies"
        raise NasError(f"target {target.slug} asks for {chosen.provider}, but {where} (among them: {multiplying})")
    return {"nodes": len(ran), "nodes_on_provider": own}
