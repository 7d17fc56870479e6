"""Training a super-network: at every step one candidate, drawn at random, is a slice of it and learns.

Guo et al. 2020 (single path one-shot, arXiv 1904.00420, equation 7: uniform sampling of one path per step); sliced
widths and depths as in Cai et al. 2020 (once-for-all, arXiv 1908.09791). AdamW's moments are sliced like the weights.
They and the average are corrected by how often an element itself was trained, so that a slice which few candidates
have learns as a network's first steps do, and no element moves that the candidate of a step has not.
Legend: P parameters of a candidate, S numbers of the store.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nas.bench import Bench, learning_rate, one_thread
from nas.diffusion import FlowDenoiser
from nas.distill import Engine, TrainSettings, answer, predict
from nas.errors import NasError
from nas.objectives import is_game, total
from nas.paths import atomic_write
from nas.proxies import OnProgress
from nas.proxies._shared import CHECKPOINT_EVERY, first_small, largest, network_of, training
from nas.proxies._store import Layout, Weights, flat, put, slots
from nas.space import SearchSpace

_ROWS = ("weight", "average", "mean", "square")  # float32 [S] each
_STREAM = 7_919  # added to the seed, so that no store is trained on the candidates that a search samples first


class SuperNetwork:
    """A store in training.

    Attributes:
        layout: of its rows.
        step: steps done.
        rows: by name [S]: the weights, their average, the moments of AdamW.
        trained: how often each element was trained, int64 [S].
    """

    def __init__(self) -> None:
        self.layout = Layout({})
        self.step = 0
        self.rows = {name: torch.zeros(0) for name in _ROWS}
        self.trained = torch.zeros(0, dtype=torch.int64)

    def train(self, student: FlowDenoiser, bench: Bench, schedule: TrainSettings) -> float:
        """One step of one candidate; its loss.

        Args:
            student: with the weights that elements start from which no candidate has had yet.
            bench: of whose batches it takes that of this step.
            schedule: of the whole run, at the candidate's learning rate.

        Raises:
            NasError: the loss or a gradient is not finite.
        """
        wanted = slots(network_of(student))
        self._hold(self.layout.holding(wanted))
        index = self.layout.index(wanted)
        fresh = flat(wanted)
        device = fresh.device
        before = self.trained[index]
        weight = torch.where((before > 0).to(device), self.rows["weight"][index].to(device), fresh)
        put(wanted, weight)
        loss = _loss(student.train(), bench, self.step)
        loss.backward()
        gradient = torch.cat([_gradient(slot.parameter) for slot in wanted])
        norm, found = float(gradient.norm()), float(loss.detach())
        if not math.isfinite(norm) or not math.isfinite(found):
            raise NasError(
                f"the shared training diverged: a loss or gradient is not finite at step {self.step + 1}"
                f" of {schedule.steps}",
                hint="a lower learning rate in the proxy's settings",
            )
        if schedule.clip:
            gradient *= min(1.0, schedule.clip / (norm + 1e-6))
        self._update(index, before, weight.cpu(), gradient.cpu(), schedule)
        self.step += 1
        return found

    def _hold(self, layout: Layout) -> None:
        """Makes room; what there is keeps its meaning."""
        if layout is self.layout:
            return
        places = self.layout.moved(layout)
        for name, old in (*self.rows.items(), ("", self.trained)):
            grown = torch.zeros(layout.size, dtype=old.dtype)
            grown[places] = old
            if name:
                self.rows[name] = grown
            else:
                self.trained = grown
        self.layout = layout

    def _update(self, index: Tensor, before: Tensor, weight: Tensor, gradient: Tensor, schedule: TrainSettings) -> None:
        """AdamW (Loshchilov & Hutter 2019, algorithm 2) and the average of the weights, on a candidate's elements."""
        (beta, beta_square), rate = schedule.betas, schedule.learning_rate(self.step)
        count = before + 1
        times = torch.arange(1, self.step + 2, dtype=torch.float64)
        # By how often an element was trained; looked up, as powers of a million elements cost more than the rest.
        first = torch.cat([times[:1], 1 - beta**times]).float()[count]
        second = torch.cat([times[:1], (1 - beta_square**times).sqrt()]).float()[count]
        kept = torch.tensor([0.0, *(schedule.ema_weight(n) for n in range(self.step + 1))])[count]
        mean = self.rows["mean"][index].lerp_(gradient, 1 - beta)
        square = self.rows["square"][index].mul_(beta_square).addcmul_(gradient, gradient, value=1 - beta_square)
        weight = weight * (1 - rate * schedule.weight_decay)
        weight -= rate * (mean / first) / (square.sqrt() / second + schedule.eps)
        average = torch.lerp(weight, self.rows["average"][index], kept)
        for name, row in (("weight", weight), ("average", average), ("mean", mean), ("square", square)):
            self.rows[name][index] = row
        self.trained[index] = count

    def weights(self) -> Weights:
        """What candidates are to start from: the averaged weights, NaN where none was trained."""
        row = self.rows["average"].masked_fill(self.trained == 0, math.nan)
        return Weights(layout=self.layout, row=row)

    def save(self, path: Path) -> None:
        """Writes all that is needed to go on.

        Raises:
            NasError: it cannot be written.
        """
        about = {"step": str(self.step), "layout": json.dumps(self.layout.to_json())}
        atomic_write(path, save({**self.rows, "trained": self.trained}, metadata=about))

    @classmethod
    def load(cls, path: Path) -> SuperNetwork:
        """The state that `save` wrote; a new one where there is none, or none that can be read."""
        found = cls()
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                rows = {name: file.get_tensor(name) for name in (*_ROWS, "trained")}
        except (OSError, SafetensorError):
            return found
        found.layout, found.step = Layout.from_json(json.loads(about["layout"])), int(about["step"])
        found.trained = rows.pop("trained")
        found.rows = rows
        return found


