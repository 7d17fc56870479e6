"""What it costs to bring a network to onnxruntime, way by way: python benchmarks/export_cost.py [--networks N].

Small networks of several spaces are written whole by torch's TorchScript-based exporter, put together from their
blocks with an empty and with a filled cache, and (the first two) written by torch's newer exporter; sessions are opened
on both graphs and timed in turns. Seconds are CPU time of this process on one thread, so that others on the machine
matter less; imports and one small export come first and are not counted. Writes reports/benchmarks/export_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from nas.backends import Loaded
from nas.backends import onnxruntime as backend
from nas.device import Target
from nas.exporters import onnx
from nas.exporters.onnx import graphs, weights
from nas.measure.sampling import sample_networks
from nas.measure.subjects import Subject
from nas.measure.timing import Clocks, Protocol, time_group
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.space import load_space

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "benchmarks" / "export_cost.json"
SPACES = ("snapgen_unet", "sd_unet", "sdxl_unet", "dit", "decoder")
TARGET = Target(device="cpu", runtime="onnxruntime", precision="fp32")
NEWER = 2
MOST_GMAC = 4.0


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what the work gives."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def whole(subject: Subject, folder: Path) -> tuple[float, float, Any]:
    """Export of the network as one module, opening it, and its session."""
    module, inputs = subject.build(1)
    path = folder / "whole.onnx"
    export_s, _ = timed(lambda: weights.save(graphs.trace(module, inputs), {}, path))
    options = backend._options(TARGET)
    open_s, session = timed(
        lambda: onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    )
    return export_s, open_s, session


def newer(subject: Subject, folder: Path) -> float:
    """The exporter that is built on torch.export."""
    module, inputs = subject.build(1)

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                f=str(folder / "newer.onnx"),
                dynamo=True,
                external_data=False,
                verbose=False,
            )

    return timed(work)[0]


def composed(subject: Subject, cache: Path) -> tuple[float, float, float, Loaded]:
    """Put together with nothing kept, with everything kept, loaded from that, and what was loaded."""
    module, inputs = subject.build(1)
    os.environ["NAS_CACHE"] = str(cache)
    graphs.block_graph.cache_clear()
    first_s, _ = timed(lambda: onnx.graph_of(module, inputs))
    graphs.block_graph.cache_clear()
    kept_s, _ = timed(lambda: onnx.graph_of(module, inputs))
    graphs.block_graph.cache_clear()
    load_s, loaded = timed(lambda: backend.load(module, inputs, TARGET))
    return first_s, kept_s, load_s - kept_s, loaded


def one(subject: Subject, with_newer: bool) -> dict[str, Any]:
    """All of it for one network."""
    with tempfile.TemporaryDirectory(prefix="nas-export-") as name:
        folder = Path(name)
        first_s, kept_s, session_s, loaded = composed(subject, folder / "cache")
        whole_s, whole_session_s, session = whole(subject, folder)
        arrays = {key: tensor.numpy() for key, tensor in subject.build(1)[1].items()}
        runs = {"composed": loaded, "whole": lambda: session.run(None, arrays)}
        timing_s, samples = timed(lambda: time_group(runs, protocol=Protocol(), seed=0, clocks=Clocks()))
        newer_s = newer(subject, folder) if with_newer else None
    latency = {key: samples[key].latency("min_cpu") for key in runs}
    return {
        "network": subject.name,
        "gmacs": subject.macs / 1e9,
        "mparams": subject.params / 1e6,
        "whole_export_s": whole_s,
        "whole_session_s": whole_session_s,
        "newer_export_s": newer_s,
        "composed_first_s": first_s,
        "composed_kept_s": kept_s,
        "composed_session_s": session_s,
        "timing_s": timing_s / 2,
        "composed_ms": latency["composed"],
        "whole_ms": latency["whole"],
        "latency_ratio": latency["composed"] / latency["whole"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the networks."""
    names = [name for name in rows[0] if name.endswith("_s")]
    found = {name: statistics.median(row[name] for row in rows if row[name] is not None) for name in names}
    ratios = np.array([row["latency_ratio"] for row in rows])
    return {
        **found,
        "latency_ratio": float(np.median(ratios)),
        "latency_ratio_least": float(ratios.min()),
        "latency_ratio_most": float(ratios.max()),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2, help="of each space")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    spaces = [load_space(name) for name in SPACES]
    subjects = [s for space in spaces for s in sample_networks(space, asked.networks, most_gmac=MOST_GMAC)]
    before = os.environ.get("NAS_CACHE")
    with tempfile.TemporaryDirectory(prefix="nas-export-") as name:  # imports
        whole(subjects[-1], Path(name))
        composed(subjects[-1], Path(name))
        newer(subjects[-1], Path(name))
    rows = []
    for index, subject in enumerate(subjects):
        rows.append(row := one(subject, index < NEWER))
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    if before is None:
        os.environ.pop("NAS_CACHE", None)
    else:
        os.environ["NAS_CACHE"] = before
    found = summary(rows)
    report = {"median": found, "networks": rows, "provenance": provenance(threads=1, clock="process CPU time")}
    atomic_write(OUT, json.dumps(report, indent=1) + "\n")
    print(f"wrote {OUT.relative_to(ROOT)}")
    print(
        f"per network, CPU s: whole export {found['whole_export_s']:.2f}, newer exporter {found['newer_export_s']:.2f},"
        f" composed {found['composed_first_s']:.2f} the first time and {found['composed_kept_s']:.3f} from the cache,"
        f" then weights and session {found['composed_session_s']:.2f} (opening the whole file"
        f" {found['whole_session_s']:.2f}), timing"
        f" {found['timing_s']:.2f}; latency composed / whole {found['latency_ratio']:.3f}"
        f" ({found['latency_ratio_least']:.3f} to {found['latency_ratio_most']:.3f})"
    )


if __name__ == "__main__":
    main()
