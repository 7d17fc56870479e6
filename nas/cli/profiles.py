"""`nas profile`: where a network's cost goes, networks side by side, and what a whole space costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli import profile_text
from nas.cli.console import Progress, closing, command_line, result_json, resumable
from nas.cli.names import (
    REPORTS,
    Decoder,
    Guidance,
    Steps,
    TextEncoders,
    after_space,
    chosen,
    name_list,
    published,
    sized_space,
    typed_space,
)
from nas.errors import UsageError, unknown
from nas.paths import writable_dir

if TYPE_CHECKING:
    from nas.device import DeviceSheet
    from nas.latency import LatencyPredictor
    from nas.profile import Profile, Subject


def profile(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="STUDY#CANDIDATE; with --compare, references of --space or of any space."),
    ] = None,
    space: Annotated[str | None, typer.Option(help="A space: the whole of it, or one network of it.")] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A diffusers config.json or folder, a file of nas, or OWNER/NAME (hub)."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Set the named references and models side by side.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", "--target", help="Whose latency (nas devices); a study's own by default."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time the network and its blocks here, on the device named.")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(metavar="PX", help="Image side instead of the network's own.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens that a --model is called with.")] = 77,
    steps: Steps = None,
    guidance: Guidance = None,
    decoder: Decoder = None,
    text_encoders: TextEncoders = None,
    counters: Annotated[bool, typer.Option("--counters", help="Also count MACs with torch, thop and fvcore.")] = False,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the latency's interval.")] = 0.8,
    samples: Annotated[int, typer.Option(min=10, help="Candidates drawn to profile a whole space.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The page (default reports/profiles/NAME.html).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all counters.")] = False,
) -> None:
    """Show where parameters, MACs, bytes and time go: by stage and block, side by side, or for a whole space."""
    asked = _Asked(
        space=space,
        reference=reference,
        candidate=candidate,
        names=tuple(names or ()),
        models=tuple(model or ()),
        device=device,
        measure=measure,
        resolution=resolution,
        text_tokens=text_tokens,
        counters=counters,
        confidence=confidence,
        out=out,
        as_json=as_json,
    )
    changes = {"steps": steps, "guidance": guidance, "decoder": decoder, "text_encoders": name_list(text_encoders)}
    changes = {name: value for name, value in changes.items() if value is not None}
    if measure and (compare or asked.is_whole_space):
        raise UsageError(
            "--measure times one network: name it with --reference, --candidate, --model or STUDY#CANDIDATE"
        )
    if compare:
        _compare(asked, changes)
    elif asked.is_whole_space:
        _whole_space(asked, changes, samples, seed)
    else:
        _one(asked, changes)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What was typed."""

    space: str | None
    reference: str | None
    candidate: str | None
    names: tuple[str, ...]
    models: tuple[str, ...]
    device: str | None
    measure: bool
    resolution: int | None
    text_tokens: int
    counters: bool
    confidence: float
    out: Path | None
    as_json: bool

    @property
    def is_whole_space(self) -> bool:
        return self.space is not None and not (self.names or self.models or self.reference or self.candidate)

    def page(self, name: str) -> Path:
        path = self.out if self.out is not None else REPORTS / "profiles" / f"{name}.html"
        writable_dir(path.parent)
        return path

    def one_subject(self) -> Subject:
        """The one network that is meant.

        Raises:
            UsageError: none or several are named, or a name is not known.
        """
        from nas.profile import candidate_subject, model_subject

        if len(self.names) + len(self.models) > 1:
            both = ", ".join([*self.names, *self.models])
            raise UsageError(f"one network is profiled at a time, got {both}", hint="nas profile --compare ...")
        others = {"--space": self.space, "--reference": self.reference, "--candidate": self.candidate}
        if self.models:
            if given := [name for name, value in others.items() if value]:
                raise UsageError(f"--model names a network by itself: leave out {' and '.join(given)}")
            return model_subject(self.models[0], self.resolution, text_tokens=self.text_tokens)
        study = self.names[0] if self.names else None
        found, name = chosen(study, self.space, self.reference, self.candidate, self.resolution)
        return candidate_subject(found, name, reference=self.reference if self.candidate is None else None)

    def subjects(self) -> list[Subject]:
        """The networks to compare: for images of the first one's size, unless another is asked for.

        Raises:
            UsageError: fewer than two are named, or a name is not known.
        """
        from nas.profile import check_comparable, model_subject

        if self.candidate is not None:
            raise UsageError("--compare takes references and --model, not --candidate")
        found: list[Subject] = []
        for name in (*filter(None, [self.reference]), *self.names):
            found.append(_named(name, self.space, self._size(found)))
        for model in self.models:
            found.append(model_subject(model, self._size(found), text_tokens=self.text_tokens))
        check_comparable(found)
        return found

    def _size(self, found: list[Subject]) -> int | None:
        return self.resolution or (found[0].resolution_px if found else None)


