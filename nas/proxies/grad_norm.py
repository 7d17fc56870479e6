"""The gradient's norm of an untrained network.

Abdelfattah et al. 2021 (Zero-Cost Proxies for Lightweight NAS, arXiv 2101.08134, section 3.1): the sum over the
parameter tensors of the Euclidean norm of the loss's gradient, after one batch. The loss is the one that the bench's
students are trained on (output, and text where it has a weight).
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from nas.bench import Bench, Stop
from nas.diffusion import FlowDenoiser
from nas.distill import predict
from nas.objectives import Batch, is_game, total
from nas.proxies import Score
from nas.proxies._free import score_of
from nas.space import Candidate

SUMMARY: Final = "norm of the loss's gradient at initialisation; no training"
UNIT: Final = "1"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """The norm of the small copy's gradient on the first training batch; `stop` is not asked.

    Raises:
        NasError: the candidate cannot be scaled down, or the norm is not finite.
    """
    return score_of(candidate, bench, "grad_norm", lambda fresh: gradient_norm(fresh, bench))


def gradient_norm(denoiser: FlowDenoiser, bench: Bench) -> float:
    """The sum of the Euclidean norms of every parameter tensor's gradient, after one batch."""
    denoiser.zero_grad(set_to_none=True)
    loss(denoiser, bench.data.batch(0), bench).backward()
    return sum(float(each.grad.norm()) for each in denoiser.parameters() if each.grad is not None)


def loss(denoiser: FlowDenoiser, batch: Batch, bench: Bench) -> Tensor:
    """What the bench's students are trained on, of one batch with the teacher's answers: a scalar."""
    losses = [each for each in bench.settings.objectives if not is_game(each)]
    said = predict(denoiser, batch, with_null=any(each.needs_null for each in losses))
    return total(losses, said, batch.teacher, batch)[0]
