"""Plug-ins: a torch module, with example inputs, as a file that a runtime loads. One format per file.

Contract: `export(module, inputs, path) -> Path` writes the file (and whatever lies beside it) for exactly the shapes of
`inputs`; `unavailable() -> str | None` tells why it cannot. Inputs are named as the module's forward names them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nas.errors import UsageError


def missing(packages: Iterable[str]) -> str | None:
    """The reason why something that needs `packages` (import names) cannot run, or None; nothing is imported."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"the package {' and '.join(absent)} is not installed" if absent else None


def in_forward_order(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in the order of the module's forward, so that every runtime numbers them alike.

    Raises:
        UsageError: an input that forward does not take, or one that it needs and is not there.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {p.name for p in parameters if p.name in names and p.default is p.empty}
    wrong = sorted((needed - set(inputs)) | (set(inputs) - set(names)))
    if wrong:
        raise UsageError(
            f"{type(module).__name__} takes the inputs {', '.join(names)}; got {', '.join(inputs)}"
            f" (missing or not known: {', '.join(wrong)})"
        )
    return {name: inputs[name] for name in names if name in inputs}
