"""The engine on Accelerate: alone it is the plain loop, fp16 finds its scale, and two processes train as one does."""

from __future__ import annotations

import csv
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_lesson import write_teacher
from torch import Tensor, nn
from train_cases import TWO_STAGES

from nas.distill import Engine
from nas.errors import NasError
from nas.train.accelerated import AccelerateEngine, accelerator

SLOW_S = 600


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state per process."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def moved(engine: Engine, loss_times: float = 1.0, clip: float | None = 0.1) -> tuple[Tensor, float]:
    """Weights after one step of a layer, and the norm that the engine reports."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(5, 3)
    with engine.autocast(torch.device("cpu")):
        loss = layer(x).square().mean() * loss_times
    engine.backward(loss)
    norm = engine.move(optimiser, layer.parameters(), clip)
    return torch.cat([p.detach().flatten() for p in layer.parameters()]), float(norm)


def test_alone_it_does_what_the_plain_engine_does() -> None:
    for precision in ("fp32", "bf16"):
        ours, norm = moved(AccelerateEngine(accelerator("cpu"), precision))
        plain, plain_norm = moved(Engine(precision))
        assert torch.equal(ours, plain)
        assert norm == plain_norm > 0.1  # so that the limit was felt


def test_fp16_scales_its_losses_and_leaves_out_steps_that_overflow() -> None:
    engine = AccelerateEngine(accelerator("cpu"), "fp16")
    assert engine.scaler is not None
    plain, plain_norm = moved(Engine("fp32"))
    ours, norm = moved(engine)
    while norm == 0.0:  # the first scale is too large for this loss
        ours, norm = moved(engine)
    before = engine.scaler.get_scale()
    assert before > 1
    assert torch.allclose(ours, plain, atol=1e-3)  # the scale is taken off again
    assert norm == pytest.approx(plain_norm, rel=1e-2)
    still, norm = moved(engine, loss_times=1e38)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in nn.Linear(3, 3).parameters()])
    assert torch.equal(still, start)
    assert norm == 0.0  # not an error: the scale is halved and the run goes on
    assert engine.scaler.get_scale() == before / 2


def test_fp16_reports_a_loss_that_no_scale_helps() -> None:
    engine = AccelerateEngine(accelerator("cpu"), "fp16")
    norm = 0.0
    for _ in range(40):
        _, norm = moved(engine, loss_times=math.inf)
        if not math.isfinite(norm):
            break
    assert not math.isfinite(norm)


def test_its_state_holds_the_scale_and_the_random_numbers() -> None:
    engine = AccelerateEngine(accelerator("cpu"), "fp16")
    moved(engine, loss_times=1e38)
    assert engine.scaler is not None
    state, scale = engine.state(), engine.scaler.get_scale()
    expected = torch.rand(3)
    moved(engine, loss_times=1e38)
    again = AccelerateEngine(accelerator("cpu"), "fp16")
    again.load(state)
    assert again.scaler is not None
    assert again.scaler.get_scale() == scale
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_more_processes_is_refused() -> None:
    engine = AccelerateEngine(accelerator("cpu"))
    state = engine.state()
    state["random"] = state["random"] * 2
    with pytest.raises(NasError, match="made by 2 processes, and 1 process would resume it"):
        engine.load(state)
    with pytest.raises(NasError, match="made by 1 process, sharded, and 1 process would"):
        engine.load({**engine.state(), "sharded": True})


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(NasError, match="unknown precision 'fp8'; known: fp32, bf16, fp16"):
        AccelerateEngine(accelerator("cpu"), "fp8")


def test_a_launch_that_started_one_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # what accelerate launch --cpu --num_processes 2 sets
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(NasError, match="starts a single process") as caught:
        accelerator("cpu")
    assert "--multi_gpu --num_processes 2" in str(caught.value.hint)


# Several processes


def launched(out: Path, recipe: Path, teacher: str, *launch: str) -> subprocess.CompletedProcess[str]:
    """`nas train` by `accelerate launch` with these options, or by itself without any."""
    command = ["-m", "nas", "train", "--recipe", str(recipe), "--teacher", teacher, "--out", str(out)]
    if launch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        where = ["--num_processes", "2", "--main_process_port", str(port)]
        command = ["-m", "accelerate.commands.launch", *launch, *plain, *where, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=SLOW_S, env=environment, cwd=out.parent
    )


def curve(out: Path, stage: str) -> list[dict[str, float]]:
    """The lines of a stage's losses.csv, without their times."""
    with (out / "stages" / stage / "losses.csv").open() as stream:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    recipe = folder / "two.toml"
    recipe.write_text(TWO_STAGES.replace("steps = 4", "steps = 3"))
    teacher = write_teacher(folder)
    done = launched(folder / "alone", recipe, teacher)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launch", [("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")], ids=["copies", "shards"])
def test_two_processes_give_the_curve_of_one(alone: Path, launch: tuple[str, ...]) -> None:
    out = alone / launch[0].strip("-")
    done = launched(out, alone / "two.toml", str(alone / "teacher-0.safetensors"), *launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1  # one process speaks
    record: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert record["provenance"]["processes"] == 2
    for stage in ("1-distil", "2-few"):
        ours, theirs = curve(out, stage), curve(alone / "alone", stage)
        assert [line["step"] for line in ours] == [2, 3]
        for line, other in zip(ours, theirs, strict=True):
            # The sums of a batch are taken in another order: float32 differs in the last digits, Adam spreads that.
            assert line == pytest.approx(other, rel=2e-3, abs=1e-6)
        state = torch.load(out / "stages" / stage / "checkpoints" / "step-00000003.pt", weights_only=True)
        assert len(state["engine"]["random"]) == 2
        assert state["engine"]["sharded"] == ("fsdp" in launch[0])
        whole = torch.load(alone / "alone" / "stages" / stage / "checkpoints" / "step-00000003.pt", weights_only=True)
        for name, value in whole["average"].items():
            assert torch.allclose(state["average"][name], value, atol=2e-4), name
