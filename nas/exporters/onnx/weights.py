"""Writing an ONNX graph with its weights: inside the file, or beside it where a file cannot hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nas.errors import NasError

# A protobuf message cannot pass 2 GiB; graph and padding need the rest.
INLINE_BYTES = 1_800_000_000
_ALIGNMENT = 4096  # pages, so that a runtime may map the file


def save(model: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes `model` to `path`; initializers without data take theirs from `weights`."""
    import onnx

    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    content = inlined(model, weights)
    if content is None:
        _fill_beside(model, weights, data)
        content = model.SerializeToString()
    else:
        onnx.checker.check_model(content)
    path.write_bytes(content)


def inlined(model: Any, weights: Mapping[str, Tensor]) -> bytes | None:
    """`model` as one message with `weights` in it; None where that is too large for one."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) + model.ByteSize()
    if size > INLINE_BYTES:
        return None
    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data"):
            tensor.raw_data = _bytes(tensor, weights)
    content: bytes = model.SerializeToString()
    return content


def _fill_beside(model: Any, weights: Mapping[str, Tensor], data: Path) -> None:
    """Streams every weight to `data`, one at a time: a large network must not be in memory twice."""
    with data.open("wb") as stream:
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data"):
                continue
            content = _bytes(tensor, weights)
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            _refer(tensor, {"location": data.name, "offset": stream.tell(), "length": len(content)})
            stream.write(content)


def _refer(tensor: Any, place: Mapping[str, Any]) -> None:
    """Says where the data of an initializer lies: "location", "offset", "length" (onnx's own helper wants data)."""
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def _bytes(tensor: Any, weights: Mapping[str, Tensor]) -> bytes:
    found = weights.get(tensor.name)
    if found is None or tuple(found.shape) != tuple(tensor.dims):
        raise NasError(f"the graph reads {tensor.name!r} of shape {list(tensor.dims)}, which the network does not have")
    return found.cpu().contiguous().numpy().tobytes()
