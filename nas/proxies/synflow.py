"""SynFlow: how much passes through an untrained network along all its paths, without data.

Tanaka et al. 2020 (Pruning neural networks without any data by iteratively conserving synaptic flow, arXiv 2006.05467,
equation 2): R is the sum of the outputs for an input of ones with all weights at their absolute values, and the score
the sum over weights of w dR/dw. As a score of whole networks: Abdelfattah et al. 2021 (arXiv 2101.08134).

R must be linear along every path, so whatever is not is replaced: norms and activations by the identity, softmax
attention by the plain mean of the values (queries and keys then count nothing), the gate of a GEGLU by an open one
(as a product, flow would be squared at each layer; the gate's weights count nothing). The timestep is 0, where the
sinusoid is not negative, and the text is ones. The score grows exponentially with depth (1e250 for the small copy of
SDXL), so it is a decimal logarithm, computed in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.bench import Bench, Stop
from nas.blocks.transformer import GEGLU
from nas.build import Network
from nas.diffusion import FlowDenoiser
from nas.features import body
from nas.proxies import Score
from nas.proxies._free import Replaced, Replacement, score_of
from nas.space import Candidate

SUMMARY: Final = "flow through an untrained network along all its paths; no data, no training"
UNIT: Final = "log10"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """log10 of the small copy's synaptic flow at initialisation; `stop` is not asked.

    Raises:
        NasError: the candidate cannot be scaled down, or its flow is beyond double precision.
    """
    return score_of(candidate, bench, "synflow", _of)


def _of(fresh: FlowDenoiser) -> float:
    network = body(fresh)
    assert isinstance(network, Network)  # a small copy is made of our blocks
    given = {
        "sample" if name == "x" else name: torch.full((1, *shape), 0.0 if name == "timestep" else 1.0).double()
        for name, shape in network.spec.inputs.items()
    }
    return synaptic_flow(network, given)


def synaptic_flow(network: nn.Module, given: Mapping[str, Tensor]) -> float:
    """log10 of the sum over weights (parameters of two axes or more) of w dR/dw; nan where the sum is not positive.

    Args:
        network: changed: made double, with absolute weights.
        given: its inputs by name, double.
    """
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    for module in network.modules():
        if isinstance(module, GEGLU):
            module.register_forward_hook(_open)
    weights = [each for each in network.parameters() if each.dim() > 1]
    with Replaced(_LINEAR):
        flow = network(**given).sum()
    slopes = torch.autograd.grad(flow, weights, allow_unused=True)
    passed = sum(float((w.detach() * d).sum()) for w, d in zip(weights, slopes, strict=True) if d is not None)
    return math.log10(passed) if passed > 0 else math.nan


def _identity(function: Any, arguments: Any, keywords: Any) -> Tensor:
    tensor: Tensor = arguments[0]
    return tensor


def _open(module: GEGLU, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    hidden: Tensor = module.proj(given[0]).chunk(2, dim=-1)[0]
    return hidden


def _mean(function: Any, arguments: Any, keywords: Any) -> Tensor:
    query, _, value = arguments[:3]
    return value.mean(-2, keepdim=True).expand(*value.shape[:-2], query.shape[-2], value.shape[-1])


_LINEAR: Final[dict[Callable[..., Any], Replacement]] = {
    functional.silu: _identity,
    functional.relu: _identity,
    functional.gelu: _identity,
    functional.group_norm: _identity,
    functional.layer_norm: _identity,
    functional.scaled_dot_product_attention: _mean,
}
