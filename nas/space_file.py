"""The space file: what one TOML may hold, checked key by key so that a misspelling is an error with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nas.errors import UsageError, unknown
from nas.network import InputShape, Scalar, short_hash

# The top-level keys and the form of each (see _FORMS).
_TOP = {
    "family": "str",
    "summary": "str",
    "sources": "tuple[str, ...]",
    "input": "table",
    "fixed": "Mapping[str, Scalar]",
    "choices": "table",
    "meanings": "Mapping[str, Scalar]",
    "rules": "tables",
    "pipeline": "table",
    "reference": "tables",
}


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """What the network is called with, and how many pixels one latent cell stands for.

    Attributes:
        latent_channels, latent_height, latent_width: C H W.
        text_tokens, text_width: T D; both or neither (a decoder reads no text).
        pooled_width, size_ids: further conditions as in `nas.network.InputShape`.
    """

    latent_channels: int
    latent_height: int
    latent_width: int
    pixels_per_latent: int
    text_tokens: int | None = None
    text_width: int | None = None
    pooled_width: int | None = None
    size_ids: int | None = None

    @property
    def shape(self) -> InputShape:
        """The same as a network's input."""
        return InputShape(
            channels=self.latent_channels,
            height=self.latent_height,
            width=self.latent_width,
            text_tokens=self.text_tokens or 0,
            text_width=self.text_width or 0,
            pooled_width=self.pooled_width or 0,
            size_ids=self.size_ids or 0,
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One design choice. Ordinal values stand in their order, so that a sampler may treat them as integers."""

    name: str
    values: tuple[Scalar, ...]
    ordinal: bool

    def index(self, value: Scalar) -> int:
        """Where `value` stands among the values."""
        return self.values.index(value)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Where every `when` choice has one of its values: `inactive` choices do not matter, or the row is forbidden."""

    when: tuple[tuple[str, tuple[Scalar, ...]], ...]
    inactive: tuple[str, ...]
    because: str

    @property
    def forbids(self) -> bool:
        """True for a rule that forbids, False for one that makes choices inactive."""
        return not self.inactive


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a budget in seconds pays for besides the denoiser.

    Attributes:
        steps: denoiser calls per image.
        guidance: whether classifier-free guidance doubles each call.
        text_encoders: names of nas.components, each run once per image.
        decoder: name of nas.components, run once per image.
        source: where the pipeline is described.
    """

    steps: int
    guidance: bool
    text_encoders: tuple[str, ...]
    decoder: str
    source: str

    @property
    def calls(self) -> int:
        """Denoiser calls per image, guidance counted."""
        return self.steps * (2 if self.guidance else 1)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published network as choices of the space, with its published figures (None where there are none).

    Attributes:
        params: its exact number of parameters.
        gmacs: side of the image in px (as TOML writes a key: a text) -> giga-MACs of one call.
        published: the parameter count in the publisher's own words.
        step_ms: target -> ms of one call.
        resolution_px, text_width: its own input where it is not the space's.
        start: False keeps a search from beginning with it (a step on the way to another reference).
    """

    name: str
    title: str
    choices: Mapping[str, Scalar]
    source: str
    params: int | None = None
    gmacs: Mapping[str, float] | None = None
    published: str | None = None
    step_ms: Mapping[str, float] | None = None
    resolution_px: int | None = None
    text_width: int | None = None
    start: bool | None = None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_figures(value: Any) -> bool:
    figures = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(t, int | float) and not isinstance(t, bool) and t > 0 for t in figures)


def _is_scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_scalar, value.values()))


# The forms a value may have, by the annotation of the field that it fills: the test, and its words.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_count, "a whole number above 0"),
    "int | None": (_is_count, "a whole number above 0"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "bool | None": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "str | None": (lambda value: isinstance(value, str), "a text"),
    "tuple[str, ...]": (_is_texts, "a list of texts"),
    "Mapping[str, Scalar]": (_is_scalars, "a table of plain values"),
    "Mapping[str, float] | None": (_is_figures, "a table of numbers above 0"),
    "table": (lambda value: isinstance(value, dict), "a table"),
    "tables": (lambda value: isinstance(value, list), "a list of tables"),
}


