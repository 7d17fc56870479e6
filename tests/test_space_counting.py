"""Candidates are counted without being listed, and rules that leave none are named."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nas.errors import UsageError
from nas.space import SearchSpace, list_spaces, load_space
from nas.space.counting import count_rows

TINY = """
family = "unet"
[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
[choices]
"""
VALUES: dict[str, list[int | str]] = {"width": [8, 16, 32], "depth": [0, 1, 2], "kind": ["a", "b"], "bits": [4, 8]}
# `kind` matters where depth is not 0, `bits` where kind is "b": a chain, so that one rule sets off the next.
CHAIN = [
    ({"kind": ["a"]}, ["bits"]),
    ({"depth": [0]}, ["kind"]),
    ({"width": [8, 16], "depth": [2]}, None),
]
Rules = list[tuple[dict[str, list[int | str]], list[str] | None]]


def _space(folder: Path, rules: Rules, values: Mapping[str, list[int | str]] = VALUES) -> SearchSpace:
    """A space of these choices and rules; a rule that switches nothing off forbids."""
    lines = [f"{name} = {own}" for name, own in values.items()]
    for i, (when, off) in enumerate(rules):
        terms = ", ".join(f"{name} = {own}" for name, own in when.items())
        effect = "forbid = true" if off is None else f"inactive = {off}"
        lines += ["[[rules]]", f"when = {{ {terms} }}", effect, f'because = "reason {i}"']
    path = folder / "tiny.toml"
    path.write_text(TINY + "\n".join(lines))
    return load_space(path)


def test_count_is_the_number_of_distinct_networks(tmp_path: Path):
    space = _space(tmp_path, CHAIN)
    # Width 8 and 16: depth 0, or depth 1 with a, b-4, b-8; width 32: the same, and depth 2 with the same three.
    assert space.count == 2 * (1 + 3) + (1 + 3 + 3) == 15
    assert space.size == 36
    assert space.extent == "15 distinct candidates"


@pytest.mark.parametrize("seed", range(16))
def test_count_equals_a_list_of_all_under_random_rules(tmp_path: Path, seed: int):
    # Rules share choices in every way: chains, cycles, a choice that switches itself off, several that forbid.
    generator = np.random.default_rng(seed)
    values = VALUES | {f"extra_{i}": [0, 1, 2] for i in range(3)}
    names = list(values)
    rules: Rules = []
    for i in range(7):
        chosen = generator.permutation(names)[: generator.integers(2, 4)]
        when = {str(n): values[n][: generator.integers(1, 3)][-1:] for n in chosen}
        rules.append((when, None if i % 3 == 0 else [str(n) for n in generator.permutation(names)[:2]]))
    space = _space(tmp_path, rules, values)
    assert space.count == len(list(space.enumerate())) > 0


def test_rows_are_counted_as_a_list_would(tmp_path: Path):
    sizes = (2, 3, 2, 4)
    excluded = [
        {0: np.array([True, False]), 1: np.array([False, True, True])},
        {1: np.array([True, False, True]), 3: np.array([True, False, False, True])},
    ]
    rows = itertools.product(*map(range, sizes))
    free = sum(not any(all(met[c][row[c]] for c in met) for met in excluded) for row in rows)
    assert count_rows(sizes, excluded) == free
    assert count_rows(sizes, []) == 48
    assert count_rows(sizes, [{}]) == 0
    assert count_rows((), []) == 1


def test_count_past_64_bits_is_exact(tmp_path: Path):
    extra: dict[str, list[int | str]] = {f"extra_{i}": [0, 1, 2, 3] for i in range(40)}
    assert _space(tmp_path, CHAIN, VALUES | extra).count == 15 * 4**40


def test_count_does_not_guess_where_rules_tie_too_much_together(tmp_path: Path):
    extra: dict[str, list[int | str]] = {f"extra_{i}": [0, 1, 2, 3] for i in range(12)}
    space = _space(tmp_path, [({name: [0] for name in extra}, None)], extra)
    assert space.count is None
    assert space.extent == "at most 16,777,216 candidates"


def test_rules_that_leave_nothing_are_named_and_no_others(tmp_path: Path):
    thick, thin = ({"width": [16, 32]}, None), ({"width": [8]}, None)
    assert _space(tmp_path, [*CHAIN, thick]).count == 4
    with pytest.raises(UsageError) as caught:
        _space(tmp_path, [*CHAIN, thick, thin])
    path = tmp_path / "tiny.toml"
    assert caught.value.message == f"{path}: no candidate is left by [rules[3]] (reason 3) and [rules[4]] (reason 4)"


@pytest.mark.parametrize("name", list_spaces())
def test_every_shipped_space_is_counted_in_a_second(name: str):
    space = load_space(name)
    fresh = SearchSpace(**{field.name: getattr(space, field.name) for field in dataclasses.fields(space)})
    began = time.process_time()
    assert 0 < fresh.count <= space.size
    assert time.process_time() - began < 1.0
