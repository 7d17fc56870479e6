"""What it takes to score candidates at their full size: seconds and memory per step with a teacher of SDXL's shape.

    python benchmarks/proxy_real_scale.py [--candidate sdxl-base --candidate koala-700m] [--batch 2] [--steps 8]

A teacher with the configuration of SDXL base's UNet and random weights, and random latents with text embeddings of its
shapes, are written to a temporary folder, as a diffusers model and as `nas cache` leaves them; published networks of
sdxl_unet are then trained as the proxy trains candidates with task "latents": bf16 autocast, output and text
distillation (each row with and without its caption), AdamW, averaged weights. Once with the teacher asked at every
step, once with its answers read from the disk. Each network also gets its whole score (`distill`).

Quality cannot be judged here: the teacher's weights are random. Without a GPU the same code runs at a sixteenth of the
widths and an eighth of the resolution, and the report says so. Writes reports/proxy/real_scale.json and prints the
seconds per step last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nas import proxies
from nas.bench import Bench, ProxySettings, bench_of, learning_rate, one_thread
from nas.cache import TargetSettings, cache_targets
from nas.distill import Progress, train
from nas.errors import NasError
from nas.paths import atomic_write, data_dir
from nas.provenance import provenance
from nas.space import Candidate, SearchSpace, load_space
from nas.tasks.latents import Manifest
from nas.tasks.latents.shards import ShardWriter, record

OUT = Path(__file__).resolve().parent.parent / "reports" / "proxy" / "real_scale.json"
SPACE = "sdxl_unet"
SIDE, TOKENS, TEXT, POOLED, SIZES = 128, 77, 2048, 1280, 6
SMALL = 16  # of widths where there is no GPU
SMALL_SIDE = 16
# Configuration of SDXL base 1.0's UNet:
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json
SDXL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # diffusers' name for the number of heads
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
WIDTHS, SIZE_EMBEDDING = (320, 640, 1280), 256
# Its scheduler's: scheduler/scheduler_config.json of the same repository.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}


def write_teacher(folder: Path, divisor: int, side: int, device: str) -> str:
    """A random UNet of SDXL's shape, its widths divided, as diffusers saves it."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        made = UNet2DConditionModel(
            **SDXL,
            sample_size=side,
            block_out_channels=tuple(width // divisor for width in WIDTHS),
            norm_num_groups=32 if divisor == 1 else 4,
            cross_attention_dim=TEXT // divisor,
            addition_time_embed_dim=SIZE_EMBEDDING // divisor,
            projection_class_embeddings_input_dim=(POOLED + SIZES * SIZE_EMBEDDING) // divisor,
        )
    torch.nn.Module.to(made, torch.bfloat16)  # diffusers' own warns, and its warning is of no use here
    made.save_pretrained(folder)
    DDPMScheduler(**SCHEDULE).save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, rows: int, divisor: int, side: int) -> str:
    """Random latents and conditions as `nas cache` leaves them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    shapes = {"latent": (4, side, side), "tokens": (TOKENS, TEXT // divisor), "pooled": (POOLED // divisor,)}
    sizes = np.array([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], dtype=np.float32)
    with ShardWriter(folder / "data-000000.tar") as writer:
        for row in range(rows):
            drawn = {name: random.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
            writer.add(f"{row:09d}", {**drawn, "size_ids": sizes, "txt": f"row {row}"})
    conditions = {name: shape for name, shape in shapes.items() if name != "latent"}
    null = {name: torch.zeros((1, *shape), dtype=torch.float16) for name, shape in conditions.items()}
    save_file(null, folder / "null.safetensors")
    Manifest(
        latent_shape=(4, side, side),
        conditions={**conditions, "size_ids": (SIZES,)},
        image_size=8 * side,
        vae={"name": "random", "digest": "random", "scaling": {}, "factor": 8},
        text={"name": "random", "digest": "random", "encoders": []},
        shards=(writer.record(),),
        null=record(folder / "null.safetensors", 1),
    ).write(folder)
    return str(folder)


def space_of(folder: Path, divisor: int, side: int) -> SearchSpace:
    """The space; where widths are divided, one of its structure for data of such shapes."""
    if divisor == 1:
        return load_space(SPACE)
    text = (data_dir("search_spaces") / f"{SPACE}.toml").read_text()

    def divided(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"\d+", lambda number: str(int(number[0]) // divisor), found[2])

    names = r"width_\d|head_width|text_width|pooled_width|size_embedding_width"
    text = re.sub(rf"^((?:{names}) = )([\[\]\d, ]+)", divided, text, flags=re.MULTILINE)
    text = re.sub(r"^(latent_(?:height|width) = )\d+", rf"\g<1>{side}", text, flags=re.MULTILINE)
    text = re.sub(r"^norm_groups = \d+", "norm_groups = 4", text, flags=re.MULTILINE)
    (folder / "small.toml").write_text(text)
    return load_space(str(folder / "small.toml"))


def peak_gib(device: str) -> float:
    """Most memory so far: the GPU's allocations since they were last reset, or this process's resident set."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def steps_of(candidate: Candidate, bench: Bench, warmup: int) -> dict[str, Any]:
    """Seconds per step after some for warming up, and peak memory."""
    if bench.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = bench.settings
    spec = bench.spec(candidate)
    began = time.perf_counter()
    student = bench.student(spec, 0)
    made = time.perf_counter() - began
    stamps: list[float] = []

    def clock(history: Sequence[Progress]) -> None:  # called when the step's loss is known, so nothing is under way
        stamps.append(time.perf_counter())

    train(
        student,
        bench.data,
        settings.objectives,
        settings.schedule(learning_rate(spec, settings)),
        teacher=bench.asked,
        on_progress=clock,
        report_every=1,
    )
    taken = [after - before for before, after in itertools.pairwise(stamps[warmup - 1 :])]
    return {
        "params": sum(each.numel() for each in student.parameters()),
        "making_s": made,
        "step_s": statistics.median(taken),
        "step_low_s": min(taken),
        "step_high_s": max(taken),
        "rows_per_s": settings.batch / statistics.median(taken),
        "peak_gib": peak_gib(bench.device),
    }


