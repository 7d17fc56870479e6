"""ExecuTorch programs from torch modules: torch.export, then ExecuTorch's lowering to its XNNPACK backend."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError

from nas.errors import NasError, UsageError
from nas.exporters import in_forward_order, missing
from nas.exporters._program import MULTIPLYING, exported, first_line, quiet

SUFFIX = ".pte"
METHOD = "forward"
# Warnings of ExecuTorch about its own code, and of torch's about what ExecuTorch imports.
_WARNINGS = (
    r"(read_text|open_text|read_binary) is deprecated",
    r"`torch\.jit\.script_method` is deprecated",
    r"This API is experimental",
)
# What torch and torchao log on import of ExecuTorch.
_CHATTER = re.compile(r"Failed to load .*_C_\w+|register_constant\(\) on Enum subclasses")


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A module as an ExecuTorch program.

    Attributes:
        program: the content of a .pte file.
        delegated: operators that XNNPACK runs -> how often.
        portable: operators that ExecuTorch's own kernels run -> how often.
        partitions: how many pieces XNNPACK got; between them tensors are handed over.
    """

    program: bytes
    delegated: Mapping[str, int]
    portable: Mapping[str, int]
    partitions: int


def unavailable() -> str | None:
    """Why ExecuTorch programs cannot be written here, or None."""
    return missing(["executorch"])


def export(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path) -> Path:
    """Writes `module` as a .pte file in float32 for XNNPACK, with those fixed shapes.

    Raises:
        UsageError: another ending, or the inputs are not those of forward.
        NasError: an operator has no ExecuTorch form, or XNNPACK does not take a matrix product or convolution.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UsageError(f"an ExecuTorch program ends in {SUFFIX}, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lower(module, inputs).program)
    return path


def verify(path: str | Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between the file's first output in ExecuTorch and the module's own."""
    ordered = in_forward_order(module, inputs)
    program = open_program(Path(path).read_bytes())
    found = program.load_method(METHOD).execute(arguments(ordered))[0]
    was_training = module.training
    with torch.no_grad():
        expected = module.eval()(**ordered)
    module.train(was_training)
    first = expected[0] if isinstance(expected, tuple) else expected
    return float((found - first).abs().max())


def open_program(program: bytes) -> Any:
    """The program, opened by the runtime; keep it as long as its methods, which do not hold on to it."""
    with calm():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(program)


def arguments(ordered: Mapping[str, Tensor]) -> list[Tensor]:
    """Inputs as the runtime takes them: it reads memory in the order of the axes."""
    return [tensor.detach().contiguous() for tensor in ordered.values()]


def lower(module: nn.Module, inputs: Mapping[str, Tensor]) -> Lowered:
    """`module` as an ExecuTorch program.

    Attention is written out as two matrix products before lowering: ExecuTorch's own decomposition guards against
    rows that are masked out entirely with operators that XNNPACK does not take, which cost more than the products.

    Raises:
        UsageError: the inputs are not those of forward.
        NasError: an operator has no ExecuTorch form, or XNNPACK does not take a matrix product or convolution.
    """
    name = type(module).__name__
    program = exported(module, inputs, to="ExecuTorch")
    aten = torch.ops.aten
    table = {aten.scaled_dot_product_attention.default: attention, aten.gelu.default: tanh_gelu}
    with calm(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            edge = to_edge_transform_and_lower(program.run_decompositions(table), partitioner=[XnnpackPartitioner()])
            delegated, portable, partitions = _placement(edge.exported_program())
            content = bytes(edge.to_executorch().buffer)
        except (RuntimeError, NotImplementedError, AssertionError, SpecViolationError) as error:
            raise NasError(f"{name} cannot be written as ExecuTorch: {first_line(error)}") from error
    if left := [operator for operator in portable if operator in MULTIPLYING]:
        raise NasError(f"{name} cannot be written as ExecuTorch: XNNPACK does not take its {', '.join(sorted(left))}")
    return Lowered(program=content, delegated=delegated, portable=portable, partitions=partitions)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of `[..., L, w]` to `[..., S, w]` as product, softmax, product; a decomposition of torch's.

    Raises:
        NasError: a mask, causal or grouped attention, which no block here has.
    """
    if attn_mask is not None or is_causal or enable_gqa:
        raise NasError("attention that is masked, causal or grouped by an argument is not written as ExecuTorch here")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    length, width = query.shape[-2], value.shape[-1]
    # One axis of batch and heads: XNNPACK takes products of three axes as they are.
    queries, keys, values = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    weights = torch.softmax(torch.bmm(queries * factor, keys.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, values).reshape(*query.shape[:-2], length, width)


def tanh_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU in its tanh approximation as x sigmoid(2u), which equals x (1 + tanh u) / 2; a decomposition of torch's.

    ExecuTorch hands both forms of GELU to XNNPACK as the exact one.
    """
    if approximate != "tanh":
        return NotImplemented
    slope = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (slope + slope * 0.044715 * (x * x)))


def _placement(program: Any) -> tuple[Counter[str], Counter[str], int]:
    """Operators that XNNPACK runs, operators that it does not, and in how many pieces the former are."""
    pieces = [child for _, child in program.graph_module.named_children()]
    delegated = sum((_operators(piece.original_module.graph) for piece in pieces), Counter[str]())
    return delegated, _operators(program.graph), len(pieces)


def _operators(graph: torch.fx.Graph) -> Counter[str]:
    """Operator -> how often, without the handing over of values."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    names = (str(target.name()).partition("::")[2] for target in targets if hasattr(target, "_op"))
    return Counter(name.partition(".")[0] for name in names)


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Silences what ExecuTorch, torch and torchao say about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]

    def listen(record: logging.LogRecord) -> bool:
        return _CHATTER.search(record.getMessage()) is None

    for logger in loggers:
        logger.addFilter(listen)
    try:
        with quiet(), warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(listen)
