"""Blockwise distillation: units in the parent's place, their losses, and the library that candidates share."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_lesson import candidate, write_teacher
from torch import nn

from nas import targets
from nas.bench import Bench, ProxySettings
from nas.distill import predict
from nas.errors import NasError
from nas.proxies import blockwise, inherit
from nas.proxies._units import Unit, fitted, places, socket
from nas.proxies.blockwise import Loss, Scaffold
from nas.space import load_space

TINY = ProxySettings(
    proxy="blockwise", width_divisor=32, norm_groups=2, steps=2, shared_steps=1, batch=4, held_rows=4, lr=6e-3
)
PLACES = ("stem", "down.0", "down.1", "down.2", "mid", "up.2", "up.1", "up.0")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE", str(folder))
        # A parent of the smallest kind, so that its training takes no time.
        patch.setattr(inherit, "largest", lambda space, bench: candidate(resnets_0=2))
        targets._load.cache_clear()
        yield folder
    targets._load.cache_clear()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Bench:
    return Bench(write_teacher(tmp_path_factory.mktemp("teacher")), TINY)


@pytest.fixture(scope="module")
def scaffold(bench: Bench) -> Scaffold:
    space = load_space("snapgen_unet")
    blockwise.prepare(space, bench)
    return blockwise.scaffold_of(bench, inherit.parent_path(space, bench, 0))


def unit_of(scaffold: Scaffold, place: str, seed: int = 0) -> Unit:
    """The parent's own unit, with weights of its own."""
    torch.manual_seed(seed)
    at = scaffold.sockets[place]
    return Unit(fitted(places(scaffold.spec)[place], at), at)


# Units


def test_a_network_is_cut_into_its_places(bench: Bench) -> None:
    spec = bench.spec(candidate(depth_0=1))
    found = places(spec)
    assert tuple(found) == PLACES
    assert [block.name for block in found["up.0"]][-1] == "head"
    assert [block.name for block in found["down.0"]] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0"]
    rest = {block.kind for block in spec.blocks} - {block.kind for unit in found.values() for block in unit}
    assert rest == {"time_embedding", "downsample", "upsample"}
    dit = load_space("dit")
    with pytest.raises(NasError, match="is no UNet"):
        blockwise.score(dit.reference(dit.references[0].name), replace(bench, settings=replace(TINY, width_divisor=16)))


def test_a_unit_takes_what_the_parent_gives(bench: Bench) -> None:
    parent = places(bench.spec(candidate(width_0=256, width_1=512, resnets_0=3)))
    own = places(bench.spec(candidate(width_0=128, width_1=256)))
    at = socket("up.0", parent["up.0"])
    (first, skip), *middle, (head, none) = fitted(own["up.0"], at)
    # From stage 1 come the parent's 16 channels and, as the first skip, its 8 of stage 0; the time embedding is 4 x 8.
    assert first.input("x")[0] == 16
    assert first.input("skip")[0] == 8
    assert first.setting("in_channels") == 24
    assert first.setting("out_channels") == 4
    assert first.setting("time_width") == 32
    # Inside, the candidate's own 4.
    assert [block.input("x")[0] for block, _ in middle] == [4] * len(middle)
    assert head.setting("in_channels") == 4
    assert (skip, none, at.out) == (0, None, 48)
    # Of four skips a unit that reads two takes the first and the last; one that reads more takes some twice.
    assert [number for _, number in fitted(own["up.0"], at)] == [0, 3, None]
    more = places(bench.spec(candidate(resnets_0=3)))["up.0"]
    assert [number for _, number in fitted(more, socket("up.0", own["up.0"]))] == [0, 0, 1, 1, None]


def test_the_parents_own_unit_costs_nothing(scaffold: Scaffold) -> None:
    for place in ("stem", "mid", "up.1"):
        unit, at = unit_of(scaffold, place), scaffold.sockets[place]
        random = scaffold.replaced(unit, at)
        for block, spec in zip(unit.blocks, places(scaffold.spec)[place], strict=True):
            block.load_state_dict(scaffold.network.get_submodule(spec.name).state_dict())
        unit.fit_adapter(scaffold.lessons[place])
        own = scaffold.replaced(unit, at)
        assert own.local_db > random.local_db + 20
        assert own.output < random.output / 100


def test_training_lessens_the_error(scaffold: Scaffold) -> None:
    at = scaffold.sockets["up.0"]
    started, taught = unit_of(scaffold, "up.0"), unit_of(scaffold, "up.0")
    longer = Scaffold(replace(scaffold.bench, settings=replace(TINY, steps=12)), scaffold.parent, "longer")
    shorter = Scaffold(replace(scaffold.bench, settings=replace(TINY, steps=0)), scaffold.parent, "shorter")

    def error(unit: Unit) -> float:
        with torch.no_grad():
            rows = longer.lessons["up.0"]
            return sum(float((unit(each) - each.output).square().mean()) for each in rows)

    blockwise.trained(started, at, shorter)  # only its adapter is solved for
    blockwise.trained(taught, at, longer)
    assert error(taught) < 0.8 * error(started) < 0.8 * error(unit_of(scaffold, "up.0"))