def _one(asked: _Asked, changes: Mapping[str, Any]) -> None:
    from nas import profile as profiling
    from nas.evaluate import with_pipeline

    subject = asked.one_subject()
    if changes and subject.point is None:
        raise UsageError(
            f"{subject.name} is {subject.place}, so there is no pipeline whose {', '.join(changes)} to set"
        )
    if changes and subject.point is not None:
        candidate = subject.point.candidate
        moved = with_pipeline(candidate.space, **changes).candidate(**candidate.choices)
        subject = replace(subject, point=replace(subject.point, candidate=moved))
    sheet, predictor, precision = _device(asked.device, asked.names, measured=asked.measure)
    home = "" if subject.point is None or asked.models else f"{subject.point.candidate.space.name}-"
    page = asked.page(f"{home}{subject.name}-{subject.resolution_px}px")
    with resumable(command_line()), Progress("profile") as progress:
        _check_claims(subject)
        found = profiling.profile(
            subject, predictor, sheet=sheet, precision=precision, confidence=asked.confidence, progress=progress
        )
        if asked.measure and sheet is not None:
            found = profiling.with_measured(found, sheet, progress)
        found = profiling.with_pipeline(found, sheet, predictor, asked.confidence, progress)
        if asked.counters or asked.as_json:
            found = profiling.with_counters(found, progress)
        profiling.profile_page(found, page)
    result_json(found.to_json()) if asked.as_json else profile_text.print_profile(found)
    following = f"nas export {asked.names[0]}" if asked.names else "nas spaces"
    if subject.point is not None and not asked.names:
        following = f"nas profile --space {typed_space(subject.point.candidate.space)}"
    closing(wrote=page, following=following, as_json=asked.as_json)


def _compare(asked: _Asked, changes: Mapping[str, Any]) -> None:
    from nas import profile as profiling

    if changes:
        raise UsageError(f"--compare sets denoiser calls side by side, so {', '.join(changes)} cannot be set")
    subjects = asked.subjects()
    _, predictor, precision = _device(asked.device, ())
    page = asked.page(f"{'-'.join(s.name for s in subjects)[:80]}-{subjects[0].resolution_px}px")
    profiles: list[Profile] = []
    with resumable(command_line()), Progress("profile") as progress:
        for subject in subjects:
            _check_claims(subject)
            one = profiling.profile(
                subject, predictor, precision=precision, confidence=asked.confidence, progress=progress
            )
            profiles.append(profiling.with_counters(one, progress) if asked.counters else one)
        found = profiling.compare(profiles)
        profiling.comparison_page(found, page)
    result_json(found.to_json()) if asked.as_json else profile_text.print_comparison(found)
    closing(wrote=page, following=f"open {page} in a browser", as_json=asked.as_json)


def _whole_space(asked: _Asked, changes: Mapping[str, Any], samples: int, seed: int) -> None:
    from nas import profile as profiling
    from nas.pricing.references import check_references

    if changes:
        raise UsageError(f"{', '.join(changes)} can be set for one network: add --reference or --candidate")
    _, predictor, precision = _device(asked.device, ())
    whole = sized_space(str(asked.space), asked.resolution)
    page = asked.page(f"{whole.name}-{whole.resolution_px}px")
    with resumable(command_line()), Progress("profile") as progress:
        check_references(whole, lambda done, total, note: progress("references", done, total, note))
        spread = profiling.profile_space(whole, predictor, precision=precision, n=samples, seed=seed, progress=progress)
        profiling.space_page(spread, page)
    result_json(spread.to_json()) if asked.as_json else profile_text.print_space(spread)
    closing(wrote=page, following=after_space(whole), as_json=asked.as_json)


def _named(name: str, space: str | None, resolution: int | None) -> Subject:
    """STUDY#CANDIDATE, or a reference of the space; of whichever space has it where none is named.

    Raises:
        UsageError: no space has it, or several have.
    """
    from nas.profile import candidate_subject
    from nas.space import list_spaces, load_space

    if "#" in name:
        found, key = chosen(name, None, None, None, resolution)
        return candidate_subject(found, key)
    if space is None:
        of = {s: [r.name for r in load_space(s).references] for s in list_spaces()}
        homes = [s for s, references in of.items() if name in references]
        if not homes:
            raise unknown("reference", name, (r for references in of.values() for r in references), hint="nas spaces")
        if len(homes) > 1:
            raise UsageError(f"{name} is a reference of {' and of '.join(homes)}; say which with --space")
        space = homes[0]
    return candidate_subject(published(space, name, resolution), name, reference=name)


def _check_claims(subject: Subject) -> None:
    """Refuses a reference whose network has other parameters than the space file claims."""
    from nas.pricing.references import check_params

    if subject.point is not None:
        for reference in subject.point.references:
            check_params(subject.point.candidate.space, reference)


def _device(
    device: str | None, names: Sequence[str], *, measured: bool = False
) -> tuple[DeviceSheet | None, LatencyPredictor | None, str]:
    """The device asked for, or that of the study named; its predictor, and the precision that it works in.

    Raises:
        UsageError: no such device; something shall be measured, and no device is named or it has no backend.
        NasError: it cannot be measured here, or has no predictor.
    """
    from nas.device import find_target
    from nas.latency import load_predictor

    if device is None and names:
        from nas.paths import find_study
        from nas.record import read_study

        device = str(read_study(find_study(names[0].partition("#")[0]))["target"])
    if device is None:
        if measured:
            raise UsageError("--measure needs a device: add --device", hint="nas devices")
        return None, None, "fp32"
    sheet = find_target(device)
    if measured:
        from nas.profile import backend_of

        backend_of(sheet)
    return sheet, load_predictor(sheet.slug), sheet.target.precision
