"""BlockSpec and NetworkSpec to torch modules."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nas import registry
from nas.errors import NasError, unknown
from nas.network import BlockSpec, NetworkSpec, Scalar

# A whole number is also accepted where a setting is a float; a bool never passes for a number.
_ALLOWED = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def build_block(spec: BlockSpec) -> nn.Module:
    """The module of one block, with torch's default initialisation, on the current default device.

    Its `forward` takes the block's inputs by name, each with a batch axis in front.

    Raises:
        UsageError: unknown block kind.
        NasError: a setting that the kind does not have, lacks, or cannot take.
    """
    plugin = registry.load("nas.blocks", spec.kind)
    module: nn.Module = plugin.Block(plugin.Settings(**_checked(spec, plugin.Settings)))
    return module


def check(spec: NetworkSpec) -> None:
    """Checks every block's settings as building would, and builds nothing.

    Raises:
        UsageError: unknown block kind.
        NasError: a setting that the kind does not have, lacks, or cannot take; names the block.
    """
    for block in spec.blocks:
        plugin = registry.load("nas.blocks", block.kind)
        try:
            plugin.Settings(**_checked(block, plugin.Settings))
        except NasError as error:
            if block.name in error.message:
                raise
            raise NasError(f"block {block.name!r}: {error.message}", hint=error.hint) from error


def _checked(spec: BlockSpec, settings: type) -> dict[str, Scalar]:
    known = {field.name: field for field in fields(settings)}
    given = dict(spec.settings)
    where = f"block {spec.name!r} of kind {spec.kind!r}"
    for name, value in given.items():
        if name not in known:
            raise unknown("setting", name, known, where=where)
        wanted = str(known[name].type)
        if not isinstance(value, _ALLOWED[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            raise NasError(f"{where}: setting {name!r} must be of type {wanted}, got {value!r}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise NasError(f"{where} lacks the settings {', '.join(missing)}")
    return given


def build(
    spec: NetworkSpec,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    seed: int | None = None,
) -> Network:
    """The whole network, with torch's default initialisation.

    Args:
        spec: the network.
        device: where it is made; "meta" makes shapes without memory.
        dtype: floating-point type of the parameters, float32 if None.
        seed: makes the weights reproducible and leaves the caller's random state alone; None draws from it.
    """
    chosen = torch.device(device) if device is not None else torch.get_default_device()
    cuda = [chosen] if chosen.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=cuda), chosen:
        if seed is not None:
            torch.manual_seed(seed)
        network = Network(spec)
    return network if dtype is None else network.to(dtype)


def example_inputs(
    spec: NetworkSpec, batch: int = 1, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Random inputs of a network by the names of `Network.forward`, in its order: normal, at timestep 500."""
    inputs: dict[str, Tensor] = {}
    shapes = spec.inputs
    for name in ("x", "timestep", "text", "pooled", "size_ids", "guidance"):
        if name == "timestep" and name in shapes:
            inputs[name] = torch.full((batch,), 500.0, device=device)
        elif name in shapes:
            drawn = torch.randn(batch, *shapes[name], generator=generator, device=device)
            inputs["sample" if name == "x" else name] = drawn
    return inputs


def with_guidance(network: Network, width: int = 256) -> Network:
    """A network of the same weights that also takes an embedding of the guidance scale, as consistency models do.

    The one new weight, `time_embedding.cond_proj.weight`, is 0: the network starts as the function that it was, and a
    linear map of zeros does get a gradient. (LCM's author starts it at random,
    https://github.com/luosiallen/latent-consistency-model/issues/45.)

    Args:
        network: one with a time embedding that takes no guidance yet.
        width: G, even; 256 as published.

    Raises:
        NasError: it has no such time embedding.
    """
    spec = network.spec
    found = [b for b in spec.blocks if b.kind == "time_embedding" and "guidance" not in dict(b.inputs)]
    if not found:
        raise NasError(f"network {spec.name} has no time embedding that could take a guidance embedding besides")
    embedding = found[0]
    settings = tuple(sorted({**dict(embedding.settings), "guidance_width": width}.items()))
    taking = replace(embedding, settings=settings, inputs=(*embedding.inputs, ("guidance", (width,))))
    blocks = tuple(taking if b is embedding else b for b in spec.blocks)
    shape = replace(spec.input, guidance_width=width)
    first = next(network.parameters())
    made = build(replace(spec, input=shape, blocks=blocks), first.device, first.dtype)
    new = f"{embedding.name}.cond_proj.weight"
    state = made.state_dict()
    made.load_state_dict({**network.state_dict(), new: torch.zeros_like(state[new])})
    made.checkpoint_blocks = network.checkpoint_blocks
    return made.train(network.training)


class Network(nn.Module):
    """A network whose submodules have the names of its blocks.

    Parameter names equal those of the diffusers class of the same shape, except that the two output layers are below
    `head.` (see `nas.checkpoint`).

    Attributes:
        spec: what it was built from.
        checkpoint_blocks: keep only what stands between the blocks for the gradients, and compute what is inside a
            block again when they are taken: less memory for about a third more time, the same gradients.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoint_blocks = False
        for block in spec.blocks:
            _place(self, block.name, build_block(block))
        self._needs = tuple(spec.inputs)
        self._last_use = {block.skip: i for i, block in enumerate(spec.blocks) if block.skip is not None}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        return_features: Collection[str] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """One call; which inputs a network takes is `spec.inputs` (there the sample is called "x").

        Args:
            sample: noisy latent [B, C, H, W]; the clean one for a decoder.
            timestep: [B], or one number for the whole batch.
            text: text tokens [B, T, D].
            pooled: summary of the text [B, P].
            size_ids: sizes of the wanted image [B, n].
            guidance: embedding of the guidance scale [B, G] (`nas.blocks.time_embedding.guidance_features`).
            return_features: names of blocks whose outputs are wanted too (for feature distillation).

        Returns:
            The prediction [B, C, H, W]; with `return_features`, also those blocks' outputs by name (of a block that
            writes several tensors, the first).

        Raises:
            NasError: an input that a block reads is missing.
            UsageError: `return_features` names a block that is not in this network.
        """
        wanted = frozenset(return_features or ())
        if wanted:
            self._check_names(wanted)
        if timestep is not None:
            timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        given = {
            "x": sample,
            "timestep": timestep,
            "text": text,
            "pooled": pooled,
            "size_ids": size_ids,
            "guidance": guidance,
        }
        if missing := [name for name in self._needs if given.get(name) is None]:
            raise NasError(f"network {self.spec.name} must be given {', '.join(missing)}")
        kept: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        for i, block in enumerate(self.spec.blocks):
            if block.skip is not None:
                given["skip"] = kept[block.skip]
            outputs = self._run(self.get_submodule(block.name), {name: given[name] for name, _ in block.inputs})
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            given.update(zip(block.writes, outputs, strict=True))
            if block.name in self._last_use:
                kept[block.name] = outputs[0]
            if block.skip is not None and self._last_use[block.skip] == i:
                del kept[block.skip]
            if block.name in wanted:
                features[block.name] = outputs[0]
        output = given["x"]
        assert output is not None
        return output if return_features is None else (output, features)

    def _run(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(module, use_reentrant=False, **inputs)
        return module(**inputs)

    def _check_names(self, names: Collection[str]) -> None:
        known = [block.name for block in self.spec.blocks]
        for name in names:
            if name not in known:
                raise unknown("block", name, known, where=f"network {self.spec.name}")


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hangs `module` at the dotted `path` below `root`, making the containers between."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