@pytest.mark.parametrize("place", ["stem", "down.1", "up.0"])
def test_a_loss_is_what_replacing_the_stage_does(scaffold: Scaffold, place: str) -> None:
    """Against a whole call of the parent in which one block's output is exchanged."""
    unit, at = unit_of(scaffold, place), scaffold.sockets[place]
    batch = scaffold.bench.held.batch(slice(None))
    given, _ = scaffold.walked(batch, with_null=True)[0][place]

    def exchange(module: nn.Module, arguments: object, output: object) -> torch.Tensor:
        return unit(given)

    with torch.no_grad():
        plain = predict(scaffold.parent, batch, with_null=True)
        handle = scaffold.network.get_submodule(at.last).register_forward_hook(exchange)
        exchanged = predict(scaffold.parent, batch, with_null=True)
        handle.remove()
    loss = scaffold.replaced(unit, at)
    assert plain.null_velocity is not None
    assert exchanged.null_velocity is not None
    moved = exchanged.velocity - plain.velocity
    assert loss.output == pytest.approx(float(moved.square().mean()), rel=1e-3)
    change = moved - (exchanged.null_velocity - plain.null_velocity)
    assert loss.text == pytest.approx(float(change.square().mean()), rel=1e-2, abs=1e-10)
    assert loss.output > 0


def test_errors_of_stages_add_up(scaffold: Scaffold) -> None:
    none = dict.fromkeys(PLACES, Loss(local_db=0.0, output=0.0, text=0.0))
    parent = scaffold.bench.judge(scaffold.parent)
    whole = scaffold.assembled(none)
    assert whole.quality_db == pytest.approx(parent.quality_db, abs=1e-3)
    assert whole.text_error == pytest.approx(parent.text_error, rel=1e-3)
    worse = {**none, "mid": Loss(local_db=0.0, output=2 * parent.loss, text=0.0)}
    worse["up.0"] = Loss(local_db=0.0, output=parent.loss, text=0.0)
    found = scaffold.assembled(worse)
    assert found.quality_db == pytest.approx(parent.quality_db - 10 * math.log10(4), abs=1e-3)
    assert found.text_error == pytest.approx(whole.text_error)


# The library


def files(cache: Path) -> set[str]:
    return {path.name for path in (cache / "blocks").glob("*.json")}


def test_candidates_share_the_library(
    scaffold: Scaffold, bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(cache) if (cache / "blocks").is_dir() else set()
    first = blockwise.score(candidate(), bench)
    own = files(cache) - before
    assert len(own) == len(PLACES)
    assert first.params == sum(p.numel() for p in bench.student(bench.spec(candidate()), 0).parameters())
    assert first.text is not None
    other = blockwise.score(candidate(resnets_1=2), bench)
    assert len(files(cache) - before - own) == 2  # stage 1 on the way down and up
    assert other.value != first.value
    assert set(json.loads((cache / "blocks" / min(own)).read_text())) == {"local_db", "output", "text"}

    def learns(*given: object) -> Loss:
        raise AssertionError("a unit that is in the library is trained again")

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "learnt", learns)
        again = blockwise.score(*pickle.loads(pickle.dumps((candidate(), bench))))
        with pytest.raises(AssertionError, match="trained again"):
            blockwise.score(candidate(), replace(bench, settings=replace(TINY, steps=1)))
    assert replace(again, seconds=first.seconds) == first


def test_a_unit_worked_out_again_is_the_same(
    scaffold: Scaffold, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = scaffold.sockets["mid"]
    blocks = fitted(places(bench.spec(candidate()))["mid"], at)
    first = blockwise.learnt(blocks, at, scaffold, 0)
    torch.manual_seed(99)
    assert blockwise.learnt(blocks, at, scaffold, 0) == first
    assert blockwise.learnt(blocks, at, scaffold, 1) != first

    def full(path: Path, content: str) -> Path:
        raise NasError(f"cannot write {path}: No space left on device")

    monkeypatch.setenv("NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(blockwise, "atomic_write", full)
    spec = bench.spec(candidate())
    assert blockwise.library(spec, scaffold, 0)["mid"] == first  # without the library, only slower
    assert not files(tmp_path)


def test_a_place_that_is_left_out_is_an_adapter(scaffold: Scaffold) -> None:
    at = scaffold.sockets["mid"]
    unit = Unit(fitted((), at), at)
    given = scaffold.lessons["mid"][0]
    assert torch.equal(unit.before(given), given.tensors["x"])
    assert unit(given).shape == given.output.shape
    strange = replace(scaffold.spec, blocks=tuple(b for b in scaffold.spec.blocks if "mid_block" not in b.name))
    lesser = Scaffold(scaffold.bench, scaffold.parent, "lesser")
    del lesser.sockets["mid"]
    with pytest.raises(NasError, match="has stages mid that its parent has not"):
        blockwise.library(scaffold.spec, lesser, 0)
    assert "mid" not in places(strange)
