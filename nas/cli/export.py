"""`nas export`: a network as a file for a runtime, in every format that nas/exporters/ has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import Progress, closing, note, result, result_json
from nas.cli.names import chosen
from nas.errors import NasError, UsageError, unknown

if TYPE_CHECKING:
    from nas.build import Network
    from nas.space import Candidate

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Largest absolute difference allowed between the exported file and torch, where the format has no figure of its own;
# outputs are of the order of 1.
_PARITY = 1e-3
# How the command line writes what an exporter takes by keyword; arguments of other types are not offered.
_READ = {"str": str, "str | None": str, "int": int}


def export(
    subject: Annotated[
        str | None,
        typer.Argument(help="STUDY#CANDIDATE, a .safetensors file of nas, or a folder of nas inherit or diffusers."),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Instead of a study: a space, with --reference or --candidate.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="onnx, tvm, coreml or executorch.")] = "onnx",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the format, such as weights=6-bit for coreml.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, where none are trained.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The file to write (default exports/NAME.ENDING).")] = None,
    as_json: Json = False,
) -> None:
    """Write a network for a runtime. Where the runtime is there, the file's output is checked against torch."""
    import torch

    from nas import registry
    from nas.build import example_inputs

    exporter = registry.load("nas.exporters", file_format)
    reason = exporter.unavailable()
    if reason is not None:
        raise NasError(f"format {file_format} cannot be written here: {reason}", hint=_install(file_format))
    options = _options(exporter, option or (), file_format)
    with Progress("export") as progress:
        progress("build", 0, 1, "the network and its weights")
        network, name = _network(subject, space, reference, candidate, resolution, seed)
        path = _exports_file(out, f"{name}{exporter.SUFFIX}")
        inputs = example_inputs(network.spec, generator=torch.Generator().manual_seed(0))
        progress("export", 0, 1, f"{path}")
        exporter.export(network, inputs, path, **options)
        unchecked, difference = _not_checked(exporter, file_format), None
        if unchecked is None:
            progress("parity", 0, 1, "one call of the file and one of torch")
            difference = exporter.verify(path, network, inputs)
    params = sum(p.numel() for p in network.parameters())
    allowed = exporter.allowed(**options) if hasattr(exporter, "allowed") else _PARITY
    answer = {
        "path": path,
        "format": file_format,
        "options": options,
        "network": name,
        "params": params,
        "inputs": {key: list(value.shape) for key, value in inputs.items()},
        "largest_difference": difference,
        "allowed": allowed,
        "not_checked": unchecked,
    }
    if as_json:
        result_json(answer)
    else:
        checked = f"not checked here: {unchecked}" if unchecked else f"largest difference from torch {difference:.2g}"
        result(f"{name}: {params:,} parameters; {checked}")
    if difference is not None and allowed is not None and not difference <= allowed:
        raise NasError(f"{path} differs from torch by {difference:.2g}, more than the {allowed:g} allowed")
    closing(wrote=path, following="nas devices", as_json=as_json)


def _not_checked(exporter: ModuleType, file_format: str) -> str | None:
    """Why the file's output cannot be compared with torch here, or None."""
    if not hasattr(exporter, "verify"):
        return f"format {file_format} has no parity check"
    reason: str | None = exporter.unverifiable() if hasattr(exporter, "unverifiable") else None
    return reason


def _options(exporter: ModuleType, given: Sequence[str], file_format: str) -> dict[str, str | int]:
    """What --option says, in the types that the exporter takes.

    Raises:
        UsageError: not NAME=VALUE, a name that the exporter does not take, or a value that is no number where it must.
    """
    parameters = inspect.signature(exporter.export).parameters.values()
    readers = {p.name: _READ[p.annotation] for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation in _READ}
    options: dict[str, str | int] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"--option takes NAME=VALUE, got {text!r}")
        if name not in readers:
            raise unknown("option", name, readers, where=f"format {file_format}")
        try:
            options[name] = readers[name](value)
        except ValueError as error:
            raise UsageError(f"--option {name} must be a whole number, got {value!r}") from error
    return options


def _install(file_format: str) -> str | None:
    """The command that brings the packages of a format that is an extra."""
    extra = file_format if file_format in ("coreml", "executorch") else None
    return f'pip install -c constraints.txt -e ".[{extra}]"' if extra else None


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
    if subject is not None and (subject.endswith(".safetensors") or _is_network(Path(subject))):
        from nas.checkpoint import load

        return load(subject), Path(subject).stem
    return _untrained(chosen(subject, space, reference, choices, resolution)[0], seed)


def _is_network(folder: Path) -> bool:
    """Whether a folder holds weights as `nas inherit` writes them, or diffusers."""
    return any((folder / name).is_file() for name in ("config.json", "network.safetensors"))


def _untrained(candidate: Candidate, seed: int) -> tuple[Network, str]:
    from nas.build import build
    from nas.families import network

    note("the weights are random: a full-size candidate has none until it is trained")
    return build(network(candidate), seed=seed).eval(), f"{candidate.space.name}-{candidate.key}"


def _exports_file(out: Path | None, name: str) -> Path:
    from nas.paths import writable_dir

    path = out if out is not None else Path("exports") / name
    writable_dir(path.parent)
    return path
