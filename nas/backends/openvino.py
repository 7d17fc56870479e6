"""OpenVINO on the CPU, in float32 unless the target asks for bf16.

Left to itself OpenVINO computes in bf16 where the CPU has it, whatever the model's precision: the precision is always
asked for, and read back.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded, check_options, cores, require
from nas.device import Target
from nas.errors import NasError
from nas.exporters import missing
from nas.exporters import onnx as onnx_exporter

NAME = "openvino"
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")


def unavailable() -> str | None:
    """Why OpenVINO cannot be used here, or None."""
    reason = missing(["onnx", "openvino"])
    return f"{reason} (pip install 'nas-diffusion[openvino]')" if reason else None


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Exports `module` to a temporary ONNX file and compiles it for `target.threads` threads, in one stream.

    Raises:
        UsageError: the target asks for another device or precision, or more threads than there are cores.
        NasError: the module cannot be exported, or the compiled model is not what was asked for.
    """
    check_options(options, (), runtime=NAME)
    require(target, inputs, runtime=NAME, precisions=_PRECISIONS, threads=cores())
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory(prefix="nas-openvino-") as folder:
        path = onnx_exporter.export(module, inputs, Path(folder) / "module.onnx")
        compiled = core.compile_model(
            core.read_model(path),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISIONS[target.precision],
                "INFERENCE_NUM_THREADS": target.threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
    _check(compiled, target)
    request = compiled.create_infer_request()
    arrays = {name: tensor.detach().numpy() for name, tensor in inputs.items()}

    def run() -> np.ndarray:
        output: np.ndarray = request.infer(arrays, share_inputs=True)[0]
        return output

    return Loaded(
        run=run,
        description={
            "runtime": NAME,
            "provider": ", ".join(compiled.get_property("EXECUTION_DEVICES")),
            "precision": target.precision,
            "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
            "openvino": openvino.__version__.partition("-")[0],
            "opset": onnx_exporter.OPSET,
        },
    )


def _check(compiled: Any, target: Target) -> None:
    """What was compiled is read back: a hint is only a hint."""
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    wanted = _PRECISIONS[target.precision]
    if (devices, precision, threads) != (["CPU"], wanted, target.threads):
        raise NasError(
            f"OpenVINO compiled for {', '.join(devices)} in {precision} with {threads} threads; target {target.slug}"
            f" asks for CPU in {wanted} with {target.threads}"
        )
    # Only asked where it matters: float32 is what a layer falls back to, and naming every layer takes a while.
    strayed = Counter(layer for layer, found in _products(compiled) if found != wanted) if wanted != "f32" else {}
    if strayed:
        counts = ", ".join(f"{count} {layer}" for layer, count in strayed.items())
        raise NasError(f"target {target.slug} asks for {wanted}; OpenVINO does not compute in it on this CPU: {counts}")


def _products(compiled: Any) -> Iterator[tuple[str, str]]:
    """Layer type and precision of every layer that multiplies, as compiled."""
    for operator in compiled.get_runtime_model().get_ordered_ops():
        said = operator.get_rt_info()
        layer = str(said["layerType"].value)
        if layer in _PRODUCTS:
            yield layer, str(said["runtimePrecision"].value)
