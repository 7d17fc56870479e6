"""Targets, their device sheets, and budgets such as "1.4s@iphone"."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.errors import NasError, UsageError, unknown
from nas.paths import data_dir

_SLUG_PART = re.compile(r"[a-z0-9]+(-[a-z0-9.]+)*")
_NAME = re.compile(r"[a-z0-9][a-z0-9._\-]*")  # what a budget can name and find_target can find
_BUDGET = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>ms|s)(?P<step>/step)?\s*@\s*(?P<device>[\w.\-]+)\s*$")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # true is an int to isinstance


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_Form = tuple[Callable[[Any], bool], str]
_TEXT: _Form = (_is_text, "a text")
_TEXTS: _Form = (_is_texts, "a list of texts")
_COUNT: _Form = (_is_count, "a whole number above 0")
_TABLE: _Form = (lambda value: isinstance(value, dict), "a table")
# Key -> the test that its value must pass, and what that asks for in words.
_SHEET_KEYS: dict[str, _Form] = {
    "device": _TEXT,
    "chip": _TEXT,
    "runtime": _TEXT,
    "precision": _TEXT,
    "threads": _COUNT,
    "batch": _COUNT,
    "aliases": _TEXTS,
    "summary": _TEXT,
    "backend": _TEXT,
    "shared": (lambda value: isinstance(value, bool), "true or false"),
    "roofline": _TABLE,
    "family": _TEXT,
    "chips": _TABLE,
    "protocol": _TABLE,
    "fit": _TABLE,
    "options": _TABLE,
    "sources": _TEXTS,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a latency is a latency of: device, runtime, precision, threads, batch."""

    device: str
    runtime: str
    precision: str
    threads: int = 1
    batch: int = 1

    @property
    def slug(self) -> str:
        """The name of its table: `iphone-16-pro-max--coreml--fp16`; threads and batch are told when not 1."""
        parts = [self.device, self.runtime, self.precision]
        if self.threads != 1:
            parts.append(f"t{self.threads}")
        if self.batch != 1:
            parts.append(f"b{self.batch}")
        return "--".join(parts)


@dataclass(frozen=True, kw_only=True)
class DeviceSheet:
    """One latency_tables/<slug>.toml: what the device is, how it is measured, what its numbers rest on.

    Attributes:
        target: what is measured.
        aliases: other names a person may type.
        backend: the file in nas/backends/ that can run it from here, or None where only published rows exist.
        shared: True for a machine that others use too: the timing statistic is then the minimum of a session.
        roofline: "ms_per_gmac", "ms_per_gb", "ms_per_op" of the prior that a fit is shrunk towards.
        family: slug of the sheet whose rows, chips, roofline and settings of the fit this device shares, or None. Its
            own sheet then says only what it is: device, chip, aliases; predictions are for its chip.
        chips: public figures of related chips ({name: {figure: value}}) that pool their measurements.
        fit: settings of the fit, read by nas.latency.
        options: the backend's own settings (a server's address, tuning records); an unknown one is refused by it.
        sources: where the figures come from.
    """

    target: Target
    path: Path
    chip: str
    aliases: tuple[str, ...]
    summary: str
    backend: str | None
    shared: bool
    family: str | None = None
    roofline: Mapping[str, Any] = field(default_factory=dict)
    chips: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The target's slug, which is also the file's name."""
        return self.target.slug

    @property
    def alias(self) -> str:
        """The name to print: the first alias, or the slug."""
        return self.aliases[0] if self.aliases else self.slug


def _read_sheet(path: Path) -> dict[str, Any]:
    """The sheet's TOML with every key and value checked."""
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    for key, value in data.items():
        if key not in _SHEET_KEYS:
            raise unknown("key", key, _SHEET_KEYS, where=str(path))
        fits, words = _SHEET_KEYS[key]
        if not fits(value):
            raise UsageError(f"{path}: {key} must be {words}, got {value!r}")
    for key in ("device", "runtime", "precision"):
        if not _SLUG_PART.fullmatch(data.get(key, "")):
            raise UsageError(f"{path}: {key} must be lower-case words joined by '-', got {data.get(key)!r}")
    for alias in data.get("aliases", ()):
        if not _NAME.fullmatch(alias):
            raise UsageError(f"{path}: alias {alias!r} must hold only lower-case letters, digits, '-', '.' and '_'")
    return data


# What a family has in common, read from the family's own sheet; a member may not state it again.
_OF_THE_FAMILY = ("roofline", "chips", "fit")
_AS_THE_FAMILY = ("runtime", "precision", "threads", "batch")


