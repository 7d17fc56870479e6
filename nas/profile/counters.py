"""The same network counted by other tools, and why they differ.

Every counter sees the same built network on `meta`, at the same latent. fvcore traces with torch.jit, which fails on
`meta` as it is (torch 2.13): see `_traceable`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas.build import Network, build, example_inputs
from nas.network import NetworkSpec
from nas.profile.operators import OPERATIONS, macs_of
from nas.trace import block_trace

_SDPA = "scaled_dot_product_attention"
Progress = Callable[[str, int, int, str], None]
Figures = Sequence[tuple[str, int | None, int | None]]

OURS, TORCH, THOP, FVCORE, FVCORE_SDPA = "nas", "torch_flop_counter", "thop", "fvcore", "fvcore + attention"
LEAVES_OUT = {
    OURS: "norms, activation functions, softmax, sums",
    TORCH: "norms, activation functions, softmax, sums; on CPU tensors also attention, silently: counted here on meta",
    THOP: "attention matmuls and everything else that is a function and not a module; counts norms by element",
    FVCORE: "attention: it has no rule for scaled_dot_product_attention; layers whose result nothing reads; counts"
    " norms and resizes by element",
    FVCORE_SDPA: "layers whose result nothing reads; counts attention, once given a rule for it, and norms and resizes"
    " by element",
}


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one counter says.

    Attributes:
        name: of the counter.
        macs: multiply-accumulates of one call; None where it cannot run.
        params: parameters that it sees; None if it counts none.
        latent: "HxW" of the latent it was run at.
        leaves_out: what it does not count, or why it could not run.
        why: one line on how it comes to differ from ours on this network, with the figures; or why it could not run.
    """

    name: str
    macs: int | None
    params: int | None
    latent: str
    leaves_out: str
    why: str


def count_all(spec: NetworkSpec, progress: Progress | None = None) -> tuple[Count, ...]:
    """Every counter on one network."""
    found: list[Count] = []
    names = (OURS, TORCH, FVCORE, THOP)
    for i, name in enumerate(names):
        if progress is not None:
            progress("count", i, len(names), f"MACs by {name}")
        found += count(spec, name)
    if progress is not None:
        progress("count", len(names), len(names), "counted")
    return tuple(found)


def count(spec: NetworkSpec, counter: str) -> list[Count]:
    """One counter on one network; fvcore gives two figures, without and with a rule for attention."""
    runs: dict[str, Callable[[NetworkSpec], Figures]] = {OURS: _ours, TORCH: _torch, THOP: _thop, FVCORE: _fvcore}
    reason = ""
    try:
        figures = runs[counter](spec)
    except ImportError as error:
        figures, reason = [(counter, None, None)], f"could not run: {error}"
    return [
        Count(
            name=name,
            macs=macs,
            params=params,
            latent=f"{spec.input.height}x{spec.input.width}",
            leaves_out=reason or LEAVES_OUT[name],
            why=reason or _why(name, macs or 0, *_known(spec)),
        )
        for name, macs, params in figures
    ]


def _known(spec: NetworkSpec) -> tuple[int, int]:
    """Our MACs of the network, and those of them that are attention's matmuls."""
    ops = [op for block in spec.blocks for op in block_trace(block).ops]
    return sum(op.macs for op in ops), macs_of(ops, OPERATIONS["attention"])


def _why(name: str, macs: int, ours: int, attention: int) -> str:
    """The difference to ours as attention, where the counter leaves it out, and the rest."""
    missed = f"{attention / 1e9:.1f} of {ours / 1e9:.1f} GMAC, {attention / max(ours, 1):.1%}".replace("%", " %")
    if name == OURS:
        return f"counts convolutions, linear layers and attention matmuls ({missed})"
    if name == TORCH:
        same = "counts what we count" if macs == ours else _rest(macs - ours, ours)
        return f"{same}; on CPU tensors it would leave out attention, silently: {missed}"
    if name == FVCORE_SDPA:
        return f"given a rule for attention ({missed}), {_rest(macs - ours, ours)}"
    said = f"leaves out attention matmuls: {missed}" if attention else "no attention to leave out"
    return f"{said}; {_rest(macs - (ours - attention), ours)}"


