"""Core ML packages from torch modules: torch.export, then coremltools' ML program.

Conversion and weight compression work on Linux; prediction needs macOS, so what can be checked elsewhere is checked in
the file itself: inputs, outputs, and that it holds as many matrix products and convolutions as the module.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nas.errors import NasError, UsageError, unknown
from nas.exporters import missing
from nas.exporters._program import exported, first_line, products, quiet

SUFFIX = ".mlpackage"
OUTPUT = "out"  # further outputs are out_1, out_2, ...
PRECISIONS = ("fp16", "fp32")
WEIGHTS = ("4-bit", "6-bit", "int8")
# Largest absolute difference from torch of outputs of the order of 1. torch's own fp16 copies of one small network of
# each space are off by up to 0.0022 (random weights); Core ML adds in an order of its own.
_ALLOWED = {"fp16": 0.02, "fp32": 1e-3}
# Operators of an ML program that multiply; from iOS 18 on attention could be one, for which two count.
MULTIPLYING = {"conv": 1, "conv_transpose": 1, "linear": 1, "matmul": 1, "einsum": 1, "scaled_dot_product_attention": 2}

# Arguments given by keyword that coremltools' converter reads, or that change no number.
_KEYWORDS = {
    "dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking", "copy",
    "dim", "keepdim", "rounding_mode", "mode", "value", "negative_slope", "scales", "scales_h", "scales_w",
}  # fmt: skip

# What coremltools says on every import or conversion and what is of no consequence here.
_CHATTER = (
    r"has not been tested with coremltools",
    r"is not supported\. Minimum required version",
    r"Saving value type of int64 into a builtin type of int32",
)
_CHATTER_OFF_MACOS = (r"Failed to load _ML\w+Proxy",)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a package holds.

    Attributes:
        inputs: name -> shape with the batch, and numpy type.
        outputs: the same of the outputs.
        operators: operator of the ML program -> how often, constants left out.
        weight_bytes: size of the weight file (small constants lie in the program itself).
    """

    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]
    operators: Mapping[str, int]
    weight_bytes: int

    @property
    def products(self) -> int:
        """Matrix products and convolutions."""
        return sum(count * self.operators.get(name, 0) for name, count in MULTIPLYING.items())


def unavailable() -> str | None:
    """Why Core ML packages cannot be written here, or None."""
    return missing(["coremltools"])


def unverifiable() -> str | None:
    """Why `verify` cannot run here, or None."""
    return None if sys.platform == "darwin" else "Core ML predicts only on macOS"


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    precision: str = "fp16",
    weights: str | None = None,
) -> Path:
    """Writes `module` as an .mlpackage for iOS 17 and later, with those fixed shapes.

    Args:
        module: the module.
        inputs: by the names of forward.
        path: ends in .mlpackage; what lies there is replaced.
        precision: fp16 or fp32, of weights, computation, inputs and outputs; times and their sines and cosines are
            fp32 in either.
        weights: "4-bit" or "6-bit" (look-up tables with equally spaced entries) or "int8" (linear, per channel); None
            keeps them in `precision`. Tensors of fewer than 2048 elements are never compressed.

    Raises:
        UsageError: another ending, precision or weights, or the inputs are not those of forward.
        NasError: an operator has no Core ML form, or the package does not hold what the module has.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UsageError(f"a Core ML package ends in {SUFFIX}, got {path.name!r}")
    for kind, got, known in (("precision", precision, PRECISIONS), ("weights", weights, WEIGHTS)):
        if got is not None and got not in known:
            raise unknown(kind, got, known, where="a Core ML package")
    path.parent.mkdir(parents=True, exist_ok=True)
    program = exported(module, inputs, to="Core ML")
    with tempfile.TemporaryDirectory(prefix="nas-coreml-") as folder, calm() as ct:
        model = _converted(ct, program, type(module).__name__, inputs, precision, Path(folder) / "module.mlpackage")
        if weights is not None:
            model = _compressed(model, weights)
        if path.exists():
            shutil.rmtree(path)
        model.save(str(path))
        if model.is_temp_package:
            shutil.rmtree(model.package_path)  # else it stays until the process ends
    _check(path, program, inputs, precision)
    return path


def verify(path: str | Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between the first output on this Mac's CPU and the module's own.

    Raises:
        NasError: this is not a Mac.
    """
    if reason := unverifiable():
        raise NasError(f"{path} is not checked here: {reason}")
    with calm() as ct:
        model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY)
        found = model.predict(arrays(contents(path), inputs))[OUTPUT]
    with torch.no_grad():
        expected = module.eval()(**inputs)
    first = expected[0] if isinstance(expected, tuple) else expected
    return float(np.abs(found.astype(np.float32) - first.numpy()).max())


