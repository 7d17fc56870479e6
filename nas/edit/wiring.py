"""Shapes followed through a network: what each block is given, and whether that is what it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from nas.errors import NasError
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar, Shape, block

# A residual step: its input channels may be anything, so an edit may give it a wider or a narrower input.
RESIDUAL = ("resnet", "separable", "tiny_resnet", "separable_decoder")
_AS_GIVEN = ("transformer", "pixel_attention", "dit_block", "mmdit_block", "token_skip", "text_time")
# What may be left out or doubled where its output has the shape of its input.
STEPS = (*RESIDUAL, "transformer", "pixel_attention", "dit_block")

_Settings = Mapping[str, Scalar]
_Inputs = Mapping[str, Shape]


def _resized(scale: Callable[[int], int]) -> Callable[[_Settings, _Inputs], Shape]:
    return lambda settings, inputs: (inputs["x"][0], *map(scale, inputs["x"][1:]))


def _convolved(settings: _Settings, inputs: _Inputs) -> Shape:
    times = 2 if settings.get("before") == "upsample" else 1
    return (int(settings["out_channels"]), *(times * size for size in inputs["x"][1:]))


def _patched(settings: _Settings, inputs: _Inputs) -> Shape:
    patch, (_, height, width) = int(settings["patch_size"]), inputs["x"]
    return (height // patch * (width // patch), int(settings["width"]))


def _unpatched(settings: _Settings, inputs: _Inputs) -> Shape:
    patch = int(settings["patch_size"])
    return (int(settings["out_channels"]), *(patch * int(settings[side]) for side in ("rows", "columns")))


def _modulation(settings: _Settings, inputs: _Inputs) -> Shape:
    return ((7 if settings.get("modulation", True) else 1) * int(settings["width"]),)


# What a block of each kind writes, where it writes one tensor that is not simply of the shape it was given in.
_GIVES: dict[str, Callable[[_Settings, _Inputs], Shape]] = {
    **dict.fromkeys((*RESIDUAL, "stem", "head", "conv"), _convolved),
    "downsample": _resized(lambda size: (size + 1) // 2),
    **dict.fromkeys(("upsample", "separable_upsample"), _resized(lambda size: 2 * size)),
    "time_embedding": lambda settings, inputs: (int(settings["time_width"]),),
    "adaln_single": _modulation,
    "text_projection": lambda settings, inputs: (inputs["text"][0], int(settings["width"])),
    "patch_embedding": _patched,
    "dit_head": _unpatched,
    "token_merge": lambda settings, inputs: (inputs["x"][0] // 4, inputs["x"][1]),
    "token_split": lambda settings, inputs: (inputs["x"][0] * 4, inputs["x"][1]),
}

KNOWN = frozenset((*_GIVES, *_AS_GIVEN))


def gives(spec: BlockSpec) -> tuple[Shape | None, ...]:
    """The shapes, without batch, of what a block writes, in the order of its `writes`.

    None for a block of a kind that this file does not know (one from outside the tree): what it writes is then taken to
    be what the next block that reads it declares.
    """
    inputs = dict(spec.inputs)
    if spec.kind in _AS_GIVEN:
        return tuple(inputs[name] for name in spec.writes)
    if spec.kind in _GIVES and len(spec.writes) == 1:
        return (_GIVES[spec.kind](dict(spec.settings), inputs),)
    return (None,) * len(spec.writes)


def check_wiring(network: NetworkSpec) -> None:
    """Refuses a network in which a block would not get what it declares, or declares what its settings deny.

    Followed are the running activation, skips, the time embedding and the other conditions, through every kind of block
    whose output `gives` knows.

    Raises:
        NasError: names the block, the input, and both shapes.
    """
    flow = _Flow(network.input, network.name)
    for spec in network.blocks:
        for name, got in flow.given(spec).items():
            if got is not None and got != spec.input(name):
                raise NasError(f"{flow.place(spec)} takes {name} of shape {spec.input(name)}, but is given {got}")
        for setting, value, wanted in _own_widths(spec):
            if value != wanted:
                raise NasError(f"{flow.place(spec)} has {setting} = {value}, but its inputs have {wanted}")
        flow.run(spec)


def refit(blocks: Iterable[BlockSpec], shape: InputShape, name: str) -> NetworkSpec:
    """The network of these blocks, with the input channels of its residual blocks made to fit what they are given.

    Raises:
        NasError: another kind of block would be given another shape, or the size of a feature map does not fit.
    """
    flow = _Flow(shape, name)
    fitted = []
    for spec in blocks:
        if spec.kind in RESIDUAL:
            spec = _fitted(spec, flow.given(spec))
        flow.run(spec)
        fitted.append(spec)
    return checked(fitted, shape, name)


def checked(blocks: Iterable[BlockSpec], shape: InputShape, name: str) -> NetworkSpec:
    """The network of these blocks as they are; raises as `check_wiring` does."""
    network = NetworkSpec(name=name, input=shape, blocks=tuple(blocks))
    check_wiring(network)
    return network


def changed(
    spec: BlockSpec, settings: Mapping[str, Scalar] | None = None, inputs: Mapping[str, Shape] | None = None
) -> BlockSpec:
    """The same block with some settings and input shapes put in place of its own."""
    return block(
        spec.name,
        spec.kind,
        {**dict(spec.inputs), **(inputs or {})},
        skip=spec.skip,
        writes=spec.writes,
        **{**dict(spec.settings), **(settings or {})},
    )


def _fitted(spec: BlockSpec, given: Mapping[str, Shape | None]) -> BlockSpec:
    shapes = {name: given[name] or spec.input(name) for name in ("x", "skip") if name in given}
    same_size = all(shape[1:] == spec.input(name)[1:] for name, shape in shapes.items())
    if not same_size or all(shape == spec.input(name) for name, shape in shapes.items()):
        return spec
    return changed(spec, {"in_channels": sum(shape[0] for shape in shapes.values())}, shapes)


def _own_widths(spec: BlockSpec) -> list[tuple[str, Scalar, int]]:
    """(setting, its value, what the block's inputs say that it must be), for the kinds known here."""
    settings, inputs = dict(spec.settings), dict(spec.inputs)
    wanted = {}
    if len(inputs.get("x", ())) == 3:
        wanted["channels"] = inputs["x"][0]
        wanted["in_channels"] = inputs["x"][0] + (inputs["skip"][0] if "skip" in inputs else 0)
    if len(inputs.get("x", ())) == 2:
        wanted["width"] = inputs["x"][1]
    for setting, name in (("text_width", "text"), ("time_width", "temb"), ("pooled_width", "pooled")):
        if name in inputs:
            wanted[setting] = inputs[name][-1]
    if spec.kind not in KNOWN:
        return []
    return [(name, settings[name], width) for name, width in wanted.items() if name in settings]


class _Flow:
    """The tensors that are there while the blocks of a network run, as shapes; None where a shape is not known."""

    def __init__(self, shape: InputShape, name: str) -> None:
        self.name = name
        given: dict[str, Shape] = {
            "x": (shape.channels, shape.height, shape.width),
            "text": (shape.text_tokens, shape.text_width),
            "pooled": (shape.pooled_width,),
            "size_ids": (shape.size_ids,),
            "timestep": (),
            "guidance": (shape.guidance_width,),
        }
        self._tensors: dict[str, Shape | None] = {key: tensor for key, tensor in given.items() if all(tensor)}
        self._outputs: dict[str, Shape | None] = {}

    def place(self, spec: BlockSpec) -> str:
        """What errors call the block."""
        return f"network {self.name}: block {spec.name!r}"

    def given(self, spec: BlockSpec) -> dict[str, Shape | None]:
        """What the block is given now for each of its inputs."""
        found: dict[str, Shape | None] = {}
        for name, _ in spec.inputs:
            if name == "skip":
                if spec.skip not in self._outputs:
                    raise NasError(f"{self.place(spec)} skips from {spec.skip!r}, which is not before it")
                found[name] = self._outputs[spec.skip]
            elif name not in self._tensors:
                raise NasError(f"{self.place(spec)} reads {name}, which neither the network nor an earlier block gives")
            else:
                found[name] = self._tensors[name]
        if spec.skip is not None and "skip" not in found:
            raise NasError(f"{self.place(spec)} skips from {spec.skip!r}, but has no input of that name")
        return found

    def run(self, spec: BlockSpec) -> None:
        """Puts what the block writes in place of what was there."""
        # What a block reads it has seen in the declared shape: that settles what an unknown block gave.
        self._tensors.update({name: shape for name, shape in spec.inputs if name != "skip"})
        outputs = gives(spec)
        self._tensors.update(zip(spec.writes, outputs, strict=True))
        self._outputs[spec.name] = outputs[0]
