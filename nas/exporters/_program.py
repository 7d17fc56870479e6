"""A torch module as a torch.export program: what the Core ML and ExecuTorch exporters begin with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nas.errors import NasError
from nas.exporters import in_forward_order

# Operators whose work grows with the product of two sizes: nearly all the time of a network is theirs. Attention is a
# product with the keys and one with the values.
MULTIPLYING = {
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "convolution": 1,
    "conv_transpose2d": 1,
    "linear": 1,
    "addmm": 1,
    "mm": 1,
    "bmm": 1,
    "baddbmm": 1,
    "matmul": 1,
    "einsum": 1,
    "scaled_dot_product_attention": 2,
}


def exported(module: nn.Module, inputs: Mapping[str, Tensor], *, to: str) -> ExportedProgram:
    """`module` in eval mode as a program for exactly the shapes of `inputs`, in the order of forward.

    Args:
        module: the module; its mode is put back afterwards.
        inputs: by the names of forward.
        to: what errors call the format that it is exported to.

    Raises:
        UsageError: the inputs are not those of forward.
        NasError: torch.export cannot follow the module's Python.
    """
    ordered = in_forward_order(module, inputs)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(module, (), kwargs=ordered)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise NasError(f"{type(module).__name__} cannot be written as {to}: {first_line(error)}") from error
    finally:
        module.train(was_training)


def products(program: ExportedProgram) -> int:
    """How many matrix products and convolutions a program asks for; one per attention operand pair."""
    names = (str(node.target).split(".") for node in program.graph.nodes if node.op == "call_function")
    return sum(MULTIPLYING.get(name[1], 0) for name in names if len(name) > 1 and name[0] == "aten")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch.export says about its own internals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        yield
