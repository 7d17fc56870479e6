"""Training speed of a full-size student on this machine's GPU: python benchmarks/train_gpu.py [--batch 16].

One optimisation step of nas.distill (the `task` loss on random latents, AdamW, averaged weights, autocast) of a
published network at its own resolution: eager, eager with channels-last weights, compiled, and both. Images per second,
share of the matrix throughput that the GPU reached in a large product just before (MFU; a step counts as three
forward passes), and peak memory. Quality cannot be seen here: the weights are random.

Prints the best images per second last, and writes reports/benchmarks/train_gpu.csv and .json. Without a GPU it refuses;
--device cpu runs the same code at whatever size is asked, to test it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas import families
from nas.batches import WHOLE, Batch, Part, stream
from nas.build import build
from nas.diffusion import FLOW, Conditioning, NativeDenoiser
from nas.distill import Progress, TrainSettings, train
from nas.network import NetworkSpec, Scale
from nas.objectives import objective
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.space import load_space
from nas.trace import trace_block

MODES = {"eager": (False, False), "channels-last": (False, True), "compiled": (True, False), "both": (True, True)}
_PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MATRIX = 8192


@dataclass(frozen=True)
class Noise:
    """Random latents and text of a network's shapes: the same batch at every step, so that no data is waited for."""

    spec: NetworkSpec
    size: int
    device: str

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """Always the same."""
        generator, shape = stream(0), self.spec.input
        latent = (self.size, shape.channels, shape.height, shape.width)
        clean, noise = (torch.randn(latent, generator=generator).to(self.device) for _ in range(2))
        text = Conditioning(
            tokens=torch.randn(self.size, shape.text_tokens, shape.text_width, generator=generator).to(self.device)
        )
        t = torch.rand(self.size, generator=generator).to(self.device)
        return Batch(text=text, null_text=text.rows(slice(0, 1)), clean=clean, noise=noise, t=t).rows(
            part.rows(self.size)
        )


def network(space: str, reference: str, divisor: int, latent: int | None) -> NetworkSpec:
    """The published network, or a narrow one of its structure for a test."""
    candidate = load_space(space).reference(reference)
    whole = families.network(candidate)
    if divisor == 1 and latent is None:
        return whole
    shape = whole.input
    side = latent or shape.height
    return families.scaled(
        candidate,
        Scale(
            width_divisor=divisor,
            head_width=int(candidate.space.fixed["head_width"]) // divisor,
            norm_groups=4 if divisor > 1 else 32,
            latent_channels=shape.channels,
            height=side,
            width=side,
            text_tokens=shape.text_tokens,
            text_width=shape.text_width,
        ),
    )


def reached_tflops(device: str, precision: str) -> float:
    """What a large matrix product reaches here, in 1e12 floating-point operations a second."""
    size = _MATRIX if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=_PRECISIONS[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        _wait(device)
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * size**3 / best / 1e12


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(spec: NetworkSpec, options: Any, compiled: bool, channels_last: bool) -> dict[str, float]:
    """Seconds per step after warm-up, and peak memory."""
    made = build(spec, options.device, seed=0)
    if channels_last:
        made.to(memory_format=torch.channels_last)
    if compiled:
        made.compile()
    seen: list[float] = []

    def clock(history: list[Progress]) -> None:
        _wait(options.device)
        seen.append(time.perf_counter())

    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train(
        NativeDenoiser(made, FLOW),
        Noise(spec, options.batch, options.device),
        (objective("task"),),
        TrainSettings(steps=options.warmup + options.steps, batch=options.batch, lr=1e-5, precision=options.precision),
        on_progress=clock,  # type: ignore[arg-type]
        report_every=1,
    )
    timed = seen[options.warmup - 1 :]
    taken = sorted(after - before for before, after in itertools.pairwise(timed))
    memory = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else float("nan")
    return {"step_s": taken[len(taken) // 2], "memory_gib": memory}


def main() -> None:
    """Measures every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="snapgen_unet")
    parser.add_argument("--reference", default="snapgen")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--precision", choices=sorted(_PRECISIONS), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--width-divisor", type=int, default=1)
    parser.add_argument("--latent", type=int)
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; --device cpu tests the code at a small size")
    spec = network(options.space, options.reference, options.width_divisor, options.latent)
    macs = sum(op.macs for block in spec.blocks for op in trace_block(block))
    peak = reached_tflops(options.device, options.precision)
    rows = []
    for mode in options.modes:
        found = measured(spec, options, *MODES[mode])
        speed = options.batch / found["step_s"]
        rows.append({"mode": mode, "images_per_s": speed, "mfu": 6 * macs * speed / (peak * 1e12), **found})
        print(rows[-1], file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows)
    about = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none",
        "network": spec.name,
        "gmacs": macs / 1e9,
        "reached_tflops": peak,
        "precision": options.precision,
        "batch": options.batch,
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out / "train_gpu.csv", frame.to_csv(index=False, float_format="%.5g"))
    atomic_write(options.out / "train_gpu.json", json.dumps(about, indent=1) + "\n")
    print(frame.to_string(index=False))
    print(f"{frame['images_per_s'].max():.3g} images per second")


if __name__ == "__main__":
    main()
