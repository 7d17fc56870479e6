"""SearchSpace and Candidate: one TOML file, its choices and rules, and candidates as rows of small integers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import NasError, UsageError, unknown
from nas.network import Scalar, short_hash
from nas.paths import data_dir
from nas.space.counting import count_rows
from nas.space_file import Choice, InputSettings, Pipeline, Reference, Rule, read_space_file


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchSpace:
    """A space of networks: a family, what is fixed, what may be chosen, and which combinations are allowed.

    Rows are candidates as integer arrays [n, number of choices]: each entry indexes the choice's values. A canonical
    row has 0 wherever the choice is inactive, so equal networks are equal rows.
    """

    name: str
    family: str
    summary: str
    input: InputSettings
    fixed: Mapping[str, Scalar]
    choices: tuple[Choice, ...]
    meanings: Mapping[str, str]
    rules: tuple[Rule, ...]
    pipeline: Pipeline | None
    references: tuple[Reference, ...]
    sources: tuple[str, ...]
    path: Path
    content_hash: str

    @property
    def hash(self) -> str:
        """Changes with any byte of the file and with the resolution: part of a study's name."""
        return short_hash(f"{self.content_hash}@{self.resolution_px}")

    @property
    def resolution_px(self) -> int:
        """Height of the image in pixels."""
        return self.input.latent_height * self.input.pixels_per_latent

    @property
    def resolution_step_px(self) -> int:
        """Image sides are multiples of this: what the family can halve down to its lowest stage."""
        return self.input.pixels_per_latent * int(self.fixed.get("downscale", 1))

    @property
    def size(self) -> int:
        """How many combinations of choices there are, inactive and forbidden ones included (an upper bound)."""
        return math.prod(len(choice.values) for choice in self.choices)

    @cached_property
    def count(self) -> int | None:
        """How many distinct allowed candidates there are, exactly; None where the rules tie too many choices together.

        Two candidates are distinct if their active choices differ.
        """
        return self._count(self.rules)

    @property
    def extent(self) -> str:
        """The same in words: "15 distinct candidates"."""
        return f"at most {self.size:,} candidates" if self.count is None else f"{self.count:,} distinct candidates"

    def _count(self, rules: Iterable[Rule]) -> int | None:
        # A row is a candidate of its own unless a rule that it meets forbids it, or switches off a choice of it that is
        # not at its first value.
        excluded: list[dict[int, np.ndarray]] = []
        for rule in rules:
            met = dict(self._conditions[rule])
            if rule.forbids:
                excluded.append(met)
            for name in rule.inactive:
                column, other = self.column[name], np.arange(len(self.choice(name).values)) > 0
                excluded.append({**met, column: met.get(column, other) & other})
        return count_rows(self._sizes, excluded)

    def _contradiction(self) -> list[int]:
        """Rules, by their numbers, that together leave no candidate while all but any one of them leave some."""
        kept = dict(enumerate(self.rules))
        for i in range(len(self.rules)):
            fewer = {k: rule for k, rule in kept.items() if k != i}
            if self._count(fewer.values()) == 0:
                kept = fewer
        return list(kept)

    @cached_property
    def column(self) -> dict[str, int]:
        """Choice name -> its column in a row."""
        return {choice.name: i for i, choice in enumerate(self.choices)}

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(len(choice.values) for choice in self.choices)

    @cached_property
    def _conditions(self) -> dict[Rule, list[tuple[int, np.ndarray]]]:
        """Each rule's conditions as (column, bool [values]: which value indices match)."""
        return {
            rule: [
                (self.column[name], np.array([v in values for v in self.choice(name).values]))
                for name, values in rule.when
            ]
            for rule in self.rules
        }

    @property
    def starting(self) -> tuple[Reference, ...]:
        """The references that a search begins with and shows beside its front."""
        return tuple(reference for reference in self.references if reference.start is not False)

    def choice(self, name: str) -> Choice:
        """The choice `name`.

        Raises:
            UsageError: the space has no such choice.
        """
        if name not in self.column:
            raise unknown("choice", name, self.column, where=f"space {self.name}")
        return self.choices[self.column[name]]

    def at_resolution(self, px: int) -> SearchSpace:
        """The same space for square images of `px` pixels.

        Raises:
            UsageError: `px` is not a positive multiple of what the family can halve down to its lowest stage.
        """
        step = self.resolution_step_px
        if px <= 0 or px % step:
            raise UsageError(f"resolution {px} px must be a positive multiple of {step} px for space {self.name}")
        side = px // self.input.pixels_per_latent
        return replace(self, input=replace(self.input, latent_height=side, latent_width=side))

    def with_text_width(self, width: int) -> SearchSpace:
        """The same space for text tokens of another width, which is another text encoder's."""
        if width == self.input.text_width:
            return self
        settled = replace(self.input, text_width=width)
        return replace(self, input=settled, content_hash=short_hash(f"{self.content_hash}/text_width={width}"))

    # Candidates and rows

    def candidate(self, **values: Scalar) -> Candidate:
        """The candidate with these values; choices that the rules make inactive may be left out.

        Raises:
            UsageError: an unknown choice or value, a missing active choice, or a forbidden combination.
        """
        row = np.zeros(len(self.choices), dtype=np.int64)
        for name, value in values.items():
            choice = self.choice(name)
            if value not in choice.values:
                raise unknown(f"value of {name}", value, map(str, choice.values), where=f"space {self.name}")
            row[self.column[name]] = choice.index(value)
        off = self.inactive(self.canonical(row[None]))[0]
        missing = [c.name for c, skip in zip(self.choices, off, strict=True) if not skip and c.name not in values]
        if missing:
            raise UsageError(f"space {self.name}: no value was given for {', '.join(missing)}")
        return self.from_row(row)

    def from_row(self, row: np.ndarray) -> Candidate:
        """The candidate of one row.

        Raises:
            UsageError: the rules forbid it.
        """
        canonical = self.canonical(np.asarray(row)[None])
        broken = self.broken_rule(canonical[0])
        if broken is not None:
            raise UsageError(f"space {self.name} forbids this combination: {broken.because}")
        return Candidate(space=self, row=tuple(int(i) for i in canonical[0]))

    def reference(self, name: str) -> Candidate:
        """A published network of this space as a candidate, at this space's resolution and text width.

        Raises:
            UsageError: no such reference.
        """
        return self.candidate(**dict(self.find_reference(name).choices))

    def published(self, name: str) -> Candidate:
        """A published network at the resolution and text width that it was published with.

        Raises:
            UsageError: no such reference.
        """
        reference, space = self.find_reference(name), self
        if reference.resolution_px is not None:
            space = space.at_resolution(reference.resolution_px)
        if reference.text_width is not None:
            space = space.with_text_width(reference.text_width)
        return space.candidate(**dict(reference.choices))

    def find_reference(self, name: str) -> Reference:
        """The record of a published network.

        Raises:
            UsageError: no such reference.
        """
        for reference in self.references:
            if reference.name == name:
                return reference
        raise unknown("reference", name, [r.name for r in self.references], where=f"space {self.name}")

    def inactive(self, rows: np.ndarray) -> np.ndarray:
        """Which choices the rules make irrelevant in each row: bool [n, choices]."""
        off = np.zeros(rows.shape, dtype=bool)
        for rule in self.rules:
            if not rule.forbids:
                match = self._matches(rows, rule)
                for name in rule.inactive:
                    off[:, self.column[name]] |= match
        return off

    def canonical(self, rows: np.ndarray) -> np.ndarray:
        """Rows with every inactive choice at its first value, so that equal networks are equal rows.

        A choice put at its first value may set off another rule, so the rules are applied until nothing changes;
        entries only ever become 0, so that ends.
        """
        while True:
            settled = np.where(self.inactive(rows), 0, rows)
            if np.array_equal(settled, rows):
                return settled
            rows = settled

    def allowed(self, rows: np.ndarray) -> np.ndarray:
        """Which rows no rule forbids, judged by their canonical form: bool [n]."""
        return self._permitted(self.canonical(rows))

    def broken_rule(self, row: np.ndarray) -> Rule | None:
        """The first rule that forbids this canonical row, or None."""
        return next((rule for rule in self.rules if rule.forbids and self._matches(row[None], rule)[0]), None)

    def _permitted(self, canonical: np.ndarray) -> np.ndarray:
        """Which canonical rows no rule forbids: bool [n]."""
        good = np.ones(len(canonical), dtype=bool)
        for rule in self.rules:
            if rule.forbids:
                good &= ~self._matches(canonical, rule)
        return good

    def _matches(self, rows: np.ndarray, rule: Rule) -> np.ndarray:
        """Which rows [n, choices] meet every condition of `rule`: bool [n]."""
        match = np.ones(len(rows), dtype=bool)
        for column, good in self._conditions[rule]:
            match &= good[rows[:, column]]
        return match

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` allowed canonical rows, distinct, drawn uniformly per choice; fewer where the space is smaller.

        Returns:
            int64 [n, choices], in random order. The same seed gives the same rows.
        """
        generator = np.random.default_rng(seed)
        if self.size <= max(2 * n, 4096):  # drawing would mostly repeat itself: shuffle the whole space instead
            return self._distinct(self._valid(self._decode(generator.permutation(self.size))))[:n]
        kept = np.empty((0, len(self.choices)), dtype=np.int64)
        for _ in range(50):  # enough unless the rules forbid nearly everything
            more = n - len(kept) + n // 4 + 64
            draw = np.stack([generator.integers(size, size=more) for size in self._sizes]).T
            kept = self._distinct(np.concatenate([kept, self._valid(draw)]))
            if len(kept) >= n:
                break
        return kept[:n]

    def enumerate(self, limit: int = 1_000_000) -> Iterator[Candidate]:
        """Every distinct allowed candidate, in the order of the values (the last choice changes fastest).

        Raises:
            NasError: the space has more than `limit` combinations.
        """
        if self.size > limit:
            raise NasError(f"space {self.name} has {self.size:,} combinations, more than the limit of {limit:,}")
        for start in range(0, self.size, 65536):
            rows = self._decode(np.arange(start, min(start + 65536, self.size)))
            for row in rows[self.allowed(rows) & (self.canonical(rows) == rows).all(axis=1)].tolist():
                yield Candidate(space=self, row=tuple(row))

    def _valid(self, rows: np.ndarray) -> np.ndarray:
        """The allowed among `rows`, canonical."""
        rows = self.canonical(rows)
        return rows[self._permitted(rows)]

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Row numbers 0 .. size - 1 as rows: int64 [n] -> int64 [n, choices], mixed radix, last choice fastest."""
        return np.stack(np.unravel_index(codes, self._sizes), axis=1)

    def _distinct(self, rows: np.ndarray) -> np.ndarray:
        """The rows without repeats, each at its first place."""
        if self.size < 2**62:  # one number per row, by mixed radix, sorts far faster than the rows do
            _, first = np.unique(np.ravel_multi_index(tuple(rows.T), self._sizes), return_index=True)
        else:
            _, first = np.unique(rows, axis=0, return_index=True)
        return rows[np.sort(first)]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A space and one canonical row: a network before it is built. Equal networks are equal candidates."""

    space: SearchSpace
    row: tuple[int, ...]

    @cached_property
    def values(self) -> dict[str, Scalar]:
        """Every choice's value; inactive ones stand at their first value."""
        return {c.name: c.values[i] for c, i in zip(self.space.choices, self.row, strict=True)}

    @cached_property
    def choices(self) -> dict[str, Scalar]:
        """The active choices only."""
        off = self.space.inactive(np.array([self.row]))[0]
        return {name: value for (name, value), skip in zip(self.values.items(), off, strict=True) if not skip}

    @cached_property
    def key(self) -> str:
        """Short hash of the space's name and the active choices as canonical JSON: stable across runs and files."""
        return short_hash(json.dumps([self.space.name, self.choices], sort_keys=True, separators=(",", ":")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.key == other.key and self.space.hash == other.space.hash

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return f"{self.space.name}#{self.key}"


def list_spaces(folder: str | Path | None = None) -> tuple[str, ...]:
    """The names of the spaces at hand."""
    return tuple(sorted(path.stem for path in data_dir("search_spaces", folder).glob("*.toml")))


def load_space(name: str | Path, folder: str | Path | None = None) -> SearchSpace:
    """A space by its name, or by the path of a TOML file.

    Raises:
        UsageError: unknown name, a key, value or rule in the file that is not known, or rules that leave no candidate;
            names file and field.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"no space file at {path}")
    else:
        if str(name) not in list_spaces(folder):
            raise unknown("space", name, list_spaces(folder), hint="nas spaces")
        path = data_dir("search_spaces", folder) / f"{name}.toml"
    fields: dict[str, Any] = read_space_file(path)
    space = SearchSpace(**fields)
    if space.count == 0:
        guilty = " and ".join(f"[rules[{i}]] ({space.rules[i].because})" for i in space._contradiction())
        raise UsageError(f"{path}: no candidate is left by {guilty}")
    for reference in space.references:
        try:
            space.candidate(**dict(reference.choices))
        except NasError as error:
            raise UsageError(f"{path}: reference {reference.name!r}: {error.message}") from error
    return space
