"""What names on the command line stand for: a study's folder, a candidate by its choices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import UsageError, unknown

if TYPE_CHECKING:
    from nas.space import Candidate, SearchSpace

REPORTS = Path("reports")

# The options that replace parts of a space's pipeline, wherever one is priced.
Steps = Annotated[int | None, typer.Option(help="Denoiser calls per image instead of the space's.")]
Guidance = Annotated[bool | None, typer.Option("--guidance/--no-guidance", help="Whether guidance doubles each call.")]
Decoder = Annotated[str | None, typer.Option(help="The image decoder (nas spaces show decoder).")]
TextEncoders = Annotated[str | None, typer.Option(help="NAME,... of the text encoders, or none.")]


def chosen(
    subject: str | None, space: str | None, reference: str | None, choices: str | None, resolution: int | None
) -> tuple[Candidate, str]:
    """The one network that a command is about: of a study, or of a space by reference, by choices, or by both.

    Args:
        subject: STUDY#CANDIDATE, or None.
        space: a space's name, where `subject` is None.
        reference: a published network of the space.
        choices: "name=value,…"; what is not named is taken from `reference`.
        resolution: image side in px instead of the study's, the space's or the reference's own.

    Returns:
        The candidate and what to call it.

    Raises:
        UsageError: an unknown name, both or neither of study and space, or a space without a choice in it.
    """
    if (subject is None) == (space is None):
        raise UsageError("name either STUDY#CANDIDATE or --space with --reference or --candidate, and not both")
    if subject is not None:
        from nas.record import candidate_of

        found = candidate_of(subject)[1]
        if resolution is not None:
            found = found.space.at_resolution(resolution).candidate(**found.choices)
        return found, found.key
    if choices is not None:
        loaded = (
            sized_space(str(space), resolution)
            if reference is None
            else published(str(space), reference, resolution).space
        )
        found = typed_candidate(loaded, choices, reference)
        return found, found.key
    if reference is None:
        raise UsageError("--space needs --reference NAME or --candidate name=value,…", hint=f"nas spaces show {space}")
    return published(str(space), reference, resolution), reference


def published(space: str, reference: str, resolution: int | None = None) -> Candidate:
    """A reference at the input that it is published at, or for images of another size with its own text.

    Raises:
        UsageError: an unknown space or reference, or a size that the space cannot take.
    """
    from nas.space import load_space

    found = load_space(space).published(reference)
    return found if resolution is None else found.space.at_resolution(resolution).candidate(**found.choices)


def typed_space(space: SearchSpace) -> str:
    """What --space must be given to mean this space: the name of one of ours, or the path of the user's own file."""
    from nas.space import list_spaces, load_space

    ours = space.name in list_spaces() and load_space(space.name).path == space.path
    return space.name if ours else str(space.path)


def after_space(space: SearchSpace) -> str:
    """The command to run after looking at a space: a search where it has a pipeline to budget, else a profile."""
    if space.pipeline is None:
        first = f" --reference {space.references[0].name}" if space.references else ""
        return f"nas profile --space {typed_space(space)}{first}"
    # A guess at what such a pipeline can meet; the search itself says what it cannot.
    budget = "1.4s" if space.pipeline.calls <= 8 else "20s"
    return f"nas search --space {typed_space(space)} --budget {budget}@iphone --dry-run"


def name_list(text: str | None) -> tuple[str, ...] | None:
    """The names in "clip-l,t5-xxl"; "none" is an empty list, and None stays None."""
    if text is None:
        return None
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def sized_space(name: str, resolution: int | None) -> SearchSpace:
    """The space of that name, at another image side where one is given."""
    from nas.space import load_space

    space = load_space(name)
    return space if resolution is None else space.at_resolution(resolution)


def typed_candidate(space: SearchSpace, choices: str, base: str | None) -> Candidate:
    """The candidate of "width_0=256,conv_0=full,…"; choices not named are taken from the reference `base`.

    Raises:
        UsageError: a part is not name=value, a choice or value is not known, or one is missing and there is no base.
    """
    values: dict[str, Any] = dict(space.reference(base).choices) if base is not None else {}
    for part in choices.split(","):
        name, separator, text = (piece.strip() for piece in part.partition("="))
        if not separator:
            raise UsageError(f"--candidate takes name=value pairs joined by commas, got {part.strip()!r}")
        values[name] = read_value(space, name, text)
    return space.candidate(**values)


def read_value(space: SearchSpace, name: str, text: str) -> bool | int | float | str:
    """The value of choice `name` that is written `text`.

    Raises:
        UsageError: the choice has no such value.
    """
    values = space.choice(name).values
    for value in values:
        if str(value).lower() == text.lower():
            return value
    raise unknown(f"value of {name}", text, map(str, values), where=f"space {space.name}")