def read_space_file(path: Path) -> dict[str, Any]:
    """The fields of a SearchSpace as read from `path`.

    Raises:
        UsageError: not TOML, a key unknown or missing, a value of the wrong form; names file, line and field.
    """
    try:
        text = path.read_text()
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return _Reader(path, text).space(data)


class _Reader:
    """Checks one file's tables; every error says the file, the line where it can, and the field."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.lines = text.splitlines()

    def space(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The whole file."""
        self.keys(data, _TOP, required=("family", "input", "choices"), where="")
        for key, annotation in _TOP.items():
            if key in data:
                self.form(annotation, key, data[key], where="")
        choices = self.choices(data["choices"])
        for choice in choices:
            if choice.name in data.get("fixed", {}):
                raise UsageError(f"{self.place(choice.name, 'choices')} [choices]: {choice.name} is also in [fixed]")
        references = [self.record(Reference, r, f"reference[{i}]") for i, r in enumerate(data.get("reference", []))]
        names = [reference.name for reference in references]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise UsageError(
                    f"{self.place('name', f'reference[{i}]')} [reference[{i}]]: the name {name!r} is taken"
                )
        return {
            "name": self.path.stem,
            "family": data["family"],
            "summary": data.get("summary", ""),
            "input": self.input(data["input"]),
            "fixed": data.get("fixed", {}),
            "choices": choices,
            "meanings": self.meanings(data.get("meanings", {}), choices),
            "rules": tuple(self.rule(rule, i, choices) for i, rule in enumerate(data.get("rules", []))),
            "pipeline": self.record(Pipeline, data["pipeline"], "pipeline") if "pipeline" in data else None,
            "references": tuple(references),
            "sources": tuple(data.get("sources", ())),
            "path": self.path,
            "content_hash": short_hash(self.text),
        }

    def input(self, table: Mapping[str, Any]) -> InputSettings:
        """[input]: text has a number of tokens and a width, or neither."""
        read: InputSettings = self.record(InputSettings, table, "input")
        for key, other in (("text_width", "text_tokens"), ("text_tokens", "text_width")):
            if getattr(read, key) is None and getattr(read, other) is not None:
                raise UsageError(f"{self.path}: [input] needs the key {key!r}, because it has {other!r}")
        return read

    def place(self, key: str, where: str = "") -> str:
        """The file and the line on which `key` is set: the first such line of the section `where`, if it has one."""
        pattern = re.compile(rf"^\s*\[*\s*(?:[\w.]+\.)?{re.escape(key)}\s*[=\]]|[{{,]\s*{re.escape(key)}\s*=")
        start = self._section(where)
        for number, line in enumerate(self.lines[start:], start=start + 1):
            if pattern.search(line):
                return f"{self.path}:{number}"
        return str(self.path)

    def _section(self, where: str) -> int:
        """How many lines stand before the section "input" or "rules[1]"; 0 where its header is not found."""
        name, _, number = where.rstrip("]").partition("[")
        header = re.compile(rf"^\s*\[+\s*{re.escape(name)}\s*\]")
        found = [i for i, line in enumerate(self.lines) if header.search(line)]
        return found[int(number or 0)] if name and len(found) > int(number or 0) else 0

    def form(self, annotation: str, key: str, value: Any, where: str) -> None:
        """Refuses a value that does not have the form of its field."""
        fits, words = _FORMS[annotation]
        if not fits(value):
            label = f" [{where}]" if where else ""
            raise UsageError(f"{self.place(key, where)}{label}: {key} must be {words}, got {value!r}")

    def keys(self, table: Mapping[str, Any], known: Iterable[str], *, required: Iterable[str], where: str) -> None:
        """Refuses unknown keys and missing ones."""
        label = f" [{where}]" if where else ""
        if not isinstance(table, dict):
            raise UsageError(f"{self.place(where.partition('[')[0])}{label} must be a table, got {table!r}")
        for key in table:
            if key not in known:
                raise unknown("key", key, known, where=f"{self.place(key, where)}{label}")
        for key in required:
            if key not in table:
                raise UsageError(f"{self.path}:{label} needs the key {key!r}")

    def record(self, kind: type, table: Mapping[str, Any], where: str) -> Any:
        """A frozen dataclass from a table; lists become tuples."""
        known = {f.name: str(f.type) for f in fields(kind)}
        self.keys(table, known, required=[n for n, form in known.items() if not form.endswith("None")], where=where)
        for key, value in table.items():
            self.form(known[key], key, value, where)
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})

    def choices(self, table: Mapping[str, Any]) -> tuple[Choice, ...]:
        """[choices]: `name = [values]`; numbers in ascending order are ordinal, everything else is categorical."""
        if not table:
            raise UsageError(f"{self.path}: [choices] needs at least one choice")
        read = []
        for name, values in table.items():
            place = f"{self.place(name, 'choices')} [choices]"
            if not isinstance(values, list) or not values:
                raise UsageError(f"{place}: {name} must be a list of at least one value, got {values!r}")
            # Values that are equal, such as 1 and true, would be one value to every look-up.
            if not all(map(_is_scalar, values)) or len(set(values)) < len(values):
                raise UsageError(f"{place}: {name} must hold distinct plain values, got {values!r}")
            numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            if numeric and values != sorted(values):
                raise UsageError(f"{place}: the numbers of {name} must ascend, got {values!r}")
            read.append(Choice(name=name, values=tuple(values), ordinal=numeric))
        return tuple(read)

    def meanings(self, table: Mapping[str, Any], choices: tuple[Choice, ...]) -> dict[str, str]:
        """[meanings]: a choice -> what it decides, in a few words."""
        self.keys(table, [choice.name for choice in choices], required=(), where="meanings")
        for name, meaning in table.items():
            self.form("str", name, meaning, "meanings")
        return dict(table)

    def rule(self, table: Mapping[str, Any], number: int, choices: tuple[Choice, ...]) -> Rule:
        """[[rules]]: `when` with either `inactive` or `forbid = true`, and `because`."""
        where = f"rules[{number}]"
        self.keys(table, ("when", "inactive", "forbid", "because"), required=("when", "because"), where=where)
        for key, annotation in (("inactive", "tuple[str, ...]"), ("forbid", "bool"), ("because", "str")):
            if key in table:
                self.form(annotation, key, table[key], where)
        when = table["when"]
        if not isinstance(when, dict) or not when or not all(isinstance(v, list) and v for v in when.values()):
            raise UsageError(
                f"{self.place('when', where)} [{where}]: when must be a table of choices, each with a list of values"
                f" ({{ depth = [0, 1] }}), got {when!r}"
            )
        by_name = {choice.name: choice for choice in choices}
        for name in (*when, *table.get("inactive", ())):
            if name not in by_name:
                raise unknown("choice", name, by_name, where=f"{self.place('when', where)} [{where}]")
        for name, values in when.items():
            for value in values:
                if value not in by_name[name].values:
                    place = f"{self.place('when', where)} [{where}]"
                    raise unknown(f"value of {name}", value, map(str, by_name[name].values), where=place)
        if bool(table.get("inactive")) == bool(table.get("forbid")):
            raise UsageError(
                f"{self.place('when', where)} [{where}] needs exactly one of inactive = [...] and forbid = true"
            )
        return Rule(
            when=tuple((name, tuple(values)) for name, values in when.items()),
            inactive=tuple(table.get("inactive", ())),
            because=table["because"],
        )
