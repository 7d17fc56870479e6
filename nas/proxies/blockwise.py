"""Blockwise local distillation: each stage of a candidate learns alone to do what the parent's stage does there.

After DNA (Li et al. 2020, arXiv 1911.13053, section 3: stages trained on the teacher's inputs to match its outputs) and
Puzzle (Bercovich et al. 2024, arXiv 2411.19146, section 4: a library of blocks, each scored by what replacing one block
of the parent does to the output). The embedded teacher has two stages of its own kind, so a parent stands between: the
small copy of the space's largest candidate, distilled from the teacher for `shared_steps`, which `inherit` has too.

A unit (`nas.proxies._units`) is trained for `steps` on the parent's activations. Then it takes the parent's place
there, the rest of the parent as it was, and d is the mean square by which that moves the parent's velocity on held-out
rows. Taking the errors of the places as independent, a candidate of units u is off by E(parent) + sum of d(u), in the
same measure as a student's quality:

    value = 10 log10(P / (E(parent) + sum d(u)))

and its text likewise, of what the caption changes. Units are scored once and kept (`library`): candidates with equal
stages, whatever their other stages, share them, and a search that changes one stage at a time pays for that stage.

What it does not see: how errors meet in the assembled network; samplers at the candidate's width; skips, which are the
parent's own; the width of the time embedding; and that a candidate may learn faster or further than the parent.
A 1x1 adapter behind each unit brings it to the parent's width. It is solved for and then trained with the unit, which
spares a unit of another width the blame for another basis, and gives it a little capacity that the candidate has not.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.bench import Bench, Fidelity, Stop, decibels, one_thread
from nas.build import Network, build
from nas.checkpoint import load_network
from nas.diffusion import FlowDenoiser
from nas.distill import predict
from nas.errors import NasError
from nas.network import BlockSpec, NetworkSpec, short_hash
from nas.objectives import Batch
from nas.paths import atomic_write, cache_dir
from nas.proxies import OnProgress, Score, combined, inherit
from nas.proxies._shared import network_of
from nas.proxies._units import Given, Passage, Socket, Unit, fitted, places, socket
from nas.space import Candidate, SearchSpace

SUMMARY: Final = "each stage learns alone to replace the parent's; scores of stages are shared by candidates"
UNIT: Final = "dB"
DEFAULTS: Final[dict[str, Any]] = {"steps": 8, "shared_steps": 200, "held_rows": 32, "lr": 6e-3}

_VERSION: Final = 1  # raise it when what is kept changes meaning
_CONDITIONS: Final[tuple[str, ...]] = ("x", "temb", "text")
_FITTED_ON: Final = 4  # batches from which adapters are solved for


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What replacing one stage of the parent costs.

    Attributes:
        local_db: -10 log10 of the unit's error, as a share of the variance of the parent's output there.
        output: mean square by which the parent's velocity moves.
        text: mean square by which what the caption changes of it moves.
    """

    local_db: float
    output: float
    text: float


def prepare(space: SearchSpace, bench: Bench, on_progress: OnProgress | None = None) -> None:
    """Trains the parent, the same as of the proxy `inherit`, one per seed of the settings, unless it is there.

    Raises:
        NasError: the space has no UNets; no shared steps; training diverged.
    """
    places(bench.spec(space.from_row(space.sample(1, 0)[0])))  # refuses what is no UNet before training it
    inherit.prepare(space, bench, on_progress)


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """The candidate assembled from its units' scores, of which those not in the library are trained.

    `stop` is not asked: there is no curve of the whole.

    Raises:
        NasError: the candidate cannot be scaled down or is no UNet; as of `prepare`.
    """
    spec = bench.spec(candidate)
    places(spec)
    inherit.prepare(candidate.space, bench)
    with one_thread():
        paths = {seed: inherit.parent_path(candidate.space, bench, seed) for seed in bench.settings.seeds}
        parents = {seed: scaffold_of(bench, path) for seed, path in paths.items()}
        began = time.perf_counter()
        found = [parent.assembled(library(spec, parent, seed)) for seed, parent in parents.items()]
    params = sum(each.numel() for each in build(spec, "meta").parameters())
    seconds = time.perf_counter() - began
    return combined([f.quality_db for f in found], [f.text_db for f in found], params=params, seconds=seconds)


# ------------------------------------------------------------------------------------------------------ the library


