"""`nas train` killed with SIGKILL ends in the bits of an unbroken run (benchmarks/train_kill.py does it ten times)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_lesson import write_teacher
from train_cases import TWO_STAGES

from nas.checkpoint.files import read_file

WAIT_S = 300


def start(recipe: Path, teacher: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nas", "train", "--recipe", str(recipe), "--teacher", teacher, "--out", str(out)]
    return subprocess.Popen(
        command, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said


def kill_once_there(process: subprocess.Popen[str], file: Path) -> None:
    """SIGKILL as soon as a file appears."""
    until = time.monotonic() + WAIT_S
    while not file.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, f"it ended before {file.name} was there"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_two_kills_change_no_bit(tmp_path: Path) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(TWO_STAGES)
    teacher = write_teacher(tmp_path)
    finish(start(recipe, teacher, tmp_path / "peace"))
    killed = tmp_path / "killed"
    for stage in ("1-distil", "2-few"):
        kill_once_there(start(recipe, teacher, killed), killed / "stages" / stage / "checkpoints" / "step-00000002.pt")
        assert not (killed / "stages" / stage / "stage.json").exists()
    finish(start(recipe, teacher, killed))
    for name in ("network.safetensors", *(f"stages/{stage}/network.safetensors" for stage in ("1-distil", "2-few"))):
        (about, weights), (told, wanted) = read_file(killed / name), read_file(tmp_path / "peace" / name)
        # The order of the header's records is the writer's hash map's; what they say is compared.
        assert about == told, name
        assert weights.keys() == wanted.keys(), name
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted), name
