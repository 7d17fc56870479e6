"""ONNX graphs of single modules, and of blocks without their weights, kept on disk.

torch's TorchScript-based exporter is used, not the newer one: 0.05 s for a block against seconds, and a measurement
exports hundreds. The graphs run equally fast.

The kept files lie in the folder "onnx" of the cache, some ten kilobytes for each distinct block, shape, batch,
precision and version of the block's code. None is ever removed by us; the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.build import build_block
from nas.errors import NasError
from nas.exporters.onnx.fold import fold as fold_constants
from nas.network import BlockSpec
from nas.paths import atomic_write, cache_dir
from nas.trace.cache import code_hash

OPSET = 17  # the first with LayerNormalization as one operator
OUTPUT = "out"
_FORMAT = 2  # raise it when the content of a cached graph changes meaning
_DIGEST_BYTES = hashlib.sha256().digest_size
_PREFIX = "module."  # of the names of a module inside `_Called`


def trace(module: nn.Module, inputs: Mapping[str, Tensor], outputs: int = 1, *, fold: bool = True) -> Any:
    """The module as an onnx.ModelProto, weights included; outputs are "out", "out1", ...

    Args:
        module: called by the names of `inputs`.
        inputs: in the order of forward.
        outputs: how many tensors it returns.
        fold: compute what depends on weights only (transposed matrices) now; weights then lose their names.

    Raises:
        NasError: an operator has no ONNX form here.
    """
    import onnx

    was_training, file = module.training, io.BytesIO()
    module.eval()
    try:
        _export(module, inputs, outputs, file, fold)
    finally:
        module.train(was_training)
    return onnx.load_from_string(file.getvalue())


def output_names(count: int) -> list[str]:
    """The names of that many outputs."""
    return [OUTPUT, *(f"{OUTPUT}{i}" for i in range(1, count))]


@lru_cache(maxsize=4096)
def block_graph(spec: BlockSpec, batch: int, dtype: torch.dtype) -> bytes:
    """A block's serialised ModelProto in which weights are initializers with names and shapes but no data.

    The names are those of the block's parameters. From the disk where an earlier process made it.

    Raises:
        NasError: an operator has no ONNX form here, or the block has weights that are not its parameters.
    """
    name = f"{_FORMAT}-{spec.kind}-{spec.key}-{batch}-{str(dtype).removeprefix('torch.')}-{code_hash(spec.kind)}.graph"
    path = cache_dir("onnx") / name.replace("/", "_")
    data = _read(path)
    if data is None:
        data = _make(spec, batch, dtype)
        _keep(path, data)
    return data


def _read(path: Path) -> bytes | None:
    """A kept graph; None where there is none, or not the whole of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == digest else None


def _keep(path: Path, data: bytes) -> None:
    """Keeps a graph for later processes, if the cache can be written: it changes the time, never a number."""
    with contextlib.suppress(NasError):
        atomic_write(path, hashlib.sha256(data).digest() + data)


def _make(spec: BlockSpec, batch: int, dtype: torch.dtype) -> bytes:
    import onnx

    # The exporter merges weights of equal values (all norms start as ones), so each is given values of its own.
    generator = torch.Generator().manual_seed(0)
    block = build_block(spec).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = {key: torch.randn(batch, *shape, generator=generator).to(dtype) for key, shape in spec.inputs}
    model = trace(block, inputs, len(spec.writes), fold=False)
    weights = dict(block.named_parameters())
    for tensor in model.graph.initializer:
        tensor.name = _parameter(tensor.name, weights, spec, onnx.numpy_helper.to_array(tensor))
        tensor.ClearField("raw_data")
    _rename_reads(model.graph)
    fold_constants(model)
    data: bytes = model.SerializeToString()
    return data


def _parameter(name: str, weights: Mapping[str, Tensor], spec: BlockSpec, values: Any) -> str:
    """The parameter that an initializer is; anything else would be weights that a network could not replace."""
    own = name.removeprefix(_PREFIX)
    if own not in weights or not torch.equal(weights[own].detach(), torch.from_numpy(values.copy())):
        raise NasError(f"block kind {spec.kind!r}: the exporter made {name!r}, which is none of its parameters")
    return own


def _rename_reads(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = [name.removeprefix(_PREFIX) for name in node.input]


def _export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: int, file: io.BytesIO, fold: bool) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        # Ours by choice (see above). The others are remarks of the tracer on Python values and constants that fixed
        # shapes make harmless; a wrong graph shows in `verify`.
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)
        try:
            torch.onnx.export(
                _Called(module, tuple(inputs)),
                tuple(inputs.values()),
                file,  # type: ignore[arg-type]
                input_names=list(inputs),
                output_names=output_names(outputs),
                opset_version=OPSET,
                do_constant_folding=fold,
                dynamo=False,
            )
        except (torch.onnx.errors.UnsupportedOperatorError, torch.onnx.errors.SymbolicValueError) as error:
            reason = str(error).splitlines()[0]
            raise NasError(f"{type(module).__name__} cannot be written as ONNX opset {OPSET}: {reason}") from error


class _Called(nn.Module):
    """A module as a function of exactly these inputs: the exporter would pass every other option by position."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output: Tensor | tuple[Tensor, ...] = self.module(**dict(zip(self.names, inputs, strict=True)))
        return output
