"""Spaces, candidates and rows of small integers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nas.errors import NasError, UsageError
from nas.network import short_hash
from nas.space import SearchSpace, list_spaces, load_space

# `kind` matters where depth is not 0, `bits` where kind is "b": a chain, so that one rule sets off the next.
TINY = """
family = "unet"
[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
text_tokens = 7
text_width = 16
[fixed]
downscale = 4
[choices]
width = [8, 16, 32]
depth = [0, 1, 2]
kind = ["a", "b"]
bits = [4, 8]
[[rules]]
when = { kind = ["a"] }
inactive = ["bits"]
because = "only b has bits"
[[rules]]
when = { depth = [0] }
inactive = ["kind"]
because = "nothing to be of a kind"
[[rules]]
when = { width = [8, 16], depth = [2] }
forbid = true
because = "deep and thin"
[pipeline]
steps = 4
guidance = true
text_encoders = []
decoder = "taesd"
source = "made up"
[[reference]]
name = "flat"
title = "no depth"
source = "made up"
[reference.choices]
width = 8
depth = 0
"""


def _load(folder: Path, text: str = TINY) -> SearchSpace:
    path = folder / "tiny.toml"
    path.write_text(text)
    return load_space(path)


def _grow(folder: Path, count: int, values: int, more: str = "") -> SearchSpace:
    """The tiny space with `count` more choices extra_i of `values` values each, and the text `more`; no reference."""
    extra = "\n".join(f"extra_{i} = {list(range(values))}" for i in range(count))
    return _load(folder, TINY.partition("[[reference]]")[0].replace("bits = [4, 8]", f"bits = [4, 8]\n{extra}") + more)


@pytest.fixture
def tiny(tmp_path: Path) -> SearchSpace:
    return _load(tmp_path)


@pytest.fixture(scope="module")
def snapgen() -> SearchSpace:
    return load_space("snapgen_unet")


def _all_rows(space: SearchSpace) -> np.ndarray:
    return np.array(list(itertools.product(*(range(len(c.values)) for c in space.choices))))


def _legal() -> set[tuple[tuple[str, object], ...]]:
    """The tiny space's distinct networks as active choices, worked out by hand rather than by rules."""
    found = set()
    for width, depth, kind, bits in itertools.product([8, 16, 32], [0, 1, 2], ["a", "b"], [4, 8]):
        if depth == 2 and width != 32:
            continue
        active: dict[str, object] = {"width": width, "depth": depth}
        if depth:
            active["kind"] = kind
            if kind == "b":
                active["bits"] = bits
        found.add(tuple(sorted(active.items())))
    return found


def test_a_candidate_holds_active_choices_only(tiny: SearchSpace):
    assert tiny.candidate(width=8, depth=1, kind="b", bits=8).choices == {
        "width": 8,
        "depth": 1,
        "kind": "b",
        "bits": 8,
    }
    assert tiny.candidate(width=8, depth=1, kind="a", bits=8).choices == {"width": 8, "depth": 1, "kind": "a"}
    flat = tiny.candidate(width=8, depth=0, kind="b", bits=8)
    assert flat.choices == {"width": 8, "depth": 0}
    assert flat.values == {"width": 8, "depth": 0, "kind": "a", "bits": 4}


def test_inactive_choices_change_neither_row_nor_key(tiny: SearchSpace):
    flat = tiny.candidate(width=8, depth=0)
    assert tiny.candidate(width=8, depth=0, kind="b") == flat  # bits would matter to "b", had "b" any meaning
    for kind, bits in itertools.product(["a", "b"], [4, 8]):
        other = tiny.candidate(width=8, depth=0, kind=kind, bits=bits)
        assert (other.row, other.key, hash(other), other) == (flat.row, flat.key, hash(flat), flat)


def test_the_key_is_the_hash_of_space_and_active_choices_as_canonical_json(tiny: SearchSpace):
    assert tiny.reference("flat").key == short_hash('["tiny",{"depth":0,"width":8}]')


def test_each_active_choice_changes_the_key(tiny: SearchSpace):
    keys = {candidate.key for candidate in tiny.enumerate()}
    assert len(keys) == len(_legal())
    assert tiny.candidate(width=8, depth=0) != tiny.candidate(width=16, depth=0)


def test_canonical_rows_follow_chains_and_settle(tiny: SearchSpace):
    # depth 0 puts kind at "a", and "a" in turn makes bits inactive.
    assert tiny.canonical(np.array([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]])).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 0, 0],
    ]
    rows = tiny.canonical(_all_rows(tiny))
    np.testing.assert_array_equal(tiny.canonical(rows), rows)
    assert not rows[tiny.inactive(rows)].any()


