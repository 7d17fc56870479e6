"""Where a training runs: here in one process. nas/train has the same on Accelerate, for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import NasError


class Engine:
    """One process, one device, no loss scaling.

    Whoever has several processes overrides what they must agree on. Gradients are averaged once per turn, after the
    last accumulated piece: games ask one network several times and another not at all in a turn, which the bookkeeping
    of DistributedDataParallel forbids.
    """

    def __init__(self, precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise NasError(
                f"precision {precision} needs loss scaling, which a run in this process has not",
                hint="use bf16 or fp32, or nas train on a GPU",
            )
        self.precision = precision

    @property
    def rank(self) -> int:
        """Which process this is."""
        return 0

    @property
    def world(self) -> int:
        """How many there are."""
        return 1

    def shard(self, module: nn.Module) -> nn.Module:
        """The module as this engine keeps it, before its optimiser is made."""
        return module

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision in which networks are called."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss."""
        loss.backward()

    def move(self, optimiser: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor:
        """Averages the gradients over the processes, limits their norm and steps; returns the norm before."""
        given = [each for each in parameters if each.grad is not None]
        norm = nn.utils.clip_grad_norm_(given, clip if clip else float("inf"))
        optimiser.step()
        return norm.detach()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of some numbers."""
        return values

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """All of a module's weights, wherever they are."""
        return module.state_dict()

    def optimiser_state(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """All of an optimiser's state, wherever it is."""
        return optimiser.state_dict()

    def load_module(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Puts back what `module_state` gave.

        Raises:
            RuntimeError: names or shapes differ.
        """
        module.load_state_dict(state)

    def load_optimiser(self, module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts back what `optimiser_state` gave."""
        optimiser.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """What else must be saved (the scale of losses, every process's random state)."""
        return {"random": [torch.get_rng_state()]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave.

        Raises:
            NasError: it is of another number of processes.
        """
        if len(state["random"]) != self.world:
            raise NasError(
                f"the checkpoint was made by {len(state['random'])} processes and {self.world} resume it",
                hint="resume with as many processes, so that the run ends as it would have",
            )
        torch.set_rng_state(state["random"][self.rank])

    def wait(self) -> None:
        """Waits for the other processes."""