def _loss(student: FlowDenoiser, bench: Bench, step: int) -> Tensor:
    """The loss of a candidate on the batch of a step, as `nas.distill.train` has it."""
    batch, asked = bench.data.batch(step), bench.asked
    losses = [each for each in bench.settings.objectives if not is_game(each)]  # settings have no games
    with_null = any(each.needs_null for each in losses)
    with Engine(bench.settings.precision).autocast(batch.text.device):
        teacher = batch.teacher if asked is None else answer(asked, batch, with_null=with_null)
        said = predict(student, batch, with_null=with_null)
    return total(losses, said, teacher, batch)[0]


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()


# ------------------------------------------------------------------------------------------------ a run and its file


def train(path: Path, space: SearchSpace, bench: Bench, seed: int, on_progress: OnProgress | None = None) -> None:
    """Trains a space's super-network and writes it; taken up where a killed run saved it last, to the same bits.

    The first candidate is the largest; the others are drawn uniformly per choice. Those that cannot be made small are
    passed over: they cannot be scored either.

    Args:
        path: of the finished file; the checkpoint is beside it.
        space: whose candidates.
        bench: teacher and settings.
        seed: of the candidates that are drawn and of initial weights.
        on_progress: called with the steps done and all.

    Raises:
        NasError: training diverged, the file cannot be written, or no candidate can be made small.
    """
    settings, partial = training(bench), path.with_suffix(".partial")
    found = SuperNetwork.load(partial)
    drawn = space.sample(settings.steps, seed + _STREAM)
    rows = np.concatenate([np.array([largest(space, bench).row]), drawn])
    with one_thread():
        while found.step < settings.steps:
            _, spec = first_small(space, bench, np.roll(rows, -(found.step % len(rows)), axis=0))
            schedule = settings.schedule(learning_rate(spec, settings))
            found.train(bench.student(spec, seed), bench, schedule)
            if on_progress is not None:
                on_progress(found.step, settings.steps)
            if found.step % CHECKPOINT_EVERY == 0 and found.step < settings.steps:
                found.save(partial)
    write(path, found.weights())
    partial.unlink(missing_ok=True)


def write(path: Path, weights: Weights) -> None:
    """Writes a store as one tensor per place, kind of block and name.

    Raises:
        NasError: it cannot be written.
    """
    layout = weights.layout
    tensors = {
        key: weights.row[layout.offsets[key] :][: math.prod(form.shape)].reshape(form.shape).clone()
        for key, form in layout.forms.items()
    }
    atomic_write(path, save(tensors, metadata={"layout": json.dumps(layout.to_json())}))


@functools.lru_cache(maxsize=4)
def read(path: Path) -> Weights:
    """The store that `write` wrote.

    Raises:
        NasError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layout = Layout.from_json(json.loads(file.metadata()["layout"]))
            tensors = {key: file.get_tensor(key).flatten() for key in layout.forms}
    except (OSError, SafetensorError) as error:
        raise NasError(f"the shared weights in {path} cannot be read: {error}", hint=f"rm {path}") from error
    return Weights(layout=layout, row=torch.cat([tensors[key] for key in layout.forms]))
