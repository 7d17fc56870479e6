"""Checkpoints of a run: written whole or not at all, the last two kept, read back to the same bits."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nas.distill.run import Player, Run
from nas.distill.settings import Checkpoints, Progress
from nas.errors import NasError
from nas.paths import atomic_write

_KEPT = 2  # the newest, and the one before it


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Saves a run's state; older checkpoints go once the new one is whole.

    Raises:
        NasError: it cannot be written (a full disk); the older ones stay.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / f"step-{step:08d}.pt", buffer.getvalue())
    for old in checkpoint_files(folder)[_KEPT:]:
        old.unlink(missing_ok=True)


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint; an unreadable one costs the steps since the one before, never a number.

    Raises:
        NasError: there are checkpoints and none can be read.
    """
    files = checkpoint_files(folder)
    for path in files:
        state = _read(path)
        if state is not None:
            return state
    if files:
        raise NasError(f"none of the checkpoints in {folder} can be read", hint="remove that folder to start afresh")
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return None
    return state


def check_settings(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Refuses to go on with other settings.

    Raises:
        NasError: names what differs.
    """
    changed = [
        f"{name} was {saved.get(name)} and is now {asked[name]}" for name in asked if saved.get(name) != asked[name]
    ]
    if changed:
        raise NasError(
            f"the training in {folder} cannot be resumed with other settings: {'; '.join(changed)}",
            hint="resume with the same settings, or choose another folder",
        )


def save(run: Run, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint; every process takes part, one writes."""
    engine = run.engine
    state = {
        "settings": asdict(run.settings),
        "identity": checkpoints.identity,
        "step": run.step,
        "turn": run.turn,
        "seconds": run.seconds,
        "average": engine.module_state(run.average),
        "modules": {name: engine.module_state(player.module) for name, player in run.players.items()},
        "optimisers": {
            name: engine.optimiser_state(player.module, player.optimiser) for name, player in run.players.items()
        },
        "partners": {
            name: engine.module_state(partner.module)
            for name, partner in run.partners.items()
            if name not in run.players
        },
        "engine": engine.state(),
        "history": [asdict(line) for line in run.history],
    }
    if engine.rank == 0:
        write(checkpoints.folder, run.step, state)
    if checkpoints.on_save is not None:
        # In every process: a sharded average can only be asked by all together.
        checkpoints.on_save(run.step, run.average)
    engine.wait()


def resume(run: Run, checkpoints: Checkpoints) -> None:
    """Puts the newest checkpoint's state into `run`, if there is one."""
    folder, engine = checkpoints.folder, run.engine
    state = newest(folder)
    if state is None:
        return
    if state["identity"] != checkpoints.identity:
        raise NasError(
            f"the training in {folder} was of another recipe, network, teacher or data set",
            hint="choose another folder with --out",
        )
    check_settings(state["settings"], asdict(run.settings), folder)
    try:
        engine.load_module(run.average, state["average"])
        for name, module in _modules(state, run.players).items():
            engine.load_module(run.players[name].module, module)
        for name, module in state["partners"].items():
            engine.load_module(run.partners[name].module, module)
    except RuntimeError as error:
        raise NasError(f"the checkpoint in {folder} is of another network", hint="choose another folder") from error
    for name, optimiser in state["optimisers"].items():
        engine.load_optimiser(run.players[name].module, run.players[name].optimiser, optimiser)
    run.step, run.turn, run.seconds = state["step"], state["turn"], state["seconds"]
    run.history = [Progress(**line) for line in state["history"]]
    run.resumed_from = run.step
    engine.load(state["engine"])


def _modules(state: Mapping[str, Any], players: Mapping[str, Player]) -> dict[str, Any]:
    if state["modules"].keys() != players.keys():
        raise RuntimeError("other players")
    found: dict[str, Any] = state["modules"]
    return found
