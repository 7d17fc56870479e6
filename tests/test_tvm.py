"""TVM on this machine: tuned, untuned or refused; libraries for this machine and for others."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from nas.backends import tvm as backend
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters import tvm as exporter
from nas.exporters.tvm import records
from nas.exporters.tvm.lowering import fuse, schedule
from nas.exporters.tvm.machine import AARCH64_LINUX, host, identity, make_target

pytest.importorskip("tvm")
pytestmark = pytest.mark.slow
TUNED = Target(device="cpu", runtime="tvm", precision="fp32")
PLAIN = replace(TUNED, runtime="tvm-untuned")
EM_AARCH64 = 183


class Small(nn.Module):
    """Two products of different shapes and something that is not worth tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.softmax(self.first(x), dim=-1))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(1, 8)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cpu.records.jsonl"


def expected(module: nn.Module, inputs: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        output: np.ndarray = module(**inputs).numpy()
    return output


def tuning(path: Path, **more: Any) -> dict[str, Any]:
    return {"records": str(path), "tune": True, "trials": 2, **more}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the tuner said, without what torch says about itself."""
    return [record.getMessage() for record in caplog.records if record.name == "nas.tvm"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, list[str]]:
    """What tuning gave: the loaded network, the records' text and what was said meanwhile."""
    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    records_path, logger = tmp_path_factory.mktemp("tuned") / "cpu.records.jsonl", logging.getLogger("nas.tvm")
    handler, level = Heard(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        torch.manual_seed(0)
        made = Small().eval()
        torch.manual_seed(1)
        loaded = backend.load(made, {"x": torch.randn(1, 8)}, TUNED, tuning(records_path))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return loaded, records_path.read_text(), said


def test_kernels_without_records_are_refused_with_the_next_step(
    module: nn.Module, inputs: dict[str, Tensor], path: Path
) -> None:
    with pytest.raises(NasError, match=r"2 of 2 kernels have no tuning record in cpu\.records\.jsonl") as caught:
        backend.load(module, inputs, TUNED, {"records": str(path)})
    assert "tune = true" in str(caught.value.hint)


def test_tuned_once_shared_and_really_used(
    module: nn.Module, inputs: dict[str, Tensor], path: Path, tuned: tuple[Any, str, list[str]]
) -> None:
    loaded, written, said = tuned
    path.write_text(written)
    np.testing.assert_allclose(loaded(), expected(module, inputs), atol=1e-6)
    assert loaded.describe()["tuning"] == "tuned (2 of 2 kernels have records)"
    assert [message.partition(":")[0] for message in said] == ["kernel 1 of 2", "kernel 2 of 2"]
    other = Small().eval()  # the same kernels with other weights
    again = backend.load(other, inputs, TUNED, {"records": str(path)})
    np.testing.assert_allclose(again(), expected(other, inputs), atol=1e-6)
    assert path.read_text() == written
    # The schedules are in the compiled kernels, not only in the file.
    target = make_target(None, 1)
    fused = fuse(module, inputs, target)
    machine = identity(target)
    assert schedule(fused, target, records.database(fused.tasks, records.read(path, machine))[0])[1] == 2
    assert schedule(fused, target, records.database(fused.tasks, {})[0])[1] == 0


def test_only_what_lacks_a_record_is_tuned(
    module: nn.Module,
    inputs: dict[str, Tensor],
    path: Path,
    caplog: pytest.LogCaptureFixture,
    tuned: tuple[Any, str, list[str]],
) -> None:
    machine = identity(make_target(None, 1))
    path.write_text(tuned[1])
    found = records.read(path, machine)
    kept = sorted(found)[0]
    records.write(path, {kept: found[kept]}, machine)
    with caplog.at_level(logging.INFO, logger="nas.tvm"):
        backend.load(module, inputs, TUNED, tuning(path))
    assert [message.partition(":")[0] for message in told(caplog)] == ["kernel 1 of 1"]
    assert records.read(path, machine)[kept] == found[kept]
    assert len(records.read(path, machine)) == 2


def test_an_untuned_target_says_so(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(module, inputs, PLAIN, {"untuned": True})
    np.testing.assert_allclose(loaded(), expected(module, inputs), atol=1e-6)
    assert (loaded.describe()["runtime"], loaded.describe()["tuning"]) == ("tvm-untuned", "untuned")


def test_a_killed_tuner_keeps_its_records_and_leaves_no_process(tmp_path: Path, path: Path) -> None:
    script = (
        "import torch, sys; from nas.backends import tvm; from tests.test_tvm import Small, TUNED, tuning;"
        "tvm.load(Small().eval(), {'x': torch.zeros(1, 8)}, TUNED, tuning(sys.argv[1], trials=64))"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(path)], start_new_session=True)
    children: set[psutil.Process] = set()
    deadline = time.monotonic() + 300
    while not (path.is_file() and len(path.read_text().splitlines()) > 1):
        assert run.poll() is None
        assert time.monotonic() < deadline
        children |= set(psutil.Process(run.pid).children(recursive=True))
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait(timeout=60)
    assert children
    _, alive = psutil.wait_procs(list(children), timeout=60)
    assert not alive
    assert len(records.read(path, identity(make_target(None, 1)))) >= 1


def test_a_tuner_that_fails_is_one_sentence(
    module: nn.Module, inputs: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.mkdir()  # where the records should go
    with pytest.raises(NasError, match=r"tuning 2 kernels stopped with exit code 1: .* are kept") as caught:
        backend.load(module, inputs, TUNED, tuning(path))
    assert "\n" not in caught.value.message


def elf_machines(path: Path) -> set[int]:
    """The machine field of every ELF object in a .tar."""
    found = set()
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            head = stream.read(20) if stream else b""
            if head[:4] == b"\x7fELF":
                found.add(struct.unpack("<H", head[18:20])[0])
    return found


def test_a_library_for_another_machine_needs_no_compiler(
    module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"  # no compiler in it
    tools.mkdir()
    for name in ("tar", "gzip"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tools))
    path = exporter.export(module, inputs, tmp_path / "deep" / "small.tar", target=AARCH64_LINUX)
    assert elf_machines(path) == {EM_AARCH64}


def test_a_library_of_this_machine_computes_the_same(
    module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    path = exporter.export(module, inputs, tmp_path / "small.tar")
    assert EM_AARCH64 not in elf_machines(path)
    assert exporter.verify(path, module, inputs) < 1e-6
    with torch.no_grad():
        module.get_parameter("second.bias").add_(0.5)
    assert exporter.verify(path, module, inputs) == pytest.approx(0.5, rel=1e-4)


def test_linking_for_another_machine_with_this_one_s_compiler_is_one_sentence(
    module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(NasError, match=r"small\.so cannot be linked with") as caught:
        exporter.export(module, inputs, tmp_path / "small.so", target=AARCH64_LINUX)
    assert ".tar" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("target", "named"),
    [({"kind": "opencl"}, "kind 'llvm'"), ({"kind": "nothing"}, "got 'nothing'"), ({"kind": "llvm", "x": 1}, "'x'")],
)
def test_a_target_that_is_not_known_is_named(
    target: dict[str, Any], named: str, module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=named):
        exporter.export(module, inputs, tmp_path / "small.tar", target=target)


def test_another_ending_is_refused(module: nn.Module, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.tar or \.so, got 'small\.onnx'"):
        exporter.export(module, inputs, tmp_path / "small.onnx")


def test_the_machine_of_records_tells_cpus_apart() -> None:
    mine, board = identity(make_target(None, 1)), identity(make_target(AARCH64_LINUX, 4))
    assert mine["mcpu"] == host(1)["mcpu"]
    assert board == {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"], "num-cores": 4}
