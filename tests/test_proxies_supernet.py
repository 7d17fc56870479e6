"""The super-network: which slice is whose, that only slices learn, and that it is trained once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_lesson import write_teacher
from tiny_space import write_space
from torch import nn

from nas import proxies, targets
from nas.bench import Bench, ProxySettings, one_thread
from nas.build import Network, build
from nas.distill import train
from nas.errors import NasError
from nas.proxies import _oneshot, _shared, supernet
from nas.proxies._oneshot import SuperNetwork
from nas.proxies._shared import largest, network_of, once
from nas.proxies._store import Layout, Slot, _places, flat, put, slots
from nas.space import Candidate, SearchSpace, load_space

SETTINGS = ProxySettings(
    proxy="supernet", width_divisor=32, norm_groups=2, steps=0, shared_steps=6, batch=4, held_rows=16, lr=3e-3
)
SMALL: dict[str, bool | int | str] = {
    "width_1": 256,
    "resnets_1": 1,
    "conv_1": "full",
    "depth_2": 1,
    "attention": "mqa",
}
LARGE: dict[str, bool | int | str] = {
    "width_1": 384,
    "resnets_1": 2,
    "conv_1": "full",
    "depth_2": 2,
    "attention": "mha",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE", str(folder))
        targets._load.cache_clear()
        yield folder
        targets._load.cache_clear()


@pytest.fixture(scope="module")
def bench(teacher: str) -> Bench:
    return Bench(teacher, SETTINGS)


def network(candidate: Candidate, bench: Bench, seed: int = 0) -> Network:
    return network_of(bench.student(bench.spec(candidate), seed))


def stepped(found: SuperNetwork, candidate: Candidate, bench: Bench, seed: int = 0) -> Network:
    """One step of a candidate; its network as the step left it, before the update."""
    student = bench.student(bench.spec(candidate), seed)
    found.train(student, bench, _shared.training(bench).schedule(SETTINGS.lr))
    return network_of(student)


def tensor(found: SuperNetwork, slot: Slot) -> torch.Tensor:
    """The whole tensor of the store that a slot is a slice of."""
    layout = found.layout
    start, shape = layout.offsets[slot.key], layout.forms[slot.key].shape
    return found.rows["weight"][start : start + int(torch.tensor(shape).prod())].reshape(shape)


# Slices


def test_the_largest_candidate_has_exactly_the_stores_tensors(space: SearchSpace, bench: Bench) -> None:
    found = SuperNetwork()
    for values in (SMALL, LARGE, {**SMALL, "attention": "mha"}):
        stepped(found, space.candidate(**values), bench)
    # Of full convolutions, this is all.
    assert found.trained.min() > 0
    whole = network(space.candidate(**LARGE), bench, seed=5)
    assert found.weights().load(whole) == 1.0
    found.rows["average"] = found.rows["weight"]
    found.weights().load(whole)
    for slot in slots(whole):
        assert torch.equal(slot.parameter.squeeze(), tensor(found, slot).squeeze()), slot.key
    assert sum(slot.parameter.numel() for slot in slots(whole)) == found.layout.size


def test_a_narrow_candidate_has_leading_channels_of_each_input(space: SearchSpace, bench: Bench) -> None:
    found = SuperNetwork()
    stepped(found, space.candidate(**LARGE), bench)
    found.rows["average"] = found.rows["weight"]
    narrow, wide = network(space.candidate(**SMALL), bench), network(space.candidate(**LARGE), bench)
    for each in (narrow, wide):
        found.weights().load(each)
    # Stage 1, counted from the inside, takes x of stage 2 (16 channels in both) and a skip of its own 8 or 12.
    ours = narrow.get_submodule("up_blocks.1.resnets.0.conv1").weight
    theirs = wide.get_submodule("up_blocks.1.resnets.0.conv1").weight
    assert ours.shape[:2] == (8, 16 + 8)
    assert theirs.shape[:2] == (12, 16 + 12)
    assert torch.equal(ours, torch.cat([theirs[:8, :16], theirs[:8, 16:24]], dim=1))
    # The last unit is the last unit, of however many: x of its own stage, and the skip of stage 0.
    ours = narrow.get_submodule("up_blocks.1.resnets.1.conv1").weight
    theirs = wide.get_submodule("up_blocks.1.resnets.2.conv1").weight
    assert ours.shape[:2] == (8, 8 + 4)
    assert torch.equal(ours, torch.cat([theirs[:8, :8], theirs[:8, 12:16]], dim=1))
    # One key head is the first of many.
    heads = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert torch.equal(narrow.get_submodule(heads).weight, wide.get_submodule(heads).weight[:2])


@pytest.mark.parametrize("name", ["snapgen_unet", "sd_unet", "sdxl_unet"])
def test_what_is_put_in_comes_out(name: str, bench: Bench) -> None:
    shipped, layout, nets = load_space(name), Layout({}), []
    small = replace(bench, settings=replace(SETTINGS, width_divisor=16, norm_groups=4))
    for row in shipped.sample(3, 1):
        nets.append(slots(build(small.spec(shipped.from_row(row)), "meta")))
        layout = layout.holding(nets[-1])
    for wanted in nets:
        index = layout.index(wanted)
        assert layout.holding(wanted) is layout
        assert int(index.min()) >= 0
        assert int(index.max()) < layout.size
        assert index.unique().numel() == index.numel()  # so that no two elements are given back to one place
        row, values = torch.zeros(layout.size), torch.randn(index.numel())
        row[index] = values
        assert torch.equal(row[index], values)


def test_a_grown_store_keeps_what_it_had(space: SearchSpace, bench: Bench) -> None:
    small, large = (slots(network(space.candidate(**values), bench)) for values in (SMALL, LARGE))
    layout = Layout({}).holding(small)
    row = torch.randn(layout.size)
    larger = layout.holding(large)
    assert larger.size > layout.size
    grown = torch.zeros(larger.size)
    grown[layout.moved(larger)] = row
    assert torch.equal(grown[larger.index(small)], row[layout.index(small)])
    assert bool((layout.index(large) < 0).any())
    again = Layout.from_json(larger.to_json())
    assert again.forms == larger.forms
    assert torch.equal(again.index(small), larger.index(small))


def test_places_are_counted_from_the_outside_and_last_units_are_last(bench: Bench) -> None:
    shipped = load_space("sd_unet")
    values = dict(shipped.reference("sd-v1.5").choices)
    small = replace(bench, settings=replace(SETTINGS, width_divisor=16, norm_groups=4))
    four = _places(small.spec(shipped.candidate(**values)))
    three = _places(small.spec(shipped.candidate(**{**values, "stages": 3, "up_resnets_0": 1})))
    assert four["up_blocks.3.resnets.1"] == "up_blocks.15.resnets.1"
    assert three["up_blocks.2.resnets.0"] == four["up_blocks.3.resnets.2"] == "up_blocks.15.resnets.15"
    assert three["down_blocks.1.resnets.0"] == four["down_blocks.1.resnets.0"] == "down_blocks.1.resnets.0"
    assert len(set(four.values())) == len(four)


def test_putting_shares_memory(space: SearchSpace, bench: Bench) -> None:
    wanted = slots(network(space.candidate(**SMALL), bench))
    row = torch.randn(flat(wanted).numel())
    put(wanted, row)
    assert torch.equal(flat(wanted), row)
    row.zero_()
    assert not bool(flat(wanted).any())


# Training


def test_training_one_candidate_moves_its_slices_and_nothing_else(space: SearchSpace, bench: Bench) -> None:
    found = SuperNetwork()
    stepped(found, space.candidate(**LARGE), bench)
    before = {name: row.clone() for name, row in found.rows.items()}
    wanted = slots(stepped(found, space.candidate(**SMALL), bench))
    inside = torch.zeros(found.layout.size, dtype=torch.bool)
    inside[found.layout.index(wanted)] = True
    assert torch.equal(found.trained, 1 + inside.long())
    for name, row in found.rows.items():
        assert torch.equal(row[~inside], before[name][~inside]), name
    assert float((found.rows["weight"] != before["weight"])[inside].double().mean()) > 0.9


def test_one_candidate_alone_learns_as_in_the_training_loop(space: SearchSpace, bench: Bench) -> None:
    chosen = space.candidate(**SMALL)
    settings = _shared.training(bench)
    schedule = settings.schedule(settings.lr)
    found = SuperNetwork()
    for seed in range(settings.steps):  # weights of the first step alone count
        found.train(bench.student(bench.spec(chosen), seed), bench, schedule)
    plain = train(bench.student(bench.spec(chosen), 0), bench.data, settings.objectives, schedule).average
    ours = network(chosen, bench, seed=9)
    found.weights().load(ours)
    start = network(chosen, bench, seed=0)
    for slot, wanted, first in zip(slots(ours), slots(network_of(plain)), slots(start), strict=True):
        torch.testing.assert_close(slot.parameter, wanted.parameter, rtol=1e-3, atol=1e-4)
        moved = (wanted.parameter - first.parameter).norm()
        assert (slot.parameter - wanted.parameter).norm() <= 0.02 * moved + 1e-6, slot.key


def test_elements_start_as_the_network_that_first_has_them(space: SearchSpace, bench: Bench) -> None:
    found, chosen = SuperNetwork(), space.candidate(**SMALL)
    frozen = replace(bench, settings=replace(SETTINGS, lr=0.0))
    for seed in (3, 4):
        student = bench.student(bench.spec(chosen), seed)
        nn.init.zeros_(network_of(student).get_submodule("head.conv_out").weight)
        found.train(student, frozen, _shared.training(frozen).schedule(0.0))
    ours, first = network(chosen, bench, seed=8), network(chosen, bench, seed=3)
    found.weights().load(ours)
    assert not bool(ours.get_submodule("head.conv_out").weight.any())
    assert torch.equal(ours.get_submodule("conv_in").weight, first.get_submodule("conv_in").weight)


def test_what_was_never_trained_keeps_the_networks_own_weights(space: SearchSpace, bench: Bench) -> None:
    found = SuperNetwork()
    stepped(found, space.candidate(**SMALL), bench)
    other = space.candidate(**{**SMALL, "conv_1": "separable-2"})
    ours, own = network(other, bench), network(other, bench)
    share = found.weights().load(ours)
    assert 0.3 < share < 1
    conv = "down_blocks.1.resnets.0.conv1.pointwise"
    assert torch.equal(ours.get_submodule(conv).weight, own.get_submodule(conv).weight)
    assert not torch.equal(ours.get_submodule("conv_in").weight, own.get_submodule("conv_in").weight)


def test_a_diverged_run_is_an_error(space: SearchSpace, bench: Bench) -> None:
    wild = replace(bench, settings=replace(SETTINGS, lr=1e30))
    with pytest.raises(NasError, match=r"diverged: a loss or gradient is not finite at step [2-6] of 6"):
        supernet.prepare(space, wild)


# Once, and to the end


def test_a_killed_run_ends_in_the_same_bits(space: SearchSpace, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_oneshot, "CHECKPOINT_EVERY", 2)
    path, said = supernet.store_path(space, bench, 0), []
    supernet.prepare(space, bench, lambda done, total: said.append((done, total)))
    assert said == [(step, 6) for step in range(1, 7)]
    whole = path.read_bytes()
    path.unlink()
    said.clear()

    def killed(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supernet.prepare(space, bench, killed)
    assert not path.exists()
    supernet.prepare(space, bench, lambda done, total: said.append((done, total)))
    assert said == [(5, 6), (6, 6)]  # from the checkpoint of step 4
    assert path.read_bytes() == whole
    assert sorted(p.suffix for p in path.parent.glob(f"{path.stem}*")) in ([".lock", ".safetensors"], [".safetensors"])
    supernet.prepare(space, bench, lambda done, total: pytest.fail("trained twice"))


def test_two_that_want_it_make_it_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> None:
        made.append(1)
        time.sleep(0.2)
        (tmp_path / "shared.safetensors").write_bytes(b"it")

    both = [threading.Thread(target=once, args=(tmp_path / "shared.safetensors", make)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert made == [1]


def test_another_teacher_space_seed_or_recipe_is_another_file(space: SearchSpace, bench: Bench, tmp_path: Path) -> None:
    def path(**changes: object) -> Path:
        return supernet.store_path(space, replace(bench, settings=replace(SETTINGS, **changes)), 0)  # type: ignore[arg-type]

    others = [
        supernet.store_path(space, Bench(write_teacher(tmp_path, seed=1), SETTINGS), 0),
        supernet.store_path(write_space(tmp_path, depth_2=[1]), bench, 0),
        supernet.store_path(space, bench, 1),
        path(shared_steps=7),
        path(lr=1e-3),
        path(text_weight=1.0),
        path(data_seed=1),
    ]
    assert len({path(), *others}) == 8
    assert path(steps=9, held_rows=8, seeds=(3,)) == path()


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(NasError, match="cannot be read") as found:
        _oneshot.read(tmp_path / "x.safetensors")
    assert found.value.hint == f"rm {tmp_path / 'x.safetensors'}"


# Scores


def test_a_slice_of_a_trained_store_beats_random_weights(space: SearchSpace, teacher: str) -> None:
    bench = Bench(teacher, replace(SETTINGS, shared_steps=30))
    for values in (SMALL, {**LARGE, "conv_1": "separable-2"}):
        chosen = space.candidate(**values)
        found, again = supernet.score(chosen, bench), supernet.score(chosen, bench)
        with one_thread():
            untrained = bench.judge(bench.student(bench.spec(chosen), 0).eval())
        assert found.value > untrained.quality_db + 1
        assert (found.value, found.text) == (again.value, again.text)
        recovered = supernet.score(chosen, replace(bench, settings=replace(bench.settings, steps=4)))
        assert recovered.value != found.value
        assert recovered.curve[-1].step == 4


def test_the_largest_is_the_largest(space: SearchSpace, bench: Bench) -> None:
    def params(candidate: Candidate) -> int:
        return sum(each.numel() for each in build(bench.spec(candidate), "meta").parameters())

    assert params(largest(space, bench)) == max(map(params, space.enumerate()))


def test_it_needs_shared_steps(space: SearchSpace, bench: Bench) -> None:
    with pytest.raises(NasError, match="needs shared_steps of 1 or more, got 0"):
        supernet.prepare(space, replace(bench, settings=replace(SETTINGS, shared_steps=0)))
    assert proxies.settings_of("supernet").shared_steps > 0