def test_allowed_agrees_with_from_row_on_every_row(tiny: SearchSpace):
    rows = _all_rows(tiny)
    for row, good in zip(rows, tiny.allowed(rows), strict=True):
        if good:
            assert tuple(sorted(tiny.from_row(row).choices.items())) in _legal()
        else:
            with pytest.raises(UsageError, match="tiny forbids this combination: deep and thin"):
                tiny.from_row(row)
    assert tiny.allowed(rows).sum() == 7 * 4


def test_a_rule_cannot_forbid_by_a_choice_that_does_not_matter(tmp_path: Path):
    space = _load(tmp_path, TINY.replace("when = { width = [8, 16], depth = [2] }", 'when = { kind = ["b"] }'))
    row = np.array([[0, 0, 1, 0]])
    assert space.allowed(row).tolist() == [True]
    assert space.from_row(row[0]).choices == {"width": 8, "depth": 0}


def test_a_choice_is_inactive_when_any_of_several_rules_says_so(tmp_path: Path):
    space = _grow(tmp_path, 1, 2, '[[rules]]\nwhen = { width = [32] }\ninactive = ["bits"]\nbecause = "wide"')
    off = space.inactive(np.array([[0, 1, 0, 0, 0], [2, 1, 1, 0, 0], [0, 1, 1, 0, 0]]))
    assert off[:, space.column["bits"]].tolist() == [True, True, False]


def test_broken_rule_names_the_rule(tiny: SearchSpace):
    assert tiny.broken_rule(np.array([0, 2, 0, 0])) == tiny.rules[2]
    assert tiny.broken_rule(np.array([2, 2, 0, 0])) is None


def test_enumerate_equals_brute_force(tiny: SearchSpace):
    found = [tuple(sorted(candidate.choices.items())) for candidate in tiny.enumerate()]
    assert len(found) == len(set(found)) == len(_legal()) == 15
    assert set(found) == _legal()
    rows = [candidate.row for candidate in tiny.enumerate()]
    assert rows == sorted(rows)
    assert [c.key for c in tiny.enumerate()] == [tiny.from_row(np.array(row)).key for row in rows]


def test_enumerate_refuses_more_than_its_limit(tiny: SearchSpace):
    assert tiny.size == 36
    assert len(list(tiny.enumerate(limit=36))) == 15
    with pytest.raises(NasError, match="tiny has 36 combinations, more than the limit of 35"):
        list(tiny.enumerate(limit=35))


def test_sample_of_a_small_space_is_all_of_it(tiny: SearchSpace):
    rows = tiny.sample(1000, seed=0)
    assert {tuple(sorted(tiny.from_row(row).choices.items())) for row in rows} == _legal()
    assert len(rows) == 15
    assert len(tiny.sample(4, seed=0)) == 4
    assert {tuple(tiny.sample(1, seed=seed)[0]) for seed in range(200)} == {tuple(row) for row in rows}


@pytest.mark.parametrize("n", [1, 100, 20_000])
def test_sample_is_distinct_allowed_canonical_and_set_by_the_seed(snapgen: SearchSpace, n: int):
    rows = snapgen.sample(n, seed=1)
    assert rows.shape == (n, len(snapgen.choices))
    assert rows.dtype == np.int64
    assert len(np.unique(rows, axis=0)) == n
    assert snapgen.allowed(rows).all()
    np.testing.assert_array_equal(snapgen.canonical(rows), rows)
    np.testing.assert_array_equal(snapgen.sample(n, seed=1), rows)
    assert not np.array_equal(snapgen.sample(n, seed=2), rows)


