"""benchmarks/measure_gpu.py: its sheets can be read, its loop fills a table, the CPU standing in for the GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nas import registry, tables
from nas.backends import _gpu, _torch, torch_compile
from nas.device import find_target
from nas.measure.subjects import block_subject
from nas.network import block

CHIP = "NVIDIA GeForce RTX 4090"
ROOFLINE = {"ms_per_gmac": 0.0125, "ms_per_gb": 0.5, "ms_per_op": 0.004}


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = registry.load("nas.backends", str(root / "benchmarks" / "measure_gpu.py"))
    monkeypatch.setattr(module, "measured_roofline", lambda precision: ROOFLINE)
    return module


@pytest.mark.parametrize("runtime", ["torch-eager", "torch-compile"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sheet_is_what_a_backend_reads(script: ModuleType, tmp_path: Path, runtime: str, batch: int) -> None:
    sheet = script.write_sheet(tmp_path, CHIP, runtime, "bf16", batch)
    assert sheet.slug == f"geforce-rtx-4090--{runtime}--bf16" + ("--b2" if batch == 2 else "")
    assert (sheet.chip, sheet.shared, sheet.roofline) == (CHIP, False, ROOFLINE)
    assert find_target(sheet.alias, tmp_path) == sheet
    backend = registry.load("nas.backends", sheet.backend)
    assert runtime == backend.NAME
    chosen = _torch.settings(sheet.options, runtime, {"mode"})
    assert (chosen.gpu, chosen.channels_last) == (CHIP, True)
    assert torch_compile._mode(sheet.options, chosen) == "default"
    before = sheet.path.read_text()
    sheet.path.write_text(before + "# as measured\n")
    script.write_sheet(tmp_path, CHIP, runtime, "bf16", batch)
    assert sheet.path.read_text().endswith("# as measured\n"), "an earlier run's sheet was replaced"


def test_a_session_fills_the_table_and_is_not_repeated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def described(device: Any, module: Any, chosen: _torch.Settings) -> dict[str, str | int]:
        return {"chip": CHIP, "precision": _torch.precision_of(module)}

    monkeypatch.setattr(_torch, "find", lambda gpu, target: torch.device("cpu"))
    monkeypatch.setattr(_torch, "_describe_gpu", described)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(_gpu, "figures", lambda gpu: {})
    sheet = script.write_sheet(tmp_path, CHIP, "torch-eager", "bf16", 1)
    wanted = [
        block_subject(block("s", "stem", {"x": (4, n, n)}, in_channels=4, out_channels=4), "sd_unet", 8 * n, 1)
        for n in (4, 6, 8)
    ]
    script.measure(sheet, wanted, tmp_path, 1)
    rows = tables.read(sheet.slug, tmp_path)
    assert {row.subject for row in rows} == {subject.key for subject in wanted}
    assert {row.chip for row in rows} == {CHIP}
    assert {row.statistic for row in rows} == {"median_wall"}
    assert all("precision bf16" in row.environment for row in rows)
    assert set(tables.subjects(sheet.slug, tmp_path)) == {subject.key for subject in wanted}
    script.measure(sheet, wanted, tmp_path, 1)
    assert tables.read(sheet.slug, tmp_path) == rows