def library(spec: NetworkSpec, scaffold: Scaffold, seed: int) -> dict[str, Loss]:
    """The losses of a network's units by place; those that are not kept yet are worked out, and kept.

    Raises:
        NasError: the network is no UNet, or has a place that the parent has not.
    """
    units = places(spec)
    if strange := set(units) - set(scaffold.sockets):
        raise NasError(f"network {spec.name} has stages {', '.join(sorted(strange))} that its parent has not")
    found = {}
    for place, at in scaffold.sockets.items():
        blocks = fitted(units.get(place, ()), at)
        path = unit_path(blocks, at, scaffold, seed)
        found[place] = _kept(path, functools.partial(learnt, blocks, at, scaffold, seed))
    return found


def unit_path(blocks: Sequence[tuple[BlockSpec, int | None]], at: Socket, scaffold: Scaffold, seed: int) -> Path:
    """The file of one unit's loss: another block, place, parent, teacher or setting has another."""
    wanted = [[block.signature, skip] for block, skip in blocks]
    identity = [_VERSION, wanted, astuple(at), scaffold.key, seed]
    return cache_dir("blocks") / f"{short_hash(json.dumps(identity, sort_keys=True))}.json"


def _kept(path: Path, make: Callable[[], Loss]) -> Loss:
    if path.is_file():
        return Loss(**json.loads(path.read_text()))
    made = make()
    # Two workers may work out one unit at the same time: to the same numbers, and the file is replaced whole. A disk
    # that is full costs only that the next one works it out again.
    with suppress(NasError):
        atomic_write(path, json.dumps(asdict(made)))
    return made


def learnt(blocks: Sequence[tuple[BlockSpec, int | None]], at: Socket, scaffold: Scaffold, seed: int) -> Loss:
    """Trains a unit from random weights, and puts it in the parent's place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unit = Unit(blocks, at)
    return scaffold.replaced(trained(unit, at, scaffold), at)


def trained(unit: Unit, at: Socket, scaffold: Scaffold) -> Unit:
    """The unit after the settings' steps on the parent's activations; in place.

    The loss is that of the bench's students, of the place's output: its mean square, and with the text weight that of
    what the caption changes, both as shares of the variance of the parent's output.
    """
    settings, lessons = scaffold.bench.settings, scaffold.lessons[at.place]
    unit.fit_adapter(lessons[:_FITTED_ON])
    schedule = settings.schedule(settings.lr) if settings.steps else None
    variance = _variance(lessons[0].output)
    optimiser = torch.optim.AdamW(unit.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.steps):
        assert schedule is not None
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate(step)
        given = lessons[step % len(lessons)]
        error = unit(given) - given.output
        loss = error.square().mean() / variance
        if scaffold.texts:
            loss = loss + settings.text_weight * _change(error).square().mean() / variance
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unit.parameters(), schedule.clip)
        optimiser.step()
    return unit


def _variance(output: Tensor) -> float:
    """The mean square of [B, C, H, W] about each channel's mean."""
    return max(float((output - output.mean((0, 2, 3), keepdim=True)).square().mean()), 1e-12)


def _change(both: Tensor) -> Tensor:
    """What the caption changes [B, ...], of [2 B, ...] with captions first."""
    said, null = both.chunk(2)
    return said - null


# ------------------------------------------------------------------------------------------------------- the parent


