"""Latency tables of this machine's GPU at real sizes: python benchmarks/measure_gpu.py --folder latency_tables.

For each runtime (eager and compiled PyTorch) a device sheet is written for the GPU that CUDA names, with a roofline
measured on it, and the references of every space at their own resolutions, diverse candidates and blocks are measured
into its table. Rows are appended group by group; the same command goes on where it stopped. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nas import families, registry, tables
from nas.device import DeviceSheet, load_sheet
from nas.errors import NasError
from nas.measure.sampling import sample_blocks
from nas.measure.session import Session, began, pick_anchors
from nas.measure.subjects import Subject, network_subject, table_subject
from nas.measure.timing import Protocol
from nas.paths import atomic_write
from nas.space import SearchSpace, load_space

SPACES = ("sdxl_unet", "snapgen_unet", "sd_unet", "dit", "decoder")
RUNTIMES = {"torch-eager": "torch_eager", "torch-compile": "torch_compile"}
MOST_BLOCK_GMAC = 2000.0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MATRIX, _COPIED_BYTES, _TINY = 8192, 1 << 30, 256


def short(gpu: str) -> str:
    """A GPU's name as a device's: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def sheet_text(gpu: str, runtime: str, precision: str, batch: int, roofline: dict[str, float], versions: str) -> str:
    """A device sheet for a GPU."""
    name = short(gpu)
    fields = {
        "device": name,
        "chip": gpu,
        "runtime": runtime,
        "precision": precision,
        "batch": batch,
        "aliases": [f"{name}-{runtime.removeprefix('torch-')}" + (f"-b{batch}" if batch != 1 else "")],
        "summary": f"one {gpu} through {runtime}, {precision}, channels-last, batch {batch}, {versions}",
        "backend": RUNTIMES[runtime],
        "sources": [
            "rows: python benchmarks/measure_gpu.py",
            f"roofline: measured there: product of two {_MATRIX} x {_MATRIX} matrices, copy of 1 GiB, a tiny operator",
        ],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    lines += ["", "[roofline]", *(f"{key} = {value:.6g}" for key, value in roofline.items())]
    lines += ["", "[options]", f"gpu = {json.dumps(gpu)}", "channels_last = true"]
    return "\n".join(lines) + "\n"


def fastest_ms(work: Callable[[], object], calls: int = 20, rounds: int = 7) -> float:
    """The least time of a call on the GPU, in ms."""
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / calls)
    return min(found)


def measured_roofline(precision: str) -> dict[str, float]:
    """What a product, a copy and a launch take at best on the current GPU."""
    dtype = _DTYPES[precision]
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(_COPIED_BYTES, device="cuda", dtype=torch.uint8)
    into, tiny = torch.empty_like(source), torch.zeros(_TINY, device="cuda", dtype=dtype)
    # Features count bytes at float32, so a GB of theirs is less in a shorter precision.
    read_and_written_gb = 2 * _COPIED_BYTES / 1e9 * 4 / dtype.itemsize
    return {
        "ms_per_gmac": fastest_ms(lambda: a @ b) / (_MATRIX**3 / 1e9),
        "ms_per_gb": fastest_ms(lambda: into.copy_(source)) / read_and_written_gb,
        "ms_per_op": fastest_ms(lambda: tiny.add_(1), calls=200),
    }


def networks(space: SearchSpace, candidates: int, batch: int) -> Iterator[Subject]:
    """The space's references and some candidates, each at full width and at the space's own resolution."""
    chosen = [space.reference(reference.name) for reference in space.references]
    chosen += [space.from_row(row) for row in space.sample(candidates, 0)]
    for candidate in chosen:
        yield network_subject(families.network(candidate), space.name, space.resolution_px, batch)


def subjects(candidates: int, blocks: int, batch: int) -> list[Subject]:
    """What is measured; blocks are drawn at the resolution of their space and at fractions of it."""
    found: dict[str, Subject] = {}
    for space in map(load_space, SPACES):
        drawn = sample_blocks(space, blocks, batch=batch, most_gmac=MOST_BLOCK_GMAC) if blocks else ()
        found.update((subject.key, subject) for subject in (*drawn, *networks(space, candidates, batch)))
    return list(found.values())


def write_sheet(folder: Path, gpu: str, runtime: str, precision: str, batch: int) -> DeviceSheet:
    """The sheet of a GPU, as it stands if there is one: an earlier run's rows rest on it."""
    parts = [short(gpu), runtime, precision, *([f"b{batch}"] if batch != 1 else [])]
    path = folder / f"{'--'.join(parts)}.toml"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
        atomic_write(path, sheet_text(gpu, runtime, precision, batch, measured_roofline(precision), versions))
    return load_sheet(path)


def measure(sheet: DeviceSheet, wanted: list[Subject], folder: Path, number: int) -> None:
    """One session over the subjects that have fewer than `number` sessions yet."""
    seen: dict[str, set[str]] = {}
    for row in tables.read(sheet.slug, folder):
        seen.setdefault(row.subject, set()).update({began(row.session)} if row.used else set())
    todo = [subject for subject in wanted if len(seen.get(subject.key, ())) < number]
    if not todo:
        return
    session = Session(
        name=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sheet=sheet,
        backend=registry.load("nas.backends", str(sheet.backend)),
        protocol=Protocol(),
        anchors=pick_anchors(wanted),
        seed=number,
    )
    tables.write_subjects(sheet.slug, [table_subject(subject) for subject in todo], folder)
    start = time.perf_counter()
    for rows, message, done in session.measure(todo):
        tables.append(sheet.slug, rows, folder)
        print(f"{sheet.slug}: {done} of {len(todo)}, {time.perf_counter() - start:.0f} s, {message}", flush=True)


def main() -> None:
    """Writes the sheets, measures, and says what there is now."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the tables")
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--precision", choices=list(_DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=30, help="of each space")
    parser.add_argument("--candidates", type=int, default=6, help="networks of each space besides its references")
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="print the subjects and measure nothing (needs no GPU)")
    asked = parser.parse_args()
    wanted = subjects(asked.candidates, asked.blocks, asked.batch)
    if asked.plan:
        for subject in wanted:
            print(
                f"{subject.kind} {subject.name}: {subject.macs / 1e9:.1f} GMAC, {subject.params / 1e6:.1f} M parameters"
            )
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device here; --plan prints what would be measured")
    gpu = torch.cuda.get_device_name(0)
    try:
        sheets = [write_sheet(asked.folder, gpu, r, asked.precision, asked.batch) for r in asked.runtimes]
        for number in range(1, asked.sessions + 1):
            for sheet in sheets:
                measure(sheet, wanted, asked.folder, number)
    except NasError as error:
        raise SystemExit(f"{error.message}; rows already measured are kept in {asked.folder}") from error
    for sheet in sheets:
        rows = tables.read(sheet.slug, asked.folder)
        print(f"{sheet.slug}: {len(rows)} rows of {len({row.subject for row in rows})} subjects")


if __name__ == "__main__":
    main()
