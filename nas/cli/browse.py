"""`nas spaces`: what there is to search.

The list does not import torch; `nas spaces show` does, to compute what the references have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import closing, result, result_json, table
from nas.cli.devices import devices
from nas.cli.names import after_space

if TYPE_CHECKING:
    from nas.pricing.references import ReferenceFigures
    from nas.space import SearchSpace

__all__ = ["devices", "spaces"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

spaces = typer.Typer(help="List the search spaces; `show NAME` prints one.", invoke_without_command=True)


@spaces.callback()
def list_all_spaces(context: typer.Context, as_json: Json = False) -> None:
    """List the search spaces; `show NAME` prints one."""
    if context.invoked_subcommand is not None:
        return
    from nas.space import list_spaces, load_space

    found = [load_space(name) for name in list_spaces()]
    if as_json:
        result_json([_space_record(space) for space in found])
        return
    header = ("space", "family", "px", "choices", "distinct candidates", "references")
    rows = [
        (
            s.name,
            s.family,
            str(s.resolution_px),
            len(s.choices),
            f"at most {s.size:,}" if s.count is None else s.count,
            ", ".join(r.name for r in s.references),
        )
        for s in found
    ]
    result(table(header, rows, right=(2, 3, 4)))
    closing(following=f"nas spaces show {found[0].name}" if found else None)


@spaces.command("show")
def show_space(
    name: Annotated[str, typer.Argument(help="A space's name, or the path of its TOML file.")], as_json: Json = False
) -> None:
    """Print one space: choices and their meaning, rules, what a budget pays for, references beside our networks."""
    from nas.cli.console import Progress
    from nas.space import load_space

    space = load_space(name)
    if not as_json:
        _print_space(space)
    with Progress("references") as progress:
        found = _figures(space, progress)
    if as_json:
        result_json({**_space_record(space), "references": [_reference_record(f) for f in found]})
        return
    _print_references(space, found)
    result("\nsources")
    for source in space.sources:
        result(f"  {source}")
    result(f"file {space.path}")
    closing(following=after_space(space))


def _figures(space: SearchSpace, progress: Callable[[str, int, int, str], None]) -> list[ReferenceFigures]:
    """Every reference as our networks have it; the blocks are traced once and kept on disk."""
    if not space.references:
        return []
    progress("references", 0, len(space.references), "loading torch")
    from nas.components import check_pipeline
    from nas.pricing.references import figures

    check_pipeline(space)
    found = []
    for i, reference in enumerate(space.references):
        progress("references", i, len(space.references), reference.name)
        found.append(figures(space, reference.name))
    progress("references", len(found), len(found), "computed")
    return found


def _print_space(space: SearchSpace) -> None:
    shape = space.input
    result(f"{space.name}: {space.summary}")
    text = f", text {shape.text_tokens} x {shape.text_width}" if shape.text_tokens else ""
    result(
        f"family {space.family}, {space.resolution_px} px (latent {shape.latent_channels} x {shape.latent_height} x"
        f" {shape.latent_width}){text}"
    )
    result(f"{space.extent} ({space.size:,} combinations of choices)\n")
    rows = [
        (
            choice.name,
            "ordinal" if choice.ordinal else "category",
            ", ".join(str(v).lower() for v in choice.values),
            space.meanings.get(choice.name, ""),
        )
        for choice in space.choices
    ]
    result(table(("choice", "kind", "values", "meaning"), rows, left=4))
    if space.rules:
        result("\nrules")
        for rule in space.rules:
            result(f"  {rule.because}")
    pipeline = space.pipeline
    if pipeline is not None:
        guided = "with" if pipeline.guidance else "without"
        named = ", ".join((*pipeline.text_encoders, f"decoder {pipeline.decoder}"))
        result(f"\na budget in seconds pays for {pipeline.steps} steps {guided} guidance, {named}\n  {pipeline.source}")


def _print_references(space: SearchSpace, found: Sequence[ReferenceFigures]) -> None:
    """Published against computed: parameters, then MACs at each size; then where each is from."""
    if not found:
        result("\nno references")
        return
    rows = [(f.reference.name, f.reference.published, f.reference.params, f.params) for f in found]
    result("\n" + table(("reference", "published", "params stated", "params computed"), rows, left=2))
    calls = [
        (
            f.reference.name,
            f"{call.px} px" + (" (its own)" if call.native else ""),
            _gmacs(call.published_gmacs),
            _gmacs(call.macs / 1e9),
            _difference(call.difference),
        )
        for f in found
        for call in f.calls
    ]
    result("\n" + table(("reference", "image", "GMACs stated", "GMACs computed", "difference"), calls, left=2))
    for f in found:
        result(f"\n{f.reference.name}: {f.reference.title}\n  {f.reference.source}")


def _difference(fraction: float | None) -> str | None:
    """As "+0.012 %"; what rounds to nothing has no sign."""
    if fraction is None:
        return None
    text = f"{100 * fraction:+.3f} %"
    return text if text.strip("+-0. %") else "0.000 %"


def _gmacs(value: float | None) -> str | None:
    return None if value is None else f"{value:,.3f}"


def _space_record(space: SearchSpace) -> dict[str, Any]:
    return {
        "name": space.name,
        "family": space.family,
        "summary": space.summary,
        "resolution_px": space.resolution_px,
        "candidates": space.count,
        "combinations": space.size,
        "hash": space.hash,
        "choices": {choice.name: list(choice.values) for choice in space.choices},
        "meanings": dict(space.meanings),
        "fixed": dict(space.fixed),
        "rules": [rule.because for rule in space.rules],
        "pipeline": None if space.pipeline is None else vars(space.pipeline),
        "references": [
            {
                "name": r.name,
                "title": r.title,
                "published": r.published,
                "params": r.params,
                "choices": dict(r.choices),
                "source": r.source,
            }
            for r in space.references
        ],
        "sources": list(space.sources),
        "path": space.path,
    }


def _reference_record(found: ReferenceFigures) -> dict[str, Any]:
    reference = found.reference
    return {
        "name": reference.name,
        "title": reference.title,
        "published": reference.published,
        "params": reference.params,
        "params_computed": found.params,
        "calls": [
            {
                "px": call.px,
                "native": call.native,
                "gmacs_published": call.published_gmacs,
                "gmacs_computed": call.macs / 1e9,
                "difference": call.difference,
            }
            for call in found.calls
        ],
        "choices": dict(reference.choices),
        "source": reference.source,
    }