def test_sample_draws_every_value_evenly(snapgen: SearchSpace):
    rows = snapgen.sample(20_000, seed=0)
    for name in ("width_2", "conv_1", "ffn_ratio"):  # choices that no rule touches
        count = len(snapgen.choice(name).values)
        shares = np.bincount(rows[:, snapgen.column[name]], minlength=count) / len(rows)
        assert np.abs(shares - 1 / count).max() < 0.02
    # In random order: what stands early is like what stands late.
    half = len(rows) // 2
    assert np.abs(rows[:half].mean(axis=0) - rows[half:].mean(axis=0)).max() < 0.06


def test_sample_of_a_space_past_64_bits_is_distinct_too(tmp_path: Path):
    space = _grow(tmp_path, 40, 4)
    assert space.size > 2**62
    rows = space.sample(500, seed=0)
    assert len(np.unique(rows, axis=0)) == 500
    assert space.allowed(rows).all()


def test_sample_of_a_mostly_repeating_space_finds_what_there_is(tmp_path: Path):
    # Width 8 leaves every extra choice active, the others none: far fewer networks than rows.
    rule = '[[rules]]\nwhen = { width = [16, 32] }\ninactive = ["extra_0", "extra_1", "extra_2"]\nbecause = "x"'
    space = _grow(tmp_path, 3, 9, rule)
    assert space.size == 36 * 9**3 > 4096
    expected = {candidate.row for candidate in space.enumerate()}
    for n in (space.size, space.size // 3):  # shuffled whole, and drawn: both know when there is no more
        rows = space.sample(n, seed=0)
        assert {tuple(row) for row in rows.tolist()} == expected
        assert len(rows) == len(expected) < n


def test_sample_finds_the_needle_in_a_small_space(tmp_path: Path):
    # One row of 3,600 is allowed: drawing rows would often miss it.
    wrong = {
        "width": [8, 16],
        "depth": [0, 2],
        "kind": ["a"],
        "bits": [4],
        "extra_0": [*range(9)],
        "extra_1": [*range(9)],
    }
    rules = [f"[[rules]]\nwhen = {{ {name} = {values} }}\nforbid = true" for name, values in wrong.items()]
    space = _grow(tmp_path, 2, 10, "".join(f'{rule}\nbecause = "no"\n' for rule in rules))
    for seed in range(20):
        assert space.sample(1, seed=seed).tolist() == [[2, 1, 1, 1, 9, 9]]


def test_enumerate_crosses_its_chunks(tmp_path: Path):
    space = _grow(tmp_path, 3, 15)
    assert space.size == 36 * 15**3 > 65536
    assert len({candidate.row for candidate in space.enumerate()}) == 15 * 15**3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 8, "detph": 0}, "unknown choice 'detph' in space tiny; did you mean 'depth'"),
        ({"width": 9, "depth": 0}, "unknown value of width '9' in space tiny; .*known: 16, 32, 8"),
        ({"width": 8, "depth": 1, "kind": "c"}, "unknown value of kind 'c'"),
        ({"width": 8}, "no value was given for depth$"),
        ({"width": 8, "depth": 1}, "no value was given for kind$"),
        ({"width": 8, "depth": 1, "kind": "b"}, "no value was given for bits$"),
        ({"depth": 2, "kind": "a"}, "no value was given for width$"),  # not "forbidden" because width fell to its first
        ({"width": 16, "depth": 2, "kind": "a"}, "forbids this combination: deep and thin"),
    ],
)
def test_a_wrong_candidate_is_one_sentence(tiny: SearchSpace, values: dict[str, int | str], words: str):
    with pytest.raises(UsageError, match=words):
        tiny.candidate(**values)


def test_rows_and_candidates_are_inverse(snapgen: SearchSpace):
    for row in snapgen.sample(50, seed=3):
        candidate = snapgen.from_row(row)
        assert candidate.row == tuple(row)
        assert snapgen.candidate(**candidate.choices) == candidate
        assert all(type(i) is int for i in candidate.row)
        json.dumps(candidate.choices)


def test_the_key_of_the_published_reference_does_not_change(snapgen: SearchSpace):
    # Studies, caches and reports are stored under these keys: a change here orphans them.
    assert snapgen.reference("snapgen").key == "f928c179af84"
    assert str(snapgen.reference("snapgen")) == "snapgen_unet#f928c179af84"
    code = "from nas.space import load_space; print(load_space('snapgen_unet').reference('snapgen').key)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "f928c179af84"


