"""onnxruntime on its CPU provider, all graph optimisations on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded, cores, require
from nas.device import Target
from nas.errors import NasError
from nas.exporters import missing
from nas.exporters import onnx as onnx_exporter

NAME = "onnxruntime"
_PROVIDER = "CPUExecutionProvider"


def unavailable() -> str | None:
    """Why onnxruntime cannot be used here, or None."""
    return missing(["onnx", "onnxruntime"])


def load(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Loaded:
    """Exports `module` to a temporary ONNX file and opens it on `target.threads` threads.

    Raises:
        UsageError: the target asks for another device or precision, or more threads than there are cores.
        NasError: the module cannot be exported, or the session does not run what was asked for.
    """
    require(target, inputs, runtime=NAME, precisions={"fp32"}, threads=cores())
    with tempfile.TemporaryDirectory(prefix="nas-onnx-") as folder:
        return open_file(onnx_exporter.export(module, inputs, Path(folder) / "module.onnx"), inputs, target)


def open_file(path: str | Path, inputs: Mapping[str, Tensor], target: Target) -> Loaded:
    """An exported file, run on `inputs`; the file is not needed after this call."""
    import onnxruntime

    require(target, inputs, runtime=NAME, precisions={"fp32"}, threads=cores())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[_PROVIDER])
    _check(session, target)
    arrays = {name: tensor.detach().numpy() for name, tensor in inputs.items()}

    def run() -> np.ndarray:
        output: np.ndarray = session.run(None, arrays)[0]
        return output

    return Loaded(
        run=run,
        description={
            "runtime": NAME,
            "provider": ", ".join(session.get_providers()),
            "precision": "fp32",
            "threads": session.get_session_options().intra_op_num_threads,
            "onnxruntime": onnxruntime.__version__,
            "opset": onnx_exporter.OPSET,
        },
    )


def _check(session: Any, target: Target) -> None:
    """Onnxruntime falls back to other providers without a word, so what it settled on is read back."""
    providers = session.get_providers()
    threads = session.get_session_options().intra_op_num_threads
    types = {i.type for i in session.get_outputs()}
    if providers != [_PROVIDER] or threads != target.threads or types != {"tensor(float)"}:
        raise NasError(
            f"onnxruntime returns {', '.join(sorted(types))} from {', '.join(providers)} with {threads} threads;"
            f" target {target.slug} asks for float from {_PROVIDER} with {target.threads}"
        )