def load_sheet(path: Path) -> DeviceSheet:
    """Reads one device sheet, and of a family's member also the family's.

    Raises:
        UsageError: a key is unknown, missing or of the wrong form, the file's name is not its target's slug, or a
            member does not fit its family.
    """
    data = _read_sheet(path)
    target = Target(
        device=data["device"],
        runtime=data["runtime"],
        precision=data["precision"],
        threads=data.get("threads", 1),
        batch=data.get("batch", 1),
    )
    if path.stem != target.slug:
        raise UsageError(f"{path}: the file must be named after its target, {target.slug}.toml")
    shared = _of_family(path, data) if "family" in data else data
    return DeviceSheet(
        target=target,
        path=path,
        chip=data.get("chip", ""),
        aliases=tuple(data.get("aliases", ())),
        summary=data.get("summary", ""),
        backend=data.get("backend"),
        shared=data.get("shared", False),
        family=data.get("family"),
        roofline=shared.get("roofline", {}),
        chips=shared.get("chips", {}),
        protocol=data.get("protocol", shared.get("protocol", {})),
        fit=shared.get("fit", {}),
        options=data.get("options", {}),
        sources=tuple(data.get("sources", shared.get("sources", ()))),
    )


def _of_family(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The sheet of a member's family, after checking that the member belongs there."""
    head = path.with_name(f"{data['family']}.toml")
    if not head.is_file():
        known = [sheet.stem for sheet in path.parent.glob("*.toml")]
        raise unknown("family", data["family"], known, where=str(path))
    shared = _read_sheet(head)
    if "family" in shared:
        raise UsageError(f"{path}: family {data['family']} is itself a member of {shared['family']}")
    for key in _OF_THE_FAMILY:
        if key in data:
            raise UsageError(f"{path}: {key} is the family's, and stands in {head.name}")
    for key in _AS_THE_FAMILY:
        if data.get(key) != shared.get(key):
            raise UsageError(f"{path}: {key} must be the family's, {shared.get(key)!r}, got {data.get(key)!r}")
    if data.get("chip") not in shared.get("chips", {}):
        raise unknown("chip", data.get("chip", ""), shared.get("chips", {}), where=f"{path}, of {head.name}")
    return shared


def list_targets(folder: str | Path | None = None) -> tuple[DeviceSheet, ...]:
    """Every device sheet, sorted by slug; an alias that two sheets claim is an error."""
    sheets = tuple(load_sheet(path) for path in sorted(data_dir("latency_tables", folder).glob("*.toml")))
    owner: dict[str, str] = {}
    for sheet in sheets:
        for name in (sheet.slug, *sheet.aliases):
            if owner.setdefault(name, sheet.slug) != sheet.slug:
                raise NasError(f"{sheet.path}: alias {name!r} already belongs to {owner[name]}")
    return sheets


def find_target(name: str, folder: str | Path | None = None) -> DeviceSheet:
    """The sheet whose slug or alias is `name` (any case).

    Raises:
        UsageError: no such target; the nearest name is offered.
    """
    by_name = {alias: sheet for sheet in list_targets(folder) for alias in (sheet.slug, *sheet.aliases)}
    if name.lower() not in by_name:
        raise unknown("device", name, by_name, hint="nas devices")
    return by_name[name.lower()]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A latency that must not be exceeded: one image end to end, or one denoiser call with `/step`."""

    ms: float
    per_step: bool
    device: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "1.4s@iphone", "900ms@cpu-onnxruntime" or "274ms/step@iphone".

        Raises:
            UsageError: the text has another form, or the time is not positive.
        """
        match = _BUDGET.match(text)
        if match is None:
            raise UsageError(
                f"budget {text!r} is not of the form TIME@DEVICE; a time is 1.4s or 900ms, with /step for one denoiser"
                " call (1.4s@iphone, 274ms/step@iphone)"
            )
        ms = float(match["value"]) * (1000.0 if match["unit"] == "s" else 1.0)
        if not 0 < ms < math.inf:
            raise UsageError(f"budget {text!r} must be a finite time of more than 0 ms")
        return cls(ms=ms, per_step=match["step"] is not None, device=match["device"])

    def __str__(self) -> str:
        time = f"{self.ms / 1000:.12g}s" if self.ms >= 1000 else f"{self.ms:.12g}ms"
        return f"{time}{'/step' if self.per_step else ''}@{self.device}"
