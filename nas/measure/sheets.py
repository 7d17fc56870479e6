"""Device sheets that a command writes: a target of one's own, and the line that names the prior of a fit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nas.device import DeviceSheet, list_targets, load_sheet
from nas.errors import NasError, UsageError
from nas.latency.problem import FitSettings, roofline
from nas.measure.guard import writable_tables
from nas.paths import atomic_write

ROOFLINE = ("ms_per_gmac", "ms_per_gb", "ms_per_op")


def write_prior(sheet: DeviceSheet, source: DeviceSheet, folder: str | Path | None = None) -> bool:
    """Names `source` as the prior of the target's fit in its sheet, so that the same files give the same fit again.

    Returns:
        Whether the sheet had to be changed.

    Raises:
        NasError: the sheet names another prior, or has its [fit] in a form that a line cannot be added to; the message
            has the line to write.
    """
    line = f"prior = {json.dumps(source.slug)}"
    named = FitSettings.of(sheet).prior
    if named in (source.slug, *source.aliases):
        return False
    if named:
        raise NasError(f"{sheet.path} names {named!r} as the prior of its fit; write {line} under [fit] to change it")
    if sheet.family is not None:
        raise NasError(f"{sheet.path}: [fit] is that of its family {sheet.family}; write {line} under [fit] there")
    writable_tables(folder)
    text = sheet.path.read_text()
    header = re.search(r"^\[fit\][^\n]*\n", text, re.MULTILINE)
    if header is None:
        changed = f"{text.rstrip()}\n\n[fit]\n{line}\n"
    else:
        changed = f"{text[: header.end()]}{line}\n{text[header.end() :]}"
    try:
        _parsed(changed, sheet.path)
    except UsageError as error:
        raise NasError(f"{sheet.path}: no line can be added to its fit; write {line} there yourself") from error
    atomic_write(sheet.path, changed)
    return True


def add_target(
    name: str,
    *,
    adapt_from: DeviceSheet | None = None,
    chip: str = "",
    aliases: Sequence[str] = (),
    backend: str | None = None,
    figures: Mapping[str, float] | None = None,
    folder: str | Path | None = None,
) -> DeviceSheet:
    """Writes the sheet of a new target.

    Args:
        name: "<device>--<runtime>--<precision>", with "--t<threads>" and "--b<batch>" behind it where they are not 1.
        adapt_from: a target whose costs the fit is shrunk towards; its roofline is taken where `figures` lacks one.
        chip: the processor's name.
        aliases: shorter names.
        backend: the file in nas/backends/ that runs it from here.
        figures: fields of `ROOFLINE`.
        folder: of the tables.

    Raises:
        UsageError: the name is taken or is not of that form, a figure is missing, or there is no such precision.
        NasError: the tables cannot be written to.
    """
    place = writable_tables(folder)
    for sheet in list_targets(folder):
        for taken in (sheet.slug, *sheet.aliases):
            if taken in (name, *aliases):
                raise UsageError(f"{taken!r} is the name of {sheet.slug} already", hint=f"nas devices show {taken}")
    known = {} if adapt_from is None else {k: v for k, v in adapt_from.roofline.items() if k in ROOFLINE}
    found = {**known, **(figures or {})}
    if missing := [key for key in ROOFLINE if key not in found]:
        raise UsageError(
            f"target {name} needs {', '.join(missing)}: what it takes for a giga-MAC, a gigabyte, an operator",
            hint="--adapt-from TARGET takes them from the most similar one; --gmac-per-s, --gb-per-s give them",
        )
    text = _sheet_text(name, chip, aliases, backend, found, adapt_from)
    path = place / f"{name}.toml"
    roofline(_parsed(text, path))
    atomic_write(path, text)
    return load_sheet(path)


def _sheet_text(
    name: str,
    chip: str,
    aliases: Sequence[str],
    backend: str | None,
    figures: Mapping[str, float],
    adapt_from: DeviceSheet | None,
) -> str:
    parts = name.split("--")
    if len(parts) < 3:
        raise UsageError(f"target {name!r} must be DEVICE--RUNTIME--PRECISION, such as pixel-9--tflite--fp16")
    fields: dict[str, object] = dict(zip(("device", "runtime", "precision"), parts[:3], strict=True))
    for extra in parts[3:]:
        match = re.fullmatch(r"([tb])([1-9]\d*)", extra)
        if match is None:
            raise UsageError(f"target {name!r}: {extra!r} must be t<threads> or b<batch>, such as t4 or b2")
        fields["threads" if match[1] == "t" else "batch"] = int(match[2])
    origin = "" if adapt_from is None else f", adapted from {adapt_from.slug}"
    fields |= {
        "chip": chip,
        "aliases": list(aliases),
        "summary": f"{parts[1]} {parts[2]} on {chip or parts[0]}; rows brought by its owner{origin}",
    }
    if backend is not None:
        fields["backend"] = backend
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items() if value]
    lines += ["", "[roofline]", *(f"{key} = {float(figures[key]):g}" for key in ROOFLINE)]
    if adapt_from is not None:
        lines += ["", "[fit]", f"prior = {json.dumps(adapt_from.slug)}"]
    return "\n".join(lines) + "\n"


def _parsed(text: str, path: Path) -> DeviceSheet:
    """The sheet that `text` would be at `path`, before it is there."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(text)
        try:
            return load_sheet(trial)
        except UsageError as error:
            raise UsageError(error.message.replace(str(trial), str(path)), hint=error.hint) from error