def test_the_key_does_not_depend_on_the_order_of_choices(tmp_path: Path, tiny: SearchSpace):
    moved = _load(
        tmp_path, TINY.replace("width = [8, 16, 32]\ndepth = [0, 1, 2]", "depth = [0, 1, 2]\nwidth = [8, 16, 32]")
    )
    assert [c.name for c in moved.choices][:2] == ["depth", "width"]
    assert moved.candidate(width=8, depth=0).key == tiny.candidate(width=8, depth=0).key


def test_references_are_candidates_of_their_space(tiny: SearchSpace, snapgen: SearchSpace):
    assert tiny.reference("flat") == tiny.candidate(width=8, depth=0)
    assert snapgen.reference("snapgen").choices["width_2"] == 896
    assert next(r for r in snapgen.references if r.name == "snapgen").params == 383_670_276
    with pytest.raises(UsageError, match="unknown reference 'flta' in space tiny; did you mean 'flat'"):
        tiny.reference("flta")


def test_pipeline_counts_guidance_as_a_second_call(tiny: SearchSpace, snapgen: SearchSpace):
    assert tiny.pipeline.calls == 8
    assert snapgen.pipeline.calls == 4


def test_ordinal_choices_are_the_numeric_ones(tiny: SearchSpace):
    assert {c.name: c.ordinal for c in tiny.choices} == {"width": True, "depth": True, "kind": False, "bits": True}
    assert not load_space("snapgen_unet").choice("self_attention_1").ordinal  # false and true have no order
    assert tiny.choice("bits").index(8) == 1
    with pytest.raises(UsageError, match="unknown choice 'bit' in space tiny; did you mean 'bits'"):
        tiny.choice("bit")


def test_at_resolution_changes_the_latent_and_the_hash_only(tiny: SearchSpace):
    assert tiny.resolution_px == 128
    large = tiny.at_resolution(256)
    assert (large.input.latent_height, large.input.latent_width, large.resolution_px) == (32, 32, 256)
    assert large.hash != tiny.hash
    assert tiny.at_resolution(128).hash == tiny.hash
    candidate, other = tiny.reference("flat"), large.reference("flat")
    assert candidate.key == other.key
    assert candidate != other
    unchanged = {f.name for f in dataclasses.fields(tiny)} - {"input"}
    assert all(getattr(large, name) == getattr(tiny, name) for name in unchanged)


@pytest.mark.parametrize("px", [0, -32, 8, 100])
def test_at_resolution_refuses_what_cannot_be_halved(tiny: SearchSpace, px: int):
    with pytest.raises(UsageError, match=f"resolution {px} px must be a positive multiple of 32 px for space tiny"):
        tiny.at_resolution(px)


def test_the_hash_changes_with_the_files_content(tmp_path: Path, tiny: SearchSpace):
    before = tiny.hash
    assert _load(tmp_path).hash == before
    assert _load(tmp_path, TINY + "\n# a remark").hash != before


def test_spaces_are_found_by_name_and_by_path(tmp_path: Path, tiny: SearchSpace):
    assert "snapgen_unet" in list_spaces()
    assert list_spaces(tmp_path) == ("tiny",)
    assert load_space("tiny", tmp_path).hash == tiny.hash
    assert load_space(str(tmp_path / "tiny.toml")).name == "tiny"


def test_an_unknown_space_offers_the_nearest_and_the_command(tmp_path: Path):
    with pytest.raises(UsageError, match="unknown space 'snapgen-unet'; did you mean 'snapgen_unet'") as caught:
        load_space("snapgen-unet")
    assert caught.value.hint == "nas spaces"
    with pytest.raises(UsageError, match=r"no space file at .*none\.toml"):
        load_space(tmp_path / "none.toml")


def test_spaces_need_no_torch():
    code = "import sys; from nas.space import load_space; load_space('snapgen_unet'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", list_spaces())
def test_every_shipped_space_loads_with_its_references(name: str):
    space = load_space(name)
    assert space.references
    for reference in space.references:
        assert reference.source
        assert space.allowed(np.array([space.reference(reference.name).row])).all()
