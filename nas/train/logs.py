"""What a stage writes while it runs: losses.csv, TensorBoard events, grids of samples."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from nas.distill import Progress
from nas.judge import write_png
from nas.paths import atomic_write

LOSSES, SAMPLES = "losses.csv", "samples"


class Logs:
    """A stage's record, kept up to date; use as a context. Only one process writes.

    Args:
        folder: of the stage; `tensorboard --logdir` shows it, or the folder of the whole run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def record(self, history: Sequence[Progress]) -> None:
        """The losses so far, all of them in the CSV and the new ones as TensorBoard's events."""
        atomic_write(self.folder / LOSSES, as_csv(history))
        # Of a resumed run the lines before were written by the run that was killed.
        new = [line for line in history if line.step > self._shown] if self._shown else history[-1:]
        for line in new:
            writer = self._events(line.step)
            numbers = {"loss": line.loss, **line.terms, "lr": line.lr}
            for name, number in numbers.items():
                if math.isfinite(number):
                    writer.add_scalar(name, number, line.step)
            writer.add_scalar("steps_per_second", line.step / max(line.seconds, 1e-9), line.step)
        self._shown = history[-1].step

    def grid(self, step: int, pixels: Tensor) -> Path:
        """Samples side by side, uint8 [rows, columns, 3], of the network after `step` steps."""
        path = write_png(self.folder / SAMPLES / f"step-{step:08d}.png", pixels)
        self._events(step).add_image("samples", pixels.numpy(), step, dataformats="HWC")
        return path

    def _events(self, step: int) -> Any:
        """TensorBoard's writer; events of a killed run from after its last checkpoint are taken back."""
        if self._writer is None:
            # Imported here: it takes as long as a short stage.
            from torch.utils.tensorboard import SummaryWriter

            folder = self.folder / "logs"
            _wait_past_the_newest(folder)
            self._writer = SummaryWriter(str(folder), purge_step=step)
        return self._writer


def _wait_past_the_newest(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, and within a second that order is arbitrary."""
    seconds = {int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")}
    while int(time.time()) in seconds:
        time.sleep(0.05)


def as_csv(history: Sequence[Progress]) -> str:
    """A row per line of the record; a term that a line has not (whoever rested) is empty."""
    terms = list(dict.fromkeys(name for line in history for name in line.terms))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "loss", *terms, "lr", "seconds"])
    for line in history:
        numbers = [line.loss, *(line.terms.get(name, math.nan) for name in terms), line.lr]
        cells = ("" if math.isnan(number) else f"{number:.6g}" for number in numbers)
        writer.writerow([line.step, *cells, f"{line.seconds:.1f}"])
    return buffer.getvalue()
