"""ONNX files from torch modules.

torch's TorchScript-based exporter is used, not the newer one: it takes about 1 s for a whole UNet and 0.05 s for a
block against 5-13 s, and a measurement exports a hundred subjects. The graphs run equally fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nas.errors import NasError
from nas.exporters import in_forward_order, missing

OPSET = 17  # the first with LayerNormalization as one operator
OUTPUT = "out"
# A protobuf message cannot pass 2 GiB; graph and padding need the rest.
_INLINE_BYTES = 1_800_000_000


def unavailable() -> str | None:
    """Why ONNX files cannot be written here, or None."""
    return missing(["onnx"])


def export(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path) -> Path:
    """Writes `module`, traced in eval mode on `inputs` (by the names of forward), as ONNX with those fixed shapes.

    Weights of more than 1.8 GB go to `<path>.data` beside it. Smaller files are passed through onnx.checker.

    Raises:
        NasError: an operator has no ONNX form here.
        UsageError: the inputs are not those of forward.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = in_forward_order(module, inputs)
    weight_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    was_training = module.training
    module.eval()
    try:
        _trace(module, ordered, path)
    finally:
        module.train(was_training)
    _finish(path, external=weight_bytes > _INLINE_BYTES)
    return path


def verify(path: str | Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between the file's output in onnxruntime and the module's own on `inputs`.

    Of a module that gives several outputs, the first is compared.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in in_forward_order(module, inputs).items()})[0]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            expected = module(**inputs)
            expected = expected[0] if isinstance(expected, tuple) else expected
    finally:
        module.train(was_training)
    return float((torch.from_numpy(got) - expected).abs().max())


def _trace(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        # Ours by choice (see above). The others are remarks of the tracer on Python values and constants that fixed
        # shapes make harmless; a wrong graph shows in `verify`.
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)
        try:
            torch.onnx.export(
                _Called(module, tuple(inputs)),
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=False,
            )
        except (torch.onnx.errors.UnsupportedOperatorError, torch.onnx.errors.SymbolicValueError) as error:
            reason = str(error).splitlines()[0]
            raise NasError(f"{type(module).__name__} cannot be written as ONNX opset {OPSET}: {reason}") from error


class _Called(nn.Module):
    """A module as a function of exactly these inputs: the exporter would pass every other option by position."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output: Tensor | tuple[Tensor, ...] = self.module(**dict(zip(self.names, inputs, strict=True)))
        return output


def _finish(path: Path, *, external: bool) -> None:
    import onnx

    if not external:
        onnx.checker.check_model(str(path))
        return
    # torch has written each large tensor to a file of its own: gather them in one and drop the loose ones.
    model = onnx.load(str(path))
    loose = _external_files(str(path))
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    for name in loose - {data.name}:
        (path.parent / name).unlink(missing_ok=True)


def _external_files(path: str) -> set[str]:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
