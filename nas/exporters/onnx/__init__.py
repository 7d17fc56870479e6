"""ONNX files from torch modules.

A network is put together from the graphs of its blocks: each distinct block is exported once and its graph, without
weights, kept on disk, so that the next network of the same space is written in a fraction of a second. Every tensor and
node of a network is named "<block>::<name inside the block>", so that a runtime's own profile can be read by blocks.
Anything else is exported whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.build import Network
from nas.errors import NasError
from nas.exporters import in_forward_order, missing
from nas.exporters.onnx.compose import SEPARATOR, compose
from nas.exporters.onnx.graphs import OPSET, OUTPUT, trace
from nas.exporters.onnx.weights import INLINE_BYTES, inlined, save

__all__ = ["OPSET", "OUTPUT", "SEPARATOR", "SUFFIX", "export", "graph_of", "inlined", "unavailable", "verify"]

SUFFIX = ".onnx"


def unavailable() -> str | None:
    """Why ONNX files cannot be written here, or None."""
    return missing(["onnx"])


def export(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path) -> Path:
    """Writes `module`, in eval mode on `inputs` (by the names of forward), as ONNX with those fixed shapes.

    A network's weights of more than 1.8 GB go to `<path>.data` beside it. Smaller files are passed through
    onnx.checker.

    Raises:
        NasError: an operator has no ONNX form here, or a module that is not a network has more than 1.8 GB of weights.
        UsageError: the inputs are not those of forward.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(*graph_of(module, inputs), path)
    return path


def graph_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """`module` as an onnx.ModelProto, and the tensors that its initializers without data stand for, by their names.

    Raises:
        NasError, UsageError: as `export`.
    """
    ordered = in_forward_order(module, inputs)
    if isinstance(module, Network):
        return compose(module, ordered), {name: tensor.detach() for name, tensor in module.state_dict().items()}
    weight_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if weight_bytes > INLINE_BYTES:
        raise NasError(
            f"{type(module).__name__} has {weight_bytes / 1e9:.1f} GB of weights; only networks made of blocks can be"
            f" written as ONNX beyond {INLINE_BYTES / 1e9:.1f} GB"
        )
    return trace(module, ordered), {}


def verify(path: str | Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between the file's output in onnxruntime and the module's own on `inputs`.

    Of a module that gives several outputs, the first is compared.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in in_forward_order(module, inputs).items()})[0]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            expected = module(**inputs)
            expected = expected[0] if isinstance(expected, tuple) else expected
    finally:
        module.train(was_training)
    return float((torch.from_numpy(got) - expected).abs().max())