class Scaffold:
    """The parent with what it does in every place, for units to learn from and to be judged in.

    Args:
        bench: teacher and settings.
        parent: trained.
        key: of the parent, in the library.
    """

    def __init__(self, bench: Bench, parent: FlowDenoiser, key: str) -> None:
        self.bench, self.parent = bench, parent.eval().requires_grad_(False)
        settings = {name: value for name, value in asdict(bench.settings).items() if name not in ("proxy", "seeds")}
        self.key = [key, bench.digest, settings]
        self.network: Network = network_of(parent)
        self.spec = self.network.spec
        self.texts = bench.settings.text_weight > 0
        found = places(self.spec)
        self.sockets = {place: socket(place, blocks) for place, blocks in found.items()}
        self._spans = {place: _span(self.spec, blocks) for place, blocks in found.items()}

    @functools.cached_property
    def lessons(self) -> dict[str, list[Given]]:
        """What every place is given by each training batch; with captions and then without, if text has a weight."""
        count = max(self.bench.settings.steps, _FITTED_ON)
        batches = [self.bench.data.batch(step) for step in range(count)]
        found: dict[str, list[Given]] = {place: [] for place in self.sockets}
        for batch in batches:
            passages, _ = self.walked(batch, with_null=self.texts)
            for place, (given, _) in passages.items():
                found[place].append(given)
        return found

    @functools.cached_property
    def _held(self) -> tuple[dict[str, tuple[Given, Passage]], Tensor, Batch]:
        batch = self.bench.held.batch(slice(None))
        return *self.walked(batch, with_null=True), batch

    @functools.cached_property
    def fidelity(self) -> Fidelity:
        """The parent's own."""
        return self.bench.judge(self.parent)

    @torch.no_grad()
    def replaced(self, unit: Unit, at: Socket) -> Loss:
        """What a unit costs in its place on the held-out rows."""
        passages, whole, batch = self._held
        given, passage = passages[at.place]
        output, going = unit(given), passage.copy()
        going.tensors["x"] = going.kept[at.last] = output
        behind = self.spec.blocks[self._spans[at.place][1] :]
        moved = going.advance(self.network, behind) - whole
        scale = self.parent.preconditioner.output_scale(*batch.point())
        error = moved * scale.repeat(2, 1, 1, 1)
        local = float((output - given.output).square().mean()) / _variance(given.output)
        return Loss(
            local_db=decibels(local),
            output=float(error.chunk(2)[0].square().mean()),
            text=float(_change(error).square().mean()),
        )

    def assembled(self, losses: dict[str, Loss]) -> Fidelity:
        """What a network of these units comes to, if their errors are independent of each other and of the parent's."""
        _, _, batch = self._held
        teacher = batch.teacher
        assert teacher is not None  # cached rows bring it
        assert teacher.null_velocity is not None
        skip = self.parent.preconditioner.skip(*batch.point())
        residual = float((teacher.velocity - skip).square().mean())
        wanted = float((teacher.velocity - teacher.null_velocity).square().mean())
        error = self.fidelity.loss + sum(each.output for each in losses.values())
        missed = wanted * self.fidelity.text_error**2 + sum(each.text for each in losses.values())
        return Fidelity(quality_db=10 * math.log10(residual / error), text_error=math.sqrt(missed / wanted), loss=error)

    @torch.no_grad()
    def walked(self, batch: Batch, *, with_null: bool) -> tuple[dict[str, tuple[Given, Passage]], Tensor]:
        """What every place is given, with the call halted behind it, and the network's output."""
        passage = Passage(tensors=self._inputs(batch, with_null), kept={})
        found, done = {}, 0
        for place, (first, last) in self._spans.items():
            passage.advance(self.network, self.spec.blocks[done:first])
            # Contiguous: torch 2.13's GroupNorm crashes in the backward pass where a channels-last input, as
            # convolutions behind a transformer give it, needs no gradient.
            seen = passage.tensors
            tensors: dict[str, Tensor] = {name: seen[name].contiguous() for name in _CONDITIONS if name in seen}
            own = self.spec.blocks[first:last]
            skips = tuple(passage.kept[block.skip].contiguous() for block in own if block.skip is not None)
            output = passage.advance(self.network, own)
            found[place] = Given(tensors=tensors, skips=skips, output=output), passage.copy()
            done = last
        return found, passage.advance(self.network, self.spec.blocks[done:])

    def _inputs(self, batch: Batch, with_null: bool) -> dict[str, Tensor]:
        """What the parent's network is called with."""
        noting = _Noting()
        predict(FlowDenoiser(noting, self.parent.preconditioner, patch=self.parent.patch), batch, with_null=with_null)
        return noting.seen


class _Noting(nn.Module):
    """Stands for a network, and keeps what it was called with by the names of blocks' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, **more: Tensor) -> Tensor:
        self.seen = {"x": sample, "timestep": timestep, "text": text, **more}
        return sample


def _span(spec: NetworkSpec, blocks: Sequence[BlockSpec]) -> tuple[int, int]:
    """The first of some neighbouring blocks, and the first behind them."""
    first = spec.blocks.index(blocks[0])
    return first, first + len(blocks)


@functools.lru_cache(maxsize=4)
def scaffold_of(bench: Bench, path: Path) -> Scaffold:
    """The scaffold of a parent's file, kept in this process: its activations are what takes long."""
    parent = load_network(path)
    denoiser = bench.student(parent.spec, seed=0)
    network_of(denoiser).load_state_dict(parent.state_dict())
    return Scaffold(bench, denoiser, path.stem)
