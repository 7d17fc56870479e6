"""What a person may call a measured thing: a key of a kit or table, a published network, a component of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nas import components as parts
from nas import tables
from nas.device import DeviceSheet, list_targets
from nas.errors import NasError, UsageError, nearest
from nas.measure.kit import read_kit
from nas.measure.subjects import rebuilt, reference_subject, table_subject
from nas.space import list_spaces, load_space


@dataclass(frozen=True, kw_only=True)
class Named:
    """A subject with what its row must say of it; `text` is how the person called it."""

    text: str
    subject: tables.Subject
    resolution_px: int | None = None
    role: str = ""


class Names:
    """Finds subjects by what a person calls them, for one target."""

    def __init__(self, sheet: DeviceSheet, kit: Path, folder: str | Path | None) -> None:
        self.sheet = sheet
        self.folder = folder
        self.kit = read_kit(kit)
        self.recorded = tables.subjects(sheet.slug, folder)
        self._found: dict[str, Named] = {}

    def find(self, text: str, where: str) -> Named:
        """The subject called `text`; `where` names the line in errors.

        Raises:
            UsageError: nothing is called so; the nearest name is offered.
            NasError: the target's table has it at another batch.
        """
        if text not in self._found:
            found = self._known(text, where) or self._component(text) or self._reference(text) or self._elsewhere(text)
            if found is None:
                close = nearest(text, self._names)
                raise UsageError(
                    f"{where}: unknown subject {text!r}" + (f"; did you mean {close!r}?" if close else ""),
                    hint="a subject is a key of a kit's rows.csv, SPACE:REFERENCE@PIXELS (nas spaces show SPACE), or a"
                    f" key of nas devices show {self.sheet.alias} --rows",
                )
            self._found[text] = found
        return self._found[text]

    def _known(self, text: str, where: str) -> Named | None:
        """A key, or a name that only one subject has, of the kit or of the target's table."""
        for subjects in (self.kit, self.recorded):
            named = [s for s in subjects.values() if s.name == text]
            found = subjects.get(text) or (named[0] if len(named) == 1 else None)
            if found is not None:
                batch = self.sheet.target.batch
                if found.spec.get("batch", batch) != batch:
                    raise NasError(
                        f"{where}: {text!r} is known at batch {found.spec['batch']}, but {self.sheet.slug} is measured"
                        f" at {batch}",
                        hint="name it as SPACE:REFERENCE@PIXELS",
                    )
                rows = tables.read(self.sheet.slug, self.folder) if found.kind == "component" else ()
                role = next((row.role for row in rows if row.subject == found.key), "")
                return Named(text=text, subject=found, role=role)
        return None

    def _component(self, text: str) -> Named | None:
        """A part of a pipeline, by the name that its rows have in every table."""
        for name in parts.text_encoder_names():
            if text == parts.subject_name(name, parts.TEXT_ENCODERS, None):
                return Named(text=text, subject=_part(text), role=parts.TEXT_ENCODERS)
        head, _, pixels = text.rpartition("-decoder-")
        if head in parts.decoder_names() and pixels.removesuffix("px").isdigit():
            px = int(pixels.removesuffix("px"))
            return Named(text=text, subject=_part(text), resolution_px=px, role=parts.DECODER)
        return None

    def _reference(self, text: str) -> Named | None:
        """A published network as "space:reference" or "space:reference@pixels"."""
        space, separator, rest = text.partition(":")
        name, _, pixels = rest.partition("@")
        if not separator or space not in list_spaces() or (pixels and not pixels.isdigit()):
            return None
        if name not in {reference.name for reference in load_space(space).references}:
            return None
        subject = reference_subject(space, name, int(pixels) if pixels else None, self.sheet.target.batch)
        return Named(text=text, subject=self._same(table_subject(subject)), resolution_px=subject.resolution_px)

    def _same(self, subject: tables.Subject) -> tables.Subject:
        """The target's own record of the same network under another key: two would be held out apart."""
        for other in self.recorded.values():
            if other.kind in ("network", "reference") and np.array_equal(other.vector, subject.vector):
                return other
        return subject

    def _elsewhere(self, text: str) -> Named | None:
        """A key of another target's table, traced again at this target's batch."""
        for slug, subjects in self._others.items():
            if text in subjects:
                pixels = {row.subject: row.resolution_px for row in tables.read(slug, self.folder)}
                found = rebuilt(subjects[text], pixels.get(text), self.sheet.target.batch)
                if found is not None:
                    return Named(text=text, subject=table_subject(found), resolution_px=found.resolution_px)
        return None

    @cached_property
    def _others(self) -> Mapping[str, Mapping[str, tables.Subject]]:
        slugs = [sheet.slug for sheet in list_targets(self.folder) if sheet.slug != self.sheet.slug]
        return {slug: tables.subjects(slug, self.folder) for slug in slugs}

    @property
    def _names(self) -> list[str]:
        references = [f"{space}:{r.name}" for space in list_spaces() for r in load_space(space).references]
        known = [*self.kit, *self.recorded]
        return [*references, *known, *(s.name for s in (*self.kit.values(), *self.recorded.values()))]


def _part(name: str) -> tables.Subject:
    return tables.Subject(key=name, kind="component", name=name)
