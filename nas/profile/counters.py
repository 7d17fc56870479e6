"""The same network counted by other tools, and why they differ.

Every counter sees the same built network. torch's and thop's run on `meta`; fvcore traces with torch.jit, which fails
on `meta` (torch 2.13), so it runs on real tensors: each parameter is one zero seen in the parameter's shape, and the
latent is small, because activations are real.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas import families
from nas.build import Network, build, example_inputs
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.trace import block_trace

_SMALL_PX = 256
_SDPA = "scaled_dot_product_attention"
Progress = Callable[[str, int, int, str], None]

OURS, TORCH, THOP, FVCORE, FVCORE_SDPA = "nas", "torch", "thop", "fvcore", "fvcore + attention"
LEAVES_OUT = {
    OURS: "norms, activation functions, softmax, sums",
    TORCH: "norms, activation functions, softmax, sums; on CPU tensors also attention, silently: counted here on meta",
    THOP: "attention matmuls and everything else that is a function and not a module; counts norms by element",
    FVCORE: "attention: it has no rule for scaled_dot_product_attention; counts norms and resizes by element",
    FVCORE_SDPA: "nothing that multiplies, once it is given a rule for attention; counts norms and resizes by element",
}


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one counter says.

    Attributes:
        counter: its name.
        macs: multiply-accumulates of one call; None where it cannot run.
        params: parameters that it sees; None if it counts none.
        latent: "HxW" of the latent it was run at.
        deployed: whether that is the latent of the candidate's own resolution.
        leaves_out: what it does not count, or why it could not run.
    """

    counter: str
    macs: int | None
    params: int | None
    latent: str
    deployed: bool
    leaves_out: str


def compare(candidate: Candidate, progress: Progress | None = None) -> tuple[Count, ...]:
    """Every counter at the candidate's own latent where it can run there, then all of them at one small latent."""
    report = progress or (lambda stage, done, total, note: None)
    deployed = families.network(candidate)
    small = families.network(candidate.space.at_resolution(_small_px(candidate)).from_row(np.array(candidate.row)))
    found: list[Count] = []
    jobs = [(spec, name) for spec, names in ((deployed, (OURS, TORCH, THOP)), (small, (OURS, TORCH, THOP, FVCORE)))
            for name in names]  # fmt: skip
    for i, (spec, name) in enumerate(jobs):
        report("count", i, len(jobs), f"{name} at a {_latent(spec)} latent")
        found += count(spec, name, deployed=spec is deployed)
    report("count", len(jobs), len(jobs), "counted")
    return tuple(found)


def count(spec: NetworkSpec, counter: str, *, deployed: bool = True) -> list[Count]:
    """One counter on one network; fvcore gives two figures, without and with a rule for attention."""
    runs: dict[str, Callable[[NetworkSpec], Sequence[tuple[str, int, int | None]]]] = {
        OURS: _ours,
        TORCH: _torch,
        THOP: _thop,
        FVCORE: _fvcore,
    }
    try:
        figures: Sequence[tuple[str, int | None, int | None]] = runs[counter](spec)
        reason = ""
    except ImportError as error:
        figures, reason = [(counter, None, None)], f"could not run: {error}"
    return [
        Count(
            counter=name,
            macs=macs,
            params=params,
            latent=_latent(spec),
            deployed=deployed,
            leaves_out=reason or LEAVES_OUT[name],
        )
        for name, macs, params in figures
    ]


def _small_px(candidate: Candidate) -> int:
    """About `_SMALL_PX`, as a multiple of what the family can halve, and not above the candidate's own."""
    space = candidate.space
    step = space.input.pixels_per_latent * int(space.fixed.get("downscale", 1))
    return min(space.resolution_px, max(step, _SMALL_PX // step * step))


def _latent(spec: NetworkSpec) -> str:
    return f"{spec.input.height}×{spec.input.width}"


def _positional(spec: NetworkSpec, device: str) -> tuple[Tensor | None, ...]:
    """The inputs in the order of `Network.forward`, None for those that the network does not take."""
    given = example_inputs(spec, device=device)
    names = ("sample", "timestep", "text", "pooled", "size_ids")
    return tuple(given.get(name) for name in names[: 1 + max(names.index(name) for name in given)])


def _ours(spec: NetworkSpec) -> list[tuple[str, int, int | None]]:
    traces = [block_trace(block) for block in spec.blocks]
    return [(OURS, sum(trace.macs for trace in traces), sum(trace.params for trace in traces))]


def _torch(spec: NetworkSpec) -> list[tuple[str, int, int | None]]:
    network = build(spec, "meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**example_inputs(spec, device="meta"))
    return [(TORCH, counter.get_total_flops() // 2, None)]


def _thop(spec: NetworkSpec) -> list[tuple[str, int, int | None]]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="distutils Version classes are deprecated", category=DeprecationWarning
        )
        import thop

        with torch.no_grad():
            macs, params = thop.profile(build(spec, "meta").eval(), inputs=_positional(spec, "meta"), verbose=False)
    return [(THOP, int(macs), int(params))]


def _fvcore(spec: NetworkSpec) -> list[tuple[str, int, int | None]]:
    network = weightless(build(spec, "meta").eval())
    with warnings.catch_warnings():
        # fvcore's own use of what torch.jit announces as its end, and the tracer's remarks on shapes.
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, _positional(spec, "cpu")).set_op_handle(f"aten::{_SDPA}", _sdpa_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with torch.no_grad():
            total, attention = int(analysis.total()), int(analysis.by_operator()[_SDPA])
    # Without the rule fvcore counts attention as nothing, so one run gives both figures.
    return [(FVCORE, total - attention, None), (FVCORE_SDPA, total, None)]


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Query times key, then weights times value: q [..., S, D], k [..., T, D], v [..., T, V]."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


def weightless(network: Network) -> Network:
    """`network`, its parameters on CPU without their memory: each is one zero, expanded to the parameter's shape."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return network
