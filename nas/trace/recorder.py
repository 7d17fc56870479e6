"""The modes under which one forward pass on `meta` becomes a list of operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nas.errors import NasError
from nas.op import Op

_BYTES = 4  # float32

# aten operator -> kind. In-place forms (add_) share the entry of the plain one.
_KIND_OF: dict[str, str] = {
    **dict.fromkeys(("mm", "addmm"), "linear"),
    **dict.fromkeys(("bmm", "baddbmm"), "attention"),
    **dict.fromkeys(("_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(
        ("native_group_norm", "native_layer_norm", "native_batch_norm", "mean", "var_mean", "pow", "rsqrt"), "norm"
    ),
    **dict.fromkeys(
        (
            "add",
            "sub",
            "mul",
            "div",
            "neg",
            "silu",
            "gelu",
            "sigmoid",
            "relu",
            "tanh",
            "clamp",
            "where",
            "_to_copy",
            "eq",
        ),
        "elementwise",
    ),
    "cat": "concat",
    "upsample_nearest2d": "resize",
    **dict.fromkeys(("clone", "copy", "constant_pad_nd", "repeat"), "layout"),
    **dict.fromkeys(
        # T5's positions: distances between tokens, looked up in a table.
        ("gt", "lt", "abs", "log", "minimum", "full_like"),
        "lookup",
    ),
    **dict.fromkeys(
        ("arange", "exp", "sin", "cos", "full", "zeros", "ones", "fill", "embedding", "index", "argmax"), "lookup"
    ),
}
# Neither computed nor copied: a new name for the same data, or memory that nothing has been written to.
_FREE = frozenset(
    ("view", "_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty")
)
# Operators of which every result has the shape of the first operand, or that of all operands broadcast.
_SAME_SHAPE = frozenset(("silu", "gelu", "pow", "rsqrt", "relu", "sigmoid", "tanh"))
_BROADCAST = frozenset(("add", "sub", "mul", "div"))
_NORMS = frozenset(("native_group_norm", "native_layer_norm"))


class Recorder(TorchDispatchMode):
    """Classifies every aten operator and remembers which buffers it reads and writes."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.ops: list[Op] = []
        self.paused = False
        self._weights = {_buffer(p) for p in module.parameters()}
        self._constants = {_buffer(b) for b in module.buffers()}
        self._steps: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._sizes: dict[int, int] = {}
        # Buffers are known by address: holding every tensor keeps an address from being given out twice.
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket.__name__
        result = _shape_of(packet, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        if self.paused or packet in _FREE or func.is_view:
            return result
        reads = list(_tensors((args, kwargs)))
        # Norms also return statistics that inference throws away: only the first output is an activation.
        written = next(_tensors(result), None)
        if written is None:
            raise NasError(
                f"{self.name}: operator aten.{packet} returns no tensor; nas/trace/recorder.py cannot count it"
            )
        if packet == "convolution":
            kind, macs = _convolution(args, written)
        else:
            kind = _kind(packet, self.name)
            macs = _matmul_macs(packet, args) if kind in ("linear", "attention") else 0
        self.add(kind, macs, reads, written)
        return result

    def add(self, kind: str, macs: int, reads: list[Tensor], written: Tensor) -> None:
        """Records one operator."""
        weights = [t for t in reads if _buffer(t) in self._weights]
        others = [t for t in reads if _buffer(t) not in self._weights]
        # Of a table only the rows that are looked up are read.
        most = written.numel() if kind == "lookup" else math.inf
        self.ops.append(
            Op(
                kind=kind,
                macs=macs,
                weight_bytes=_BYTES * sum(int(min(_distinct(t), most)) for t in weights),
                read_bytes=_BYTES * sum(_distinct(t) for t in others),
                written_bytes=_BYTES * written.numel(),
                shape=tuple(written.shape),
            )
        )
        self._steps.append((tuple(map(self._keep, others)), (self._keep(written),)))

    def _keep(self, tensor: Tensor) -> int:
        buffer = _buffer(tensor)
        if buffer not in self._sizes:
            self._alive.append(tensor)
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._sizes[buffer] = 0 if buffer in self._constants else _BYTES * elements
        return buffer

    def peak_bytes(self, held: tuple[Tensor, ...], outputs: list[Tensor]) -> int:
        """The most bytes alive at any step, with `held` alive throughout and `outputs` to the end."""
        always = {self._keep(t) for t in held}
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        for i, (reads, writes) in enumerate(self._steps):
            for buffer in reads + writes:
                born.setdefault(buffer, i)
                dies[buffer] = i
        for tensor in outputs:
            dies[self._keep(tensor)] = len(self._steps)
        change = [0] * (len(self._steps) + 2)
        for buffer, start in born.items():
            if buffer not in always:
                change[start] += self._sizes[buffer]
                change[dies[buffer] + 1] -= self._sizes[buffer]
        live = peak = sum(self._sizes[buffer] for buffer in always)
        for step in change:
            live += step
            peak = max(peak, live)
        return peak


class Uninitialised(TorchFunctionMode):
    """Leaves out the filling of new parameters, which on `meta` has no effect but takes a third of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__ or func in (Tensor.fill_, Tensor.zero_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """Counts linear layers and attention as such, before torch breaks them up or fuses them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def _silent(self) -> Iterator[None]:
        self.recorder.paused = True
        try:
            yield
        finally:
            self.recorder.paused = False

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self._silent():
            output = input.new_empty(*input.shape[:-1], weight.shape[0])
        reads = [input, weight] + ([] if bias is None else [bias])
        self.recorder.add("linear", output.numel() * weight.shape[1], reads, output)
        return output

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        length, source, width = query.shape[-2], key.shape[-2], query.shape[-1]
        with self._silent():
            scores = query.new_empty(*query.shape[:-1], source)
            shares = torch.empty_like(scores)
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
        heads = math.prod(query.shape[:-2])
        self.recorder.add("attention", heads * length * source * width, [query, key], scores)
        masks = [attn_mask] if attn_mask is not None else []
        self.recorder.add("softmax", 0, [scores, *masks], shares)
        self.recorder.add("attention", heads * length * source * value.shape[-1], [shares, value], output)
        return output


def _shape_of(packet: str, args: tuple[Any, ...]) -> Any:
    """The empty result of an operator whose result's shape is plain, or None to ask torch.

    Only a short cut: torch's own rules for these are Python and take ten times longer. A permuted operand passes its
    order of strides on, so those are left to torch.
    """
    tensors = [t for t in args if isinstance(t, Tensor)]
    if not tensors or not all(map(_in_order, tensors)):
        return None
    first = tensors[0]
    if packet in _SAME_SHAPE:
        return first.new_empty(first.shape)
    if packet in _BROADCAST:
        return first.new_empty(torch.broadcast_shapes(*(t.shape for t in tensors)))
    if packet == "mean" and len(args) == 3 and args[2]:
        shape = list(first.shape)
        for axis in args[1]:
            shape[axis] = 1
        return first.new_empty(shape)
    if packet in _NORMS:
        # The statistics behind the first are for the backward pass only.
        return first.new_empty(first.shape), first.new_empty(1), first.new_empty(1)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or result (tuples and lists of them at most)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _in_order(tensor: Tensor) -> bool:
    """Whether it is float32 and its axes lie in memory in their own order (a slice may leave gaps)."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.dtype == torch.float32 and strides == sorted(strides, reverse=True)


def _buffer(tensor: Tensor) -> int:
    """What identifies the memory behind a tensor: views of it share the value."""
    return tensor.untyped_storage()._cdata


def _distinct(tensor: Tensor) -> int:
    """Elements without those that broadcasting (stride 0) repeats."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)


def _kind(packet: str, name: str) -> str:
    kind = _KIND_OF.get(packet) or _KIND_OF.get(packet.removesuffix("_"))
    if kind is None:
        raise NasError(
            f"{name}: operator aten.{packet} is in no group that nas counts",
            hint="add it to the table in nas/trace/recorder.py with the kind of nas/op.py that it belongs to",
        )
    return kind


def _convolution(args: tuple[Any, ...], written: Tensor) -> tuple[str, int]:
    """Kind and MACs of aten.convolution(input, weight, bias, stride, padding, dilation, transposed, _, groups)."""
    source, weight, transposed, groups = args[0], args[1], args[6], args[8]
    # Each element of the side that the kernel slides over meets one filter of the other side's channels.
    slid = source if transposed else written
    macs = slid.numel() * math.prod(weight.shape[1:])
    if groups > 1 and groups == source.shape[1]:
        return "depthwise", macs
    return ("pointwise" if math.prod(weight.shape[2:]) == 1 else "conv"), macs


def _matmul_macs(packet: str, args: tuple[Any, ...]) -> int:
    left, right = args[1:3] if packet in ("addmm", "baddbmm") else args[:2]
    return math.prod(left.shape) * right.shape[-1]
