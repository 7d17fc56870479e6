"""What training-free scores share: a network as it is initialised, one batch, and a look into its activations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nas.bench import Bench, one_thread
from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.proxies import Score, combined
from nas.space import Candidate

ACTIVATIONS: Final = (functional.silu, functional.gelu, functional.relu)

Measure = Callable[[FlowDenoiser], float]


def score_of(candidate: Candidate, bench: Bench, name: str, measure: Measure) -> Score:
    """A score of the small copy's initialisation, once per seed, in one thread.

    Args:
        candidate: whose small copy is looked at.
        bench: its settings' seeds are those of the initialisation.
        name: of the score, for errors.
        measure: the score of one initialised student; it may change it.

    Raises:
        NasError: the candidate cannot be scaled down, or the score is not a finite number.
    """
    began = time.perf_counter()
    spec = bench.spec(candidate)
    values, params = [], 0
    with one_thread():
        for seed in bench.settings.seeds:
            fresh = awake(bench.student(spec, seed), seed)
            params = sum(each.numel() for each in fresh.parameters())
            values.append(_finite(measure(fresh), name, candidate))
    return combined(values, (), params=params, seconds=time.perf_counter() - began)


def awake(denoiser: FlowDenoiser, seed: int) -> FlowDenoiser:
    """The denoiser with every weight that is all 0 drawn anew, as torch initialises a linear layer.

    A last convolution that starts at 0 makes the network's output 0: no gradient reaches what lies before it, and the
    score would be of that one layer. The blocks of the UNets start at torch's own initialisation and are left as they
    are; this is for blocks that do not. It is of the copy that is scored, training starts where it always did.

    Args:
        denoiser: changed in place.
        seed: of what is drawn.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in denoiser.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return denoiser


def _finite(value: float, name: str, candidate: Candidate) -> float:
    if not math.isfinite(value):
        raise NasError(
            f"{name} of {candidate} is {value}: it cannot be scored so", hint="another --proxy, such as distill"
        )
    return value


Replacement = Callable[[Callable[..., Any], Any, Any], Tensor]


class Replaced(TorchFunctionMode):
    """While it is entered, functions of torch are answered by others.

    Blocks call activations, norms and attention as functions, which hooks on modules do not see.

    Args:
        answers: function -> what is called instead, with the function, its arguments and its keywords.
    """

    def __init__(self, answers: dict[Callable[..., Any], Replacement]) -> None:
        super().__init__()
        self.answers = answers

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function."""
        answer = self.answers.get(func)
        if answer is None:
            return func(*args, **(kwargs or {}))
        return answer(func, args, kwargs or {})
