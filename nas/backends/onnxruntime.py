"""onnxruntime with all graph optimisations on: on its CPU provider, or on another that the sheet names."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.backends import Loaded, _gpu, _providers
from nas.backends._providers import CPU, CUDA
from nas.device import Target
from nas.errors import NasError
from nas.exporters import missing
from nas.exporters import onnx as onnx_exporter

NAME = "onnxruntime"
_TYPES = {"fp32": "tensor(float)", "fp16": "tensor(float16)"}


def unavailable() -> str | None:
    """Why onnxruntime cannot be used here, or None."""
    return missing(["onnx", "onnxruntime"])


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Opens `module`'s ONNX graph on `target.threads` threads.

    On another provider than the CPU's, one call is profiled, to see where its nodes run.

    Args:
        module: for a target in fp16, a copy of it in half precision is exported.
        inputs: by the names of forward.
        target: what is asked for.
        options: `nas.backends._providers.Settings`.

    Raises:
        UsageError: the target asks for what the provider cannot give, or more threads than there are cores.
        NasError: the module cannot be exported, the provider or the GPU is not here, or the session does not run what
            was asked for.
    """
    chosen = _providers.settings(options, NAME)
    _providers.refuse(chosen, target, inputs, NAME)
    if chosen.provider == CPU:
        return _on_cpu(module, inputs, target)
    return _elsewhere(*_in_precision(module, inputs, target), target, chosen)


def _on_cpu(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Loaded:
    # In memory where that is possible, which spares a file. Handing over the module's own weights would be quicker
    # still, but one network of three then ran 2 % slower than from a file.
    content = onnx_exporter.inlined(*onnx_exporter.graph_of(module, inputs))
    session = _session(content, target) if content is not None else _from_file(module, inputs, target)
    _check(session, target, [CPU])
    arrays = {name: tensor.detach().numpy() for name, tensor in inputs.items()}

    def run() -> np.ndarray:
        output: np.ndarray = session.run(None, arrays)[0]
        return output

    return Loaded(run=run, description=_describe(session, target))


def _from_file(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Any:
    with tempfile.TemporaryDirectory(prefix="nas-onnx-") as folder:
        return _session(str(onnx_exporter.export(module, inputs, Path(folder) / "module.onnx")), target)


def _session(content: bytes | str, target: Target) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(content, sess_options=_options(target), providers=[CPU])


def _elsewhere(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, chosen: _providers.Settings) -> Loaded:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="nas-onnx-") as folder:
        path = onnx_exporter.export(module, inputs, Path(folder) / "module.onnx")
        options = _options(target)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=[chosen.provider], provider_options=[chosen.passed]
        )
        arrays = {name: tensor.detach().numpy() for name, tensor in inputs.items()}
        session.run(None, arrays)
        events = json.loads(Path(session.end_profiling()).read_text())  # which also ends its cost
    shares = _providers.shares(events, chosen, target)
    _check(session, target, [chosen.provider, CPU], chosen.passed)
    on_gpu = chosen.provider == CUDA
    extra = {"chip": chosen.gpu, **_gpu.figures(chosen.gpu)} if chosen.gpu else {}
    return Loaded(
        run=lambda: np.asarray(session.run(None, arrays)[0], dtype=np.float32),
        description={
            **_describe(session, target),
            **shares,
            **extra,
            "copies": "excluded" if on_gpu else "included",
        },
        device_ms=_on_device(session, arrays) if on_gpu else None,
    )


def _in_precision(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module and its floating-point inputs in the target's precision."""
    if target.precision == "fp32":
        return module, dict(inputs)
    halved = {name: t.half() if t.is_floating_point() else t for name, t in inputs.items()}
    return copy.deepcopy(module).to(torch.float16), halved


def _on_device(session: Any, arrays: Mapping[str, np.ndarray]) -> Callable[[int], float]:
    """Times calls whose inputs and outputs stay in the GPU's memory; each call waits for the GPU, as a sampler does."""
    import onnxruntime

    binding = session.io_binding()
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in arrays.items()}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")

    def device_ms(calls: int) -> float:
        binding.synchronize_inputs()
        start = time.perf_counter()
        for _ in range(calls):
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        return (time.perf_counter() - start) * 1e3 / calls

    return device_ms


def _options(target: Target) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


def _describe(session: Any, target: Target) -> dict[str, str | int]:
    import onnxruntime

    return {
        "runtime": NAME,
        "provider": ", ".join(session.get_providers()),
        "precision": target.precision,  # `_check` compared it with the session's
        "threads": session.get_session_options().intra_op_num_threads,
        "onnxruntime": onnxruntime.__version__,
        "opset": onnx_exporter.OPSET,
    }


def _check(session: Any, target: Target, providers: list[str], passed: Mapping[str, str] | None = None) -> None:
    """Onnxruntime falls back to other providers without a word, so what it settled on is read back."""
    found = session.get_providers()
    threads = session.get_session_options().intra_op_num_threads
    types = {i.type for i in session.get_outputs()}
    if found != providers or threads != target.threads or types != {_TYPES[target.precision]}:
        raise NasError(
            f"onnxruntime returns {', '.join(sorted(types))} from {', '.join(found)} with {threads} threads;"
            f" target {target.slug} asks for {_TYPES[target.precision]} from {', '.join(providers)} with"
            f" {target.threads}"
        )
    kept = session.get_provider_options()[providers[0]] if passed else {}
    for name, value in (passed or {}).items():
        if kept.get(name) != value:
            raise NasError(f"{providers[0]} has {name} = {kept.get(name)!r}, target {target.slug} asks for {value!r}")
