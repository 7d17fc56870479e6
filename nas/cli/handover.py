"""`nas train`, `nas sample`, `nas export`: what happens to a candidate after it was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import Progress, closing, note, result, result_json
from nas.cli.names import chosen
from nas.errors import NasError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from nas.build import Network
    from nas.space import Candidate

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Largest absolute difference allowed between the exported file and torch; outputs are of the order of 1.
_PARITY = 1e-3


def export(
    subject: Annotated[
        str | None, typer.Argument(help="STUDY#CANDIDATE, or a .safetensors file that nas train wrote.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Instead of a study: a space, with --reference or --candidate.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="A file of nas/exporters/.")] = "onnx",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, where none are trained.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The file to write (default exports/NAME.FORMAT).")] = None,
    as_json: Json = False,
) -> None:
    """Write a network for a runtime. The file's output is checked against torch."""
    from nas import registry

    exporter = registry.load("nas.exporters", file_format)
    reason = exporter.unavailable()
    if reason is not None:
        raise NasError(f"format {file_format} cannot be written here: {reason}")
    if not hasattr(exporter, "verify"):
        raise UsageError(
            f"format {file_format} has no parity check of its own; nas measure uses it, nas export does not"
        )
    with Progress("export") as progress:
        progress("build", 0, 1, "the network and its weights")
        network, name = _network(subject, space, reference, candidate, resolution, seed)
        path = _exports_file(out, name, file_format)
        inputs = _inputs(network)
        progress("export", 0, 1, f"{path}")
        exporter.export(network, inputs, path)
        progress("parity", 0, 1, "one call of the file and one of torch")
        difference = exporter.verify(path, network, inputs)
    answer = {
        "path": path,
        "format": file_format,
        "network": name,
        "params": sum(p.numel() for p in network.parameters()),
        "inputs": {key: list(value.shape) for key, value in inputs.items()},
        "largest_difference": difference,
        "allowed": _PARITY,
    }
    if as_json:
        result_json(answer)
    else:
        result(f"{name}: {answer['params']:,} parameters; largest difference from torch {difference:.2g}")
    if not difference <= _PARITY:
        raise NasError(f"{path} differs from torch by {difference:.2g}, more than the {_PARITY:g} allowed")
    closing(wrote=path, following="nas devices", as_json=as_json)


def _network(
    subject: str | None,
    space: str | None,
    reference: str | None,
    choices: str | None,
    resolution: int | None,
    seed: int,
) -> tuple[Network, str]:
    """The network to export and a name for its file."""
    if (subject is None) == (space is None):
        raise UsageError("nas export needs either STUDY#CANDIDATE (or a weights file) or --space, and not both")
    if subject is not None and subject.endswith(".safetensors"):
        from nas.checkpoint import load_network

        return load_network(subject), Path(subject).stem
    return _untrained(chosen(subject, space, reference, choices, resolution)[0], seed)


def _untrained(candidate: Candidate, seed: int) -> tuple[Network, str]:
    from nas.build import build
    from nas.families import network

    note("the weights are random: a full-size candidate has none until it is trained")
    return build(network(candidate), seed=seed).eval(), f"{candidate.space.name}-{candidate.key}"


def _inputs(network: Network) -> dict[str, Tensor]:
    import torch

    shape = network.spec.input
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, shape.channels, shape.height, shape.width, generator=generator),
        "timestep": torch.full((1,), 500.0),
        "text": torch.randn(1, shape.text_tokens, shape.text_width, generator=generator),
    }


def _exports_file(out: Path | None, name: str, file_format: str) -> Path:
    from nas.paths import writable_dir

    path = out if out is not None else Path("exports") / f"{name}.{file_format}"
    writable_dir(path.parent)
    return path
