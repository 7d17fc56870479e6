"""What a block does, read off one forward pass on `meta`: operators, parameters, peak activation memory.

The pass runs without data. Every aten operator it calls is classified through one table; an operator that is not in
the table is an error, never a silent zero. Attention and linear layers are caught one level higher, as the functions
that modules call, so that neither a fused kernel nor the layout of an input can change what they are counted as.

What the numbers mean:

* MACs are multiply-accumulates of convolutions, linear layers and attention matmuls. Not counted: norms, activation
  functions, softmax, sums (under 1 % of a UNet of this kind).
* Attention is charged as a runtime without a fused kernel does it: scores are written, read by the softmax, written
  again and read by the second matmul. Where a runtime fuses them, bytes and peak are upper bounds.
* Bytes are stated at float32 for every tensor. A tensor that is broadcast counts its distinct elements.
* The peak assumes that every operator writes a new buffer, that a buffer is freed after its last reader, and that
  the caller holds the block's inputs throughout. Views are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nas.build import build_block
from nas.errors import NasError
from nas.network import BlockSpec
from nas.op import Op
from nas.trace import cache
from nas.trace.record import Trace
from nas.trace.recorder import Functions, Recorder, Uninitialised

__all__ = ["Trace", "block_trace", "module_trace", "trace_block", "trace_module"]

_memory: dict[tuple[Any, int], Trace] = {}


def trace_block(spec: BlockSpec, batch: int = 1) -> tuple[Op, ...]:
    """The operators of one block, in order; see `block_trace`."""
    return block_trace(spec, batch).ops


def block_trace(spec: BlockSpec, batch: int = 1) -> Trace:
    """Traces a block on `meta`, once per signature: later calls, and later processes, read it from the cache.

    Raises:
        NasError: the block cannot be built, or calls an operator that the table does not know.
    """
    key = (spec.signature, batch)
    if key not in _memory:
        found = cache.load(spec, batch)
        if found is None:
            found = _trace_spec(spec, batch)
            cache.store(spec, batch, found)
        _memory[key] = found
    return _memory[key]


def _trace_spec(spec: BlockSpec, batch: int) -> Trace:
    with torch.device("meta"), Uninitialised():
        module = build_block(spec)
        inputs = {name: torch.empty(batch, *shape) for name, shape in spec.inputs}
    return module_trace(module, inputs, name=spec.name)


def trace_module(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[Op, ...]:
    """The operators of one forward pass of any torch module; see `module_trace`."""
    return module_trace(module, inputs).ops


def module_trace(module: nn.Module, inputs: Mapping[str, Any], name: str = "") -> Trace:
    """Traces any torch module whose parameters are on `meta` (a published network, a decoder, a text encoder).

    Args:
        module: run in inference mode; its training flag is put back.
        inputs: keyword arguments of forward; tensors are replaced by their shapes.
        name: how errors call it; its class if empty.

    Raises:
        NasError: a parameter has data (build it under `torch.device("meta")`), or an operator is not in the table.
    """
    name = name or type(module).__name__
    if any(p.device.type != "meta" for p in module.parameters()):
        raise NasError(f"{name} must be built on the meta device to be traced")
    shapes = tree_map_only(Tensor, lambda t: t.to("meta"), dict(inputs))
    recorder = Recorder(module, name)
    held = tuple(t for t in tree_leaves(shapes) if isinstance(t, Tensor))
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), Functions(recorder), recorder:
            output = module(**shapes)
    finally:
        module.train(was_training)
    peak = recorder.peak_bytes(held, [t for t in tree_leaves(output) if isinstance(t, Tensor)])
    params = sum(p.numel() for p in module.parameters())
    return Trace(ops=tuple(recorder.ops), params=params, peak_bytes=peak)
