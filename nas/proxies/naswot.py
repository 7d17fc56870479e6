"""NASWOT: how differently an untrained network's activations switch for different inputs.

Mellor et al. 2021 (Neural Architecture Search without Training, arXiv 2006.04647, section 3): a ReLU network maps an
input to a binary code of which units are on, and the score is log |det K| of K_ij = N - d(c_i, c_j), with N units and
the Hamming distance d. Here the activations are SiLU and GELU, which have no off: a unit counts as on where the
activation's input (behind the norm, where there is one) is above 0. The inputs are one batch of the bench's training
rows, with captions. Larger networks have larger N, and score higher for that alone.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from nas.bench import Bench, Stop
from nas.diffusion import FlowDenoiser
from nas.distill import predict
from nas.proxies import Score
from nas.proxies._free import ACTIVATIONS, Replaced, score_of
from nas.space import Candidate

SUMMARY: Final = "how differently untrained activations switch for different inputs; no training"
UNIT: Final = "log"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """The natural log |det K| of the small copy at initialisation; `stop` is not asked.

    Raises:
        NasError: the candidate cannot be scaled down, or two of the batch's rows have one code (K is singular).
    """

    def measure(fresh: FlowDenoiser) -> float:
        return log_determinant(codes_of(fresh, bench))

    return score_of(candidate, bench, "naswot", measure)


@torch.no_grad()
def codes_of(denoiser: FlowDenoiser, bench: Bench) -> Tensor:
    """Which units are on for the rows of the first training batch: bool [B, N]."""
    batch = bench.data.batch(0)
    found: list[Tensor] = []

    def noted(function: Any, arguments: Any, keywords: Any) -> Tensor:
        found.append((arguments[0] > 0).reshape(len(batch), -1))
        answer: Tensor = function(*arguments, **keywords)
        return answer

    with Replaced(dict.fromkeys(ACTIVATIONS, noted)):
        predict(denoiser, batch, with_null=False)
    return torch.cat(found, dim=1)


def log_determinant(codes: Tensor) -> float:
    """Natural log |det K|, K_ij = N - Hamming distance of codes i and j (equation 2 of the paper), from bool [B, N].

    -inf where two codes are equal.
    """
    on = codes.to(torch.float64)
    agreeing = on @ on.T + (1 - on) @ (1 - on).T
    return float(torch.linalg.slogdet(agreeing).logabsdet)
