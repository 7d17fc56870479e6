"""Table prices equal the sums over each candidate's own blocks; the lowest candidate is found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from nas import families
from nas.cost import network_peak_bytes
from nas.errors import NasError, UsageError
from nas.network import Position, block
from nas.op import FEATURES, features
from nas.pricing import Pricer, changed, lowest
from nas.pricing.slots import Index, grouped, slots
from nas.space import load_space
from nas.space_file import Choice
from nas.trace import block_trace

KEPT = {
    "width_0": 2,
    "width_2": 2,
    "resnets_0": 2,
    "resnets_1": 1,
    "resnets_2": 2,
    "conv_0": 3,
    "conv_1": 1,
    "conv_2": 1,
    "depth_0": 2,
    "depth_1": 2,
    "depth_2": 1,
    "attention": 2,
    "ffn_ratio": 1,
}


@pytest.fixture(scope="module")
def full():
    return load_space("snapgen_unet")


@pytest.fixture(scope="module")
def space(full):
    """The space with fewer values, so that tracing all of it takes a second or two; small maps, one head width."""
    choices = tuple(
        Choice(
            name=c.name,
            values=c.values[: KEPT.get(c.name, 2 if c.name.startswith(("up", "self")) else 1)],
            ordinal=c.ordinal,
        )
        for c in full.choices
    )
    return replace(full, choices=choices, references=()).at_resolution(256)


@pytest.fixture(scope="module")
def pricer(space):
    found = Pricer(space)
    found.prepare()
    return found


def by_hand(candidate):
    blocks = families.network(candidate).blocks
    traces = [block_trace(b) for b in blocks]
    return (
        sum(t.params for t in traces),
        sum(t.macs for t in traces),
        network_peak_bytes(blocks, [t.peak_bytes for t in traces]),
        sum(features(t.ops) for t in traces),
    )


def assert_priced(prices, candidates):
    for i, candidate in enumerate(candidates):
        params, macs, peak, vector = by_hand(candidate)
        assert (prices.params[i], prices.macs[i], prices.peak_activation_bytes[i]) == (params, macs, peak)
        assert prices.weight_bytes[i] == 4 * params
        np.testing.assert_allclose(prices.features[i], vector, rtol=1e-12)


def test_a_short_list_is_the_sum_of_its_blocks(full):
    rows = full.sample(3, seed=3)
    assert_priced(Pricer(full).rows(rows), [full.from_row(row) for row in rows])


def test_a_long_list_is_the_sum_of_its_blocks(space, pricer, monkeypatch):
    monkeypatch.setattr("nas.pricing.pricer._FEW", 10)
    rows = space.sample(200, seed=0)
    assert len(rows) == 200
    assert_priced(pricer.rows(rows), [space.from_row(row) for row in rows])


def smaller(name):
    """A space with every structure it can have, but one width per stage, few depths and small maps."""
    full = load_space(name)
    choices = tuple(
        replace(c, values=c.values[: 1 if c.name.startswith("width") else 2 if "depth" in c.name else None])
        for c in full.choices
    )
    return replace(full, choices=choices, references=()).at_resolution(256)


@pytest.mark.parametrize("name", ["sd_unet", "sdxl_unet"])
def test_stages_middles_and_unequal_sides_are_priced_exactly(name, monkeypatch):
    """Sides with more and fewer units than skips, a middle or none, and in sd_unet three stages or four."""
    space = smaller(name)
    rows = space.sample(150, seed=7)
    candidates = [space.from_row(row) for row in rows]
    if name == "sd_unet":
        assert {candidate.values["stages"] for candidate in candidates} == {3, 4}
    assert {candidate.values["mid"] for candidate in candidates} == {"full", "residual", "none"}
    short = Pricer(space).rows(rows[:20])
    assert_priced(short, candidates[:20])
    monkeypatch.setattr("nas.pricing.pricer._FEW", 10)
    long = Pricer(space).rows(rows)
    assert_priced(long, candidates)
    # A peak that is decided by what waits, and not by the block alone, must be among them.
    alone = [max(block_trace(b).peak_bytes for b in families.network(c).blocks) for c in candidates]
    assert (long.peak_activation_bytes > alone).any()


@pytest.mark.parametrize(("name", "references"), [("sd_unet", 5), ("sdxl_unet", 6)])
def test_published_networks_cost_what_they_are(name, references):
    space = load_space(name)
    assert len(space.references) == references
    for reference in space.references:
        candidate = space.published(reference.name)
        assert Pricer(candidate.space).candidate(candidate).params == reference.params


def test_the_peak_holds_what_waits_wherever_it_waits(space, pricer):
    """Each block in turn is made the one that decides, by giving every other a peak of nothing."""
    rows = space.sample(40, seed=8)
    entries = pricer._entries(rows)
    present = np.stack([slot.block[entries[slot.index]] >= 0 for slot in pricer._slots])
    for slot in range(len(present)):
        own = np.zeros(present.shape, dtype=np.int64)
        own[slot] = 10**12 * present[slot]
        got = pricer._peak(entries, own)
        for i in np.flatnonzero(present[slot]):
            blocks = families.network(space.from_row(rows[i])).blocks
            peaks = [0] * len(blocks)
            peaks[int(present[:slot, i].sum())] = 10**12
            assert got[i] == network_peak_bytes(blocks, peaks)


def test_pieces_make_the_whole(space, pricer, monkeypatch):
    rows = space.sample(100, seed=1)
    few = pricer.rows(rows)
    monkeypatch.setattr("nas.pricing.pricer._FEW", 10)
    pieces = list(pricer.chunks(rows, size=33))
    assert [len(piece.params) for piece in pieces] == [33, 33, 33, 1]
    assert np.array_equal(np.concatenate([piece.peak_activation_bytes for piece in pieces]), few.peak_activation_bytes)
    assert np.array_equal(np.concatenate([piece.macs for piece in pieces]), few.macs)
    np.testing.assert_allclose(np.concatenate([piece.features for piece in pieces]), few.features, rtol=1e-12)


def test_no_rows_have_no_prices(space, pricer):
    prices = pricer.rows(np.zeros((0, len(space.choices)), dtype=int))
    assert prices.features.shape == (0, len(FEATURES))
    assert prices.macs.shape == (0,)


def test_one_candidate_traces_only_its_own_blocks(full, monkeypatch):
    seen = []
    monkeypatch.setattr("nas.pricing.pricer.block_trace", lambda spec: seen.append(spec.signature) or block_trace(spec))
    reference = full.reference("snapgen")
    assert Pricer(full).candidate(reference).params == 383_670_276
    assert set(seen) == {b.signature for b in families.network(reference).blocks}
    assert len(seen) == len(set(seen))


def test_blocks_add_up_to_the_candidate(space, pricer):
    candidate = space.from_row(space.sample(1, seed=5)[0])
    blocks, whole = pricer.blocks(candidate), pricer.candidate(candidate)
    assert [b.spec for b in blocks] == list(families.network(candidate).blocks)
    assert sum(b.cost.params for b in blocks) == whole.params
    assert sum(b.cost.macs for b in blocks) == whole.macs
    summed = np.sum([b.features for b in blocks], axis=0)
    np.testing.assert_allclose(summed, pricer.rows(np.array([candidate.row])).features[0], rtol=1e-12)


def test_precision_halves_bytes_and_leaves_features(space, pricer):
    rows = space.sample(20, seed=2)
    single, half = pricer.rows(rows), Pricer(space, "fp16").rows(rows)
    assert np.array_equal(2 * half.weight_bytes, single.weight_bytes)
    assert np.array_equal(2 * half.peak_activation_bytes, single.peak_activation_bytes)
    assert np.array_equal(half.features, single.features)
    with pytest.raises(UsageError, match="unknown precision"):
        Pricer(space, "fp8")


def test_preparing_reports_every_block_once(space):
    calls = []
    Pricer(space).prepare(lambda done, total: calls.append((done, total)))
    total = len(slots(space)[1])
    assert calls == [(i, total) for i in range(1, total + 1)]


def test_slots_name_the_block_of_every_candidate(space):
    places, specs = slots(space)
    for row in space.sample(30, seed=4):
        at = [place.block[place.index.of(row[None])[0]] for place in places]
        got = [specs[i].signature for i in at if i >= 0]
        assert got == [b.signature for b in families.network(space.from_row(row)).blocks]


def test_the_index_numbers_every_combination_once():
    index = Index(columns=(2, 0), sizes=(3, 4))
    rows = index.rows(choices=3)
    assert rows.shape == (12, 3)
    assert sorted(index.of(rows)) == list(range(12))
    assert index.of(np.array([[3, 9, 1]]))[0] == 1 * 4 + 3
    assert Index(columns=(), sizes=()).of(np.zeros((2, 3), dtype=int)).tolist() == [0, 0]


def test_groups_hold_every_slot_once_in_tables_no_larger_than_a_slots(space):
    indices = [slot.index for slot in slots(space)[0]]
    groups = grouped(indices)
    assert sorted(itertools.chain(*(members for _, members in groups))) == list(range(len(indices)))
    assert all(set(indices[i].columns) <= set(index.columns) for index, members in groups for i in members)
    assert max(index.count for index, _ in groups) == max(index.count for index in indices)
    assert len(groups) < len(indices) / 2


@pytest.mark.parametrize("problem", ["twice", "nowhere"])
def test_a_family_that_breaks_the_contract_is_named(space, monkeypatch, problem):
    def one(values):
        return (block("a", "stem", {"x": (1, 2, 2)}, in_channels=1, out_channels=1),)

    def two(values):
        if problem == "twice":
            return (
                *one(values),
                block("b", "stem", {"x": (1, 2, 2), "skip": (1, 2, 2)}, skip="a", in_channels=1, out_channels=1),
            )
        return (block("b", "stem", {"x": (1, 2, 2), "skip": (1, 2, 2)}, skip="z", in_channels=1, out_channels=1),)

    made = (Position(name="1", depends=(), blocks=one), Position(name="2", depends=(), blocks=two))
    monkeypatch.setattr("nas.families.positions", lambda space: made)
    with pytest.raises(NasError, match="more than one place" if problem == "twice" else "no earlier position makes"):
        slots(space)


def weighted(**weights):
    """A measure: a weighted sum of features."""
    each = np.array([weights.get(name.replace(".", "_"), 0.0) for name in FEATURES])
    return lambda prices: prices.features @ each


def test_the_lowest_is_the_lowest_of_all(space, pricer):
    measure = weighted(conv_macs=2.0, pointwise_macs=1.0, linear_macs=0.5, attention_macs=3.0, norm_bytes=40.0)
    everything = np.array([candidate.row for candidate in space.enumerate()])
    best = measure(pricer.rows(everything)).min()
    row, value = lowest(pricer, measure, samples=20, seed=1)
    assert value == pytest.approx(best, rel=1e-12)
    assert measure(pricer.rows(row[None]))[0] == pytest.approx(value)


def test_the_lowest_obeys_the_rules(space, pricer):
    """Rewarding depth in the up path alone would break a rule of the space."""
    row, _ = lowest(pricer, weighted(conv_macs=1.0, pointwise_macs=1.0, attention_count=-1000.0), samples=50)
    assert space.allowed(row[None]).all()
    assert np.array_equal(space.canonical(row[None])[0], row)


def test_a_reference_is_a_starting_point(full):
    """With one random candidate and nothing to gain elsewhere, the search must still start from the references."""
    pricer, column = Pricer(full), FEATURES.index("linear.macs")
    reference = full.reference("snapgen")
    target = pricer.rows(np.array([reference.row])).features[0, column]
    row, value = lowest(pricer, lambda prices: np.abs(prices.features[:, column] - target), samples=1)
    assert value == 0
    assert tuple(row) == reference.row


def test_a_given_start_is_looked_at(space, pricer):
    everything = np.array([candidate.row for candidate in space.enumerate()])
    start = everything[len(everything) // 2]
    own = pricer.rows(start[None]).params[0]
    row, value = lowest(pricer, lambda prices: (prices.params != own).astype(float), samples=1, starts=[start])
    assert (tuple(row), value) == (tuple(start), 0.0)


def test_single_changes_are_the_allowed_rows_that_differ_in_one_choice(space):
    everything = np.array([candidate.row for candidate in space.enumerate()])
    for row in everything[:: len(everything) // 5]:
        found = {tuple(each) for each in changed(space, row[None])}
        one_away = {tuple(each) for each in everything if (each != row).sum() == 1}
        assert one_away <= found
        assert found <= {tuple(each) for each in everything}
    both = {tuple(each) for each in changed(space, everything[:2])}
    assert both == {tuple(each) for row in everything[:2] for each in changed(space, row[None])}