def allowed(*, precision: str = "fp16", weights: str | None = None) -> float | None:
    """The largest difference that `verify` may find, or None: compressed weights compute something else by design."""
    return None if weights is not None else _ALLOWED[precision]


def contents(path: str | Path) -> Contents:
    """What the package at `path` holds, read from the file without Core ML."""
    spec = open_package(path).get_spec()
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return Contents(
        inputs=_features(spec.description.input),
        outputs=_features(spec.description.output),
        operators=Counter(op.type for op in block.operations if op.type != "const"),
        weight_bytes=sum(file.stat().st_size for file in Path(path).rglob("weight.bin")),
    )


def open_package(path: str | Path, compute_units: str = "ALL") -> Any:
    """The package as coremltools' MLModel, not loaded into Core ML: for reading, and for running on another device.

    Args:
        path: of the package.
        compute_units: a name of `coremltools.ComputeUnit`.
    """
    with calm() as ct:
        return ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units], skip_model_load=True)


def arrays(held: Contents, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`inputs` in the types that the package takes."""
    return {
        name: np.ascontiguousarray(inputs[name].detach().numpy().astype(dtype))
        for name, (_, dtype) in held.inputs.items()
    }


def _converted(
    ct: ModuleType, program: ExportedProgram, name: str, inputs: Mapping[str, Tensor], precision: str, place: Path
) -> Any:
    """The program as coremltools' MLModel, kept at `place`; `name` is the module's, for errors."""
    half = precision == "fp16"
    outputs = [f"{OUTPUT}_{i}" if i else OUTPUT for i in range(len(program.graph_signature.user_outputs))]
    try:
        return ct.convert(
            _plain(program, name),
            convert_to="mlprogram",
            inputs=[
                ct.TensorType(name=key, shape=shape, dtype=np.dtype(dtype).type)
                for key, (shape, dtype) in _inputs(program, inputs, precision).items()
            ],
            outputs=[ct.TensorType(name=key, dtype=np.float16 if half else np.float32) for key in outputs],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.transform.FP16ComputePrecision(_may_be_half) if half else ct.precision.FLOAT32,
            package_dir=str(place),
            skip_model_load=True,
        )
    except (NotImplementedError, ValueError, RuntimeError, TypeError, KeyError, AssertionError) as error:
        raise NasError(f"{name} cannot be written as Core ML: {first_line(error)}") from error


def _inputs(
    program: ExportedProgram, inputs: Mapping[str, Tensor], precision: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and numpy type of each input: times stay in float32, because fp16 has steps of 0.5 at t = 999."""
    wanted = {}
    for key in map(str, program.graph_signature.user_inputs):
        shape = tuple(inputs[key].shape)
        wanted[key] = (shape, "float16" if precision == "fp16" and len(shape) > 1 else "float32")
    return wanted


def _may_be_half(operation: Any) -> bool:
    """Whether an operation may compute in fp16: not sine and cosine of a time, nor the product that is their argument.

    An angle of 999 is off by up to a quarter in fp16.
    """
    after = (child.op_type for output in operation.outputs for child in output.child_ops)
    return not {"sin", "cos"} & {operation.op_type, *after}


def _plain(program: ExportedProgram, name: str) -> ExportedProgram:
    """The program in plain ATen operators, which is all that coremltools takes.

    Raises:
        NasError: an argument given by keyword would be lost; only those in `_KEYWORDS` do no harm or are read.
    """
    plain = program.run_decompositions({torch.ops.aten.gelu.default: tanh_gelu})
    for node in plain.graph.nodes:
        for key, value in node.kwargs.items():
            defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
            if key not in _KEYWORDS and value != defaults.get(key):
                lost = f"{key}={value} of the operator {node.target}"
                raise NasError(f"{name} cannot be written as Core ML: coremltools drops {lost}")
    return plain


def tanh_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU in its tanh approximation, written so that coremltools finds it again; a decomposition of torch's.

    Its converter drops the argument `approximate` and would make the exact form of both.
    """
    if approximate != "tanh":
        return NotImplemented
    return x * (0.5 * (torch.tanh((0.044715 * x**3 + x) * math.sqrt(2 / math.pi)) + 1.0))


def _compressed(model: Any, weights: str) -> Any:
    from coremltools.optimize import coreml as compress

    if weights == "int8":
        settings = compress.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        return compress.linear_quantize_weights(model, compress.OptimizationConfig(global_config=settings))
    # Entries by k-means would need scikit-learn of an older version than other packages here want.
    table = compress.OpPalettizerConfig(mode="uniform", nbits=int(weights[0]))
    return compress.palettize_weights(model, compress.OptimizationConfig(global_config=table))


def _check(path: Path, program: ExportedProgram, inputs: Mapping[str, Tensor], precision: str) -> None:
    """Refuses a package whose inputs or matrix products are not the module's."""
    held = contents(path)
    wanted = _inputs(program, inputs, precision)
    if dict(held.inputs) != wanted:
        raise NasError(f"{path} takes {dict(held.inputs)}, the module takes {wanted}")
    if held.products != products(program):
        raise NasError(
            f"{path} has {held.products} matrix products and convolutions, the module has {products(program)}"
        )


def _features(described: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    from coremltools.proto import FeatureTypes_pb2

    kinds = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
    return {
        feature.name: (
            tuple(feature.type.multiArrayType.shape),
            kinds.Name(feature.type.multiArrayType.dataType).lower(),
        )
        for feature in described
    }


@contextlib.contextmanager
def calm() -> Iterator[ModuleType]:
    """The package coremltools, without its progress bars, its remarks on versions and its own deprecated calls."""
    patterns = _CHATTER + (() if sys.platform == "darwin" else _CHATTER_OFF_MACOS)
    chatter = re.compile("|".join(patterns))
    logger = logging.getLogger("coremltools")

    def listen(record: logging.LogRecord) -> bool:
        return chatter.search(record.getMessage()) is None

    logger.addFilter(listen)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Function _TORCH_OPS_REGISTRY", category=DeprecationWarning)
            # The converter leaves its folder of weights to the garbage collector.
            warnings.filterwarnings("ignore", message="Implicitly cleaning up", category=ResourceWarning)
            import coremltools

            with _no_bars():
                yield coremltools
    finally:
        logger.removeFilter(listen)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Stops the tqdm bars: coremltools draws one per stage and has no setting for it."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize.coreml import _quantization_passes

    bars: tuple[tuple[Any, str], ...] = ((ops, "_tqdm"), (pass_pipeline, "tqdm"), (_quantization_passes, "tqdm"))
    before = [getattr(module, name) for module, name in bars]
    for (module, name), bar in zip(bars, before, strict=True):
        setattr(module, name, functools.partial(bar, disable=True))
    try:
        yield
    finally:
        for (module, name), bar in zip(bars, before, strict=True):
            setattr(module, name, bar)
