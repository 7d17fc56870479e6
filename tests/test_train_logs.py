"""What a stage writes while it runs: the CSV, TensorBoard's events, grids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from nas.distill import Progress
from nas.train.logs import LOSSES, Logs, as_csv


def line(step: int, loss: float = 1.0, **terms: float) -> Progress:
    return Progress(step=step, steps=9, lr=0.5, loss=loss, terms=terms, seconds=step / 2)


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    read: Any = EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0})
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def test_the_csv_has_a_column_for_every_term_ever_seen() -> None:
    text = as_csv([line(1, output=0.25), line(2, math.nan, fake=2.0)])
    assert text.splitlines() == ["step,loss,output,fake,lr,seconds", "1,1,0.25,,0.5,0.5", "2,,,2,0.5,1.0"]


def test_csv_and_events_tell_the_same(tmp_path: Path) -> None:
    with Logs(tmp_path) as logs:
        history = [line(1, 3.0, output=3.0)]
        logs.record(history)
        history += [line(2, 2.0, output=2.0), line(3, math.nan)]
        logs.record(history)
    assert (tmp_path / LOSSES).read_text() == as_csv(history)
    assert events(tmp_path, "loss") == [(1, 3.0), (2, 2.0)]  # what is not a number is left out
    assert events(tmp_path, "output") == [(1, 3.0), (2, 2.0)]
    assert events(tmp_path, "lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert events(tmp_path, "steps_per_second")[0] == (1, 2.0)


def test_a_resumed_run_takes_back_the_events_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within a second names end in a running number, and 10 sorts before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    history = [line(step, float(step)) for step in (1, 2, 3)]
    with Logs(tmp_path) as logs:
        for count in (1, 2, 3):
            logs.record(history[:count])
    # Killed after line 3, taken up at the checkpoint of step 2.
    with Logs(tmp_path) as logs:
        logs.record([*history[:2], line(3, 30.0)])
        logs.record([*history[:2], line(3, 30.0), line(4, 40.0)])
    assert events(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_grids_are_pngs_named_by_their_step(tmp_path: Path) -> None:
    pixels = torch.zeros((4, 6, 3), dtype=torch.uint8)
    pixels[0, 0, 0] = 200
    with Logs(tmp_path) as logs:
        path = logs.grid(12, pixels)
    assert path == tmp_path / "samples" / "step-00000012.png"
    image = Image.open(path)
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == (200, 0, 0)
    read: Any = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [event.step for event in read.Images("samples")] == [12]