def _rest(difference: int, ours: int) -> str:
    """What else makes a difference, with its sign and share of ours."""
    if not difference:
        return "otherwise equal"
    cause = "counts norms and resizes by element" if difference > 0 else "leaves out layers that it does not see"
    share = f"{difference / max(ours, 1):+.2%}".replace("%", " %").replace("-", "−")
    return f"{cause}: {difference / 1e9:+.3g} GMAC, {share}".replace(" -", " −")


class _Called(nn.Module):
    """A network that takes only what it reads, in a row: tools that trace take neither names nor None.

    Attributes:
        network: what is called.
        inputs: tensors on `meta` to call it with.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.network: Network = build(spec, "meta").eval()
        given = example_inputs(spec, device="meta")
        self.names = tuple(given)
        self.inputs = tuple(given.values())

    def forward(self, *given: Tensor) -> Any:
        return self.network(**dict(zip(self.names, given, strict=True)))


def _ours(spec: NetworkSpec) -> Figures:
    traces = [block_trace(block) for block in spec.blocks]
    return [(OURS, sum(trace.macs for trace in traces), sum(trace.params for trace in traces))]


def _torch(spec: NetworkSpec) -> Figures:
    called = _Called(spec)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        called(*called.inputs)
    return [(TORCH, counter.get_total_flops() // 2, None)]


def _thop(spec: NetworkSpec) -> Figures:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="distutils Version classes are deprecated", category=DeprecationWarning
        )
        import thop
        from thop.profile import register_hooks

        called = _Called(spec)
        # thop looks a module up by its exact class, and reads inputs that are given in a row: a block that only extends
        # one of torch's layers is counted as that layer.
        rules = {}
        for module in called.modules():
            bases = [base for base in type(module).__mro__[1:] if base in register_hooks]
            if bases and type(module) not in register_hooks:
                rules[type(module)] = register_hooks[bases[0]]
                module.register_forward_pre_hook(
                    lambda _, given, named: ((*given, *named.values()), {}), with_kwargs=True
                )
        with torch.no_grad():
            macs, params = thop.profile(called, inputs=called.inputs, custom_ops=rules, verbose=False)
    return [(THOP, int(macs), int(params))]


def _fvcore(spec: NetworkSpec) -> Figures:
    called = _Called(spec)
    with warnings.catch_warnings():
        # fvcore's own use of what torch.jit announces as its end, and the tracer's remarks on shapes.
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(called, called.inputs).set_op_handle(f"aten::{_SDPA}", _sdpa_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with torch.no_grad(), _traceable():
            total, attention = int(analysis.total()), int(analysis.by_operator()[_SDPA])
    # Without the rule fvcore counts attention as nothing, so one run gives both figures.
    return [(FVCORE, total - attention, None), (FVCORE_SDPA, total, None)]


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Query times key, then weights times value: q [..., S, D], k [..., T, D], v [..., T, V]."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


_traced_shape: Callable[[Tensor], torch.Size] = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


@contextmanager
def _traceable() -> Iterator[None]:
    """Lets torch.jit trace on `meta`, which saves the weights and the work of a real call.

    While it traces, sizes are tensors, which the Python kernels of `meta` cannot take: here they are numbers. And
    `meta` runs a convolution below the operator that the tracer would note: here that operator is called itself.
    """
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.Tensor, "shape", property(_shape)),
            (torch.Tensor, "size", lambda t, dim=None: _shape(t) if dim is None else _shape(t)[dim]),
            (torch.Tensor, "numel", lambda t: math.prod(_shape(t))),
            (nn.Conv2d, "_conv_forward", _convolution),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _shape(tensor: Tensor) -> torch.Size:
    return torch.Size([int(size) for size in _traced_shape(tensor)])


def _convolution(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding, stride, dilation = (_pair(v) for v in (module.padding, module.stride, module.dilation))
    flags = (False, [0, 0], module.groups, False, False, False, False)  # transposed, its padding, groups, backend's
    return torch._convolution(x, weight, bias, stride, padding, dilation, *flags)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
