"""What a run measures: the limits of a target, and subjects drawn within them, those that its table has first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from nas import tables
from nas.device import DeviceSheet
from nas.errors import NasError, unknown
from nas.measure.sampling import known_subjects, sample_blocks, sample_networks
from nas.measure.subjects import Subject, components
from nas.measure.timing import Protocol
from nas.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large the subjects of a target may be, in giga-MACs and million parameters: a slow target sets lower ones.

    A pipeline component beyond its limit is not measured; a budget is then charged with what the predictor says of it.
    A study's finalist that is predicted to take more than `most_call_s` seconds a call is not measured.
    """

    most_block_gmac: float = 6.0
    least_network_gmac: float = 0.3
    most_network_gmac: float = 12.0
    most_network_mparams: float = 64.0
    most_component_gmac: float = 400.0
    most_call_s: float = 60.0
    components: bool = True


def settings(sheet: DeviceSheet) -> tuple[Protocol, Limits]:
    """The sheet's [protocol] table over the defaults.

    Raises:
        NasError: the target's rows are published, so its [protocol] is not ours.
        UsageError: a key that is neither of `Protocol` nor of `Limits`.
    """
    backend_name(sheet)
    names = {kind: {f.name for f in fields(kind)} for kind in (Protocol, Limits)}
    for key in sheet.protocol:
        if not any(key in known for known in names.values()):
            raise unknown("key", key, set().union(*names.values()), where=f"[protocol] of {sheet.path}")
    given = {kind: {k: v for k, v in sheet.protocol.items() if k in known} for kind, known in names.items()}
    return Protocol(**given[Protocol]), Limits(**given[Limits])


def limits_of(sheet: DeviceSheet) -> Limits:
    """The limits of any target; one that no backend runs from here has a [protocol] in words beside them."""
    known = {f.name for f in fields(Limits)}
    return Limits(**{key: value for key, value in sheet.protocol.items() if key in known})


def backend_name(sheet: DeviceSheet) -> str:
    """The file in nas/backends/ that runs the target from here.

    Raises:
        NasError: there is none.
    """
    if sheet.backend is None:
        raise NasError(
            f"target {sheet.alias} cannot be measured from here: {sheet.path} names no backend, its rows are published",
            hint=f"nas measure --target {sheet.alias} --kit kit, for a device on another machine",
        )
    return sheet.backend


def known_to(
    spaces: Sequence[SearchSpace], target: DeviceSheet, like: DeviceSheet | None, folder: Path | None
) -> tuple[Subject, ...]:
    """The subjects of the target's table, then those of the table that it shall be comparable with."""
    found: list[Subject] = []
    for sheet in (target,) if like is None else (target, like):
        pixels = {row.subject: row.resolution_px for row in tables.read(sheet.slug, folder)}
        recorded = tables.subjects(sheet.slug, folder)
        found += known_subjects(spaces, recorded, pixels, batch=target.target.batch)
    return distinct(found)


def choose(
    spaces: Sequence[SearchSpace],
    blocks: int,
    networks: int,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    batch: int = 1,
    known: Sequence[Subject] = (),
) -> tuple[Subject, ...]:
    """The subjects of a run: of each space the known ones first, then newly drawn ones up to the numbers asked for."""
    limits = limits or Limits()
    found: list[Subject] = []
    for kind, asked in (("block", blocks), ("network", networks)):
        for space, share in zip(spaces, _shares(asked, len(spaces)), strict=True):
            had = [s for s in known if s.kind == kind and (s.spec or {}).get("space") == space.name]
            # The whole sample where the known do not suffice, since some of it may be known.
            drawn = _drawn(kind, space, share, seed, limits, batch) if len(had) < share else ()
            found += distinct([*had, *drawn])[:share]
    if limits.components:
        found += [part for space in spaces for part in components(space, most_gmac=limits.most_component_gmac)]
    return distinct(found)


def _shares(asked: int, spaces: int) -> list[int]:
    """`asked` in as many parts as there are spaces, the first ones larger by one where it does not divide."""
    return [asked // spaces + (i < asked % spaces) for i in range(spaces)]


def _drawn(kind: str, space: SearchSpace, count: int, seed: int, limits: Limits, batch: int) -> tuple[Subject, ...]:
    if kind == "block":
        return sample_blocks(space, count, seed=seed, batch=batch, most_gmac=limits.most_block_gmac)
    return sample_networks(
        space,
        count,
        seed=seed,
        batch=batch,
        least_gmac=limits.least_network_gmac,
        most_gmac=limits.most_network_gmac,
        most_mparams=limits.most_network_mparams,
    )


def distinct(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Each key once, the first of its kind."""
    found: dict[str, Subject] = {}
    for subject in subjects:
        found.setdefault(subject.key, subject)
    return tuple(found.values())
