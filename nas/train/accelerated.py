"""The loop's engine on Accelerate: several processes, sharded networks, mixed precision with loss scaling.

Every process sees its part of the same batch; gradients are averaged once per turn. Under FSDP2 the networks that learn
and their averages are sharded block by block, and a checkpoint still holds them whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from nas.build import Network
from nas.distill import Engine
from nas.errors import NasError
from nas.features import body

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# A loss scaled by less than this and still not finite is not finite by itself.
_LEAST_SCALE = 1.0


class AccelerateEngine(Engine):
    """What a run's processes must agree on.

    Args:
        accelerator: knows the processes, the device and the plugin that shards. Its own mixed precision is not used,
            because a stage chooses the precision.
        precision: "fp32", or the type in which networks are called, "bf16" or "fp16"; weights stay float32, and fp16
            scales its losses.
    """

    def __init__(self, accelerator: Accelerator, precision: str = "fp32") -> None:
        if precision != "fp32" and precision not in _TYPES:
            raise NasError(f"unknown precision {precision!r}; known: fp32, {', '.join(_TYPES)}")
        self.accelerator = accelerator
        self.precision = precision
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if precision == "fp16" else None
        self.plugin = _sharding(accelerator)
        self._sharded: list[nn.Module] = []

    @property
    def rank(self) -> int:
        """Which process this is."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many there are."""
        return self.accelerator.num_processes

    @property
    def shards(self) -> bool:
        """Whether networks are sharded."""
        return self.plugin is not None

    def shard(self, module: nn.Module) -> nn.Module:
        """The module, its network sharded in place block by block (FSDP2) where the run was launched so."""
        if self.plugin is None:
            return module
        # Imported here: only a sharded run needs it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network = body(module)
        mesh = init_device_mesh(self.accelerator.device.type, (self.world,))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": bool(self.plugin.reshard_after_forward)}
        for block in _blocks(network):
            fully_shard(block, **options)
        fully_shard(network, **options)
        self._sharded.append(module)
        return module

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision in which networks are called."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=_TYPES[self.precision])

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def move(self, optimiser: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float | None) -> Tensor:
        """Averages the gradients over the processes, limits their norm and steps; returns the norm before.

        In fp16 a step whose gradients overflowed is left out and the scale halved, which is how the scale is found; its
        norm is reported as 0. Where the scale is down to 1 it is reported as it is, and the run stops.
        """
        given = [each for each in parameters if each.grad is not None]
        self._average(given)
        if self.scaler is None:
            norm = self._clipped(given, clip)
            optimiser.step()
        else:
            self.scaler.unscale_(optimiser)
            norm = self._clipped(given, clip)
            self.scaler.step(optimiser)
            self.scaler.update()
            if self.scaler.get_scale() >= _LEAST_SCALE:
                norm = norm.nan_to_num(0.0, 0.0, 0.0)
        # A sharded network keeps gradients that passed through it in another's turn; they are nobody's.
        for module in self._sharded:
            module.zero_grad(set_to_none=True)
        return norm.detach()

    def _average(self, given: list[nn.Parameter]) -> None:
        """The mean over the processes of what is not sharded (FSDP has averaged the rest)."""
        plain = [each.grad for each in given if each.grad is not None and not isinstance(each.grad, DTensor)]
        if self.world == 1 or not plain:
            return
        flat = torch.cat([gradient.flatten() for gradient in plain])
        averaged = self.accelerator.reduce(flat, "mean")
        for gradient, part in zip(plain, averaged.split([each.numel() for each in plain]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _clipped(self, given: list[nn.Parameter], clip: float | None) -> Tensor:
        """The norm of all gradients before it was limited."""
        limit = clip if clip else math.inf
        gradients = [each.grad for each in given if each.grad is not None]
        sharded = [each for each in gradients if isinstance(each, DTensor)]
        if not sharded:
            return nn.utils.clip_grad_norm_(given, limit)
        whole: Any = nn.utils.get_total_norm(sharded)
        plain = nn.utils.get_total_norm([each for each in gradients if not isinstance(each, DTensor)])
        norm = torch.hypot(whole.full_tensor(), plain.to(whole.device))
        share = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(share)
        return norm

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of some numbers."""
        averaged: Tensor = self.accelerator.reduce(values, "mean")
        return averaged

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """All of a module's weights; under sharding only the first process gets them."""
        return get_model_state_dict(module, options=_WHOLE) if self.shards else module.state_dict()

    def optimiser_state(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """All of an optimiser's state; under sharding only the first process gets it."""
        return get_optimizer_state_dict(module, optimiser, options=_WHOLE) if self.shards else optimiser.state_dict()

    def load_module(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Puts back what `module_state` gave.

        Raises:
            RuntimeError: names or shapes differ.
        """
        if self.shards:
            set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
        else:
            module.load_state_dict(state)

    def load_optimiser(self, module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts back what `optimiser_state` gave."""
        if self.shards:
            set_optimizer_state_dict(module, optimiser, state, options=StateDictOptions(full_state_dict=True))
        else:
            optimiser.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """Every process's random state, the scale of losses, and whether networks were sharded."""
        own: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        random = gather_object([own]) if self.world > 1 else [own]
        return {"random": random, "scaler": scaler, "sharded": self.shards}

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave.

        Raises:
            NasError: it is of another number of processes, or one was sharded and the other is not.
        """
        if len(state["random"]) != self.world or state["sharded"] != self.shards:
            made, now = (
                f"{count} process{'es' * (count != 1)}{', sharded' * sharded}"
                for count, sharded in ((len(state["random"]), state["sharded"]), (self.world, self.shards))
            )
            raise NasError(
                f"the checkpoint was made by {made}, and {now} would resume it",
                hint="resume with as many processes, so that the run ends as it would have",
            )
        own = state["random"][self.rank]
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.accelerator.device)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def wait(self) -> None:
        """Waits for the other processes."""
        self.accelerator.wait_for_everyone()


def accelerator(device: str) -> Accelerator:
    """The processes of this run, on a device.

    Args:
        device: "cpu" or "cuda"; of several GPUs each process takes its own.

    Raises:
        NasError: it was launched for several processes of which Accelerate started only one.
    """
    several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if several and "WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ:
        raise NasError(
            "accelerate launch --cpu starts a single process unless mpirun starts the others",
            hint="accelerate launch --multi_gpu --num_processes 2 -m nas train … --device cpu",
        )
    return Accelerator(cpu=device == "cpu")


def _sharding(accelerator: Accelerator) -> Any | None:
    """Accelerate's FSDP plugin where the run was launched with it, also on CPUs, where Accelerate sets none up.

    Raises:
        NasError: it is FSDP1's.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.num_processes > 1:
        plugin = FullyShardedDataParallelPlugin()
    if plugin is not None and plugin.fsdp_version != 2:
        raise NasError("networks are sharded by FSDP2 only", hint="accelerate launch --use_fsdp --fsdp_version 2 …")
    return plugin


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is sharded and gathered as one: our blocks, or the items of a diffusers network's lists."""
    if isinstance(network, Network):
        found = [network.get_submodule(block.name) for block in network.spec.blocks]
    else:
        found = [item for child in network.children() if isinstance(child, nn.ModuleList) for item in child]
    return [module for module in found if any(True for _ in module.parameters())]