def measured(candidate: Candidate, name: str, bench: Bench, warmup: int, answers: str) -> dict[str, Any]:
    """One row of the report; what does not fit says which batch would."""
    row: dict[str, Any] = {"candidate": name, "key": candidate.key, "answers": answers, "batch": bench.settings.batch}
    try:
        bench.prepare()
        with one_thread():  # as proxies have it
            row |= steps_of(candidate, bench, warmup)
        began = time.perf_counter()
        score = proxies.proxy("distill").score(candidate, bench)
        row |= {"score_s": time.perf_counter() - began, "score_db": score.value}
    except (NasError, torch.OutOfMemoryError) as error:
        row["reason"] = str(error).splitlines()[0]
    return row


def main(argv: list[str] | None = None) -> int:
    """Measures every network in both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", action="append", help=f"a published network of {SPACE}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--held-rows", type=int, default=8)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    if options.steps < options.warmup + 2:
        parser.error("at least two steps must follow those for warming up")
    small = options.device == "cpu"
    divisor, side = (SMALL, SMALL_SIDE) if small else (1, SIDE)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        teacher = write_teacher(root / "teacher", divisor, side, options.device)
        data = write_data(root / "data", options.held_rows + 4 * options.batch, divisor, side)
        space = space_of(root, divisor, side)
        settings = ProxySettings(
            task="latents",
            data=data,
            steps=options.steps,
            batch=options.batch,
            lr=1e-4,
            held_rows=options.held_rows,
            precision=options.precision,
        )
        for answers in ("live", "cached"):
            if answers == "cached":
                asked = TargetSettings(teacher=teacher, batch=options.batch, device=options.device)
                cache_targets(Path(data), replace(asked, dtype=_DTYPES[options.precision]))
            bench = bench_of(teacher, settings, options.device)
            for name in options.candidate or ["sdxl-base", "koala-700m"]:
                rows.append(measured(space.reference(name), name, bench, options.warmup, answers))
                print(rows[-1], file=sys.stderr, flush=True)
    found = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(options.device) if not small else "CPU",
        "size": f"widths / {divisor}, latents 4x{side}x{side}",
        "what": "random weights: speed and memory only, quality cannot be judged here"
        + ("; no GPU was at hand: a small copy of everything, to show that the code runs" if small else ""),
        "memory": "resident set of the whole process, all rows before included" if small else "torch's allocations",
        "settings": {name: value for name, value in asdict(settings).items() if name != "data"},
        "rows": rows,
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out, json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}, {found['size']}: {found['what']}")
    for row in rows:
        said = row.get("reason") or (
            f"{row['step_s']:.3f} s per step of {row['batch']} rows, {row['peak_gib']:.1f} GiB,"
            f" {row['score_s']:.1f} s a score"
        )
        print(f"{row['candidate']:12} teacher {row['answers']:6} {said}")
    return 0


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

if __name__ == "__main__":
    sys.exit(main())
