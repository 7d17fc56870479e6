"""Trains the embedded teacher on the task shapes and prints the checker's scores on held-out captions last.

    OMP_NUM_THREADS=1 python benchmarks/train_teacher.py --out runs/shapes2 --steps 4400

A run that was stopped goes on from its checkpoint with the same command. `--start FILE` begins from another teacher's
weights (the second part of a curriculum).
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from nas.diffusion import noised, sample, sample_times
from nas.paths import atomic_write
from nas.tasks.shapes import Task
from nas.teachers.embedded import EmbeddedTeacher, TeacherSettings, load_embedded, read_teacher, save_teacher

CAPTION_DROP = 0.1
EMA = 0.999
WARM_UP = 50  # steps of linearly rising learning rate
DECAY_FROM = 0.6  # share of the run after which the learning rate falls linearly to zero
CURVE = ("step", "samples", "cpu_s", "train_mse", "held_out_mse")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, curve, teacher and record")
    parser.add_argument("--relations", type=int, default=2, choices=(2, 4))
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--high-noise", type=float, default=0.5, help="share of training times that lean to high noise")
    parser.add_argument("--start", type=Path, help="teacher file to begin from")
    parser.add_argument("--bf16", action="store_true", help="autocast forward passes to bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=200, help="steps between curve points and checkpoints")
    parser.add_argument("--prompts", type=int, default=512, help="held-out and mixed prompts scored at the end, each")
    return parser.parse_args()


def start_from(model: EmbeddedTeacher, path: Path) -> None:
    """Loads another teacher's weights; the text field, where that teacher has none, starts at zero."""
    missing, unexpected = model.load_state_dict(read_teacher(path)[1], strict=False)
    if unexpected or any(".said." not in name for name in missing):
        raise SystemExit(f"{path} is not a teacher of this shape: missing {missing}, unexpected {unexpected}")
    if missing:
        last = model.layout.said[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)


class Run:
    """The state that a checkpoint holds and a step changes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.task = Task(relations=options.relations)
        torch.manual_seed(options.seed)
        null = tuple(self.task.tokens([None])[0].tolist())
        settings = TeacherSettings(vocabulary=self.task.vocabulary_size, null_tokens=null, mean=self.task.background)
        self.model = EmbeddedTeacher(settings)
        if options.start:
            start_from(self.model, options.start)
        self.model.to(options.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.98), fused=True)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step, self.cpu_s, self.curve = 0, 0.0, []
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    def load(self) -> None:
        """Goes on from the checkpoint."""
        state = torch.load(self.checkpoint, weights_only=True, map_location=self.options.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.cpu_s, self.curve = state["step"], state["cpu_s"], state["curve"]

    def save(self) -> None:
        """Writes checkpoint and curve; the checkpoint is replaced whole."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "cpu_s": self.cpu_s,
            "curve": self.curve,
        }
        temporary = self.checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)
        with (self.options.out / "curve.csv").open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([CURVE, *self.curve])

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear fall to zero."""
        done = self.step / self.options.steps
        return self.options.lr * min(1.0, (self.step + 1) / WARM_UP, (1 - done) / (1 - DECAY_FROM))

    def batch(self, split: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noisy images, times, token ids and velocities; some captions dropped in training."""
        captions = self.task.sample(count, split, generator)
        clean = self.task.render(captions, generator)
        drop = torch.rand(count, generator=generator) < (CAPTION_DROP if split == "train" else 0.0)
        tokens = self.task.tokens([None if gone else c for c, gone in zip(captions, drop.tolist(), strict=True)])
        noise = torch.randn(clean.shape, generator=generator)
        t = sample_times(count, generator, self.options.high_noise if split == "train" else 0.5)
        made = (noised(clean, noise, t), t, tokens, noise - clean)
        return tuple(tensor.to(self.options.device) for tensor in made)

    def train_step(self) -> float:
        """One update of model and EMA; returns the batch's loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        x, t, tokens, velocity = self.batch("train", self.options.batch, self.generator)
        with torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.options.bf16):
            predicted = self.model(x, t, tokens)
        loss = functional.mse_loss(predicted.float(), velocity)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        rate = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - rate)
        return float(loss.detach())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The EMA weights' loss on 512 fixed examples of held-out captions."""
        x, t, tokens, velocity = self.batch("held-out", 512, torch.Generator().manual_seed(12345))
        return float(functional.mse_loss(self.ema(x, t, tokens), velocity))

    def train(self) -> None:
        """Steps to the end, with a curve point and a checkpoint every so often."""
        start, losses = time.process_time() - self.cpu_s, []
        while self.step < self.options.steps:
            losses.append(self.train_step())
            if self.step % self.options.every == 0 or self.step == self.options.steps:
                self.cpu_s = time.process_time() - start
                mean = sum(losses) / len(losses)
                row = (self.step, self.step * self.options.batch, round(self.cpu_s, 1), mean, self.held_out_loss())
                self.curve.append(row)
                losses = []
                self.save()
                print(" ".join(f"{name}={value:.5g}" for name, value in zip(CURVE, row, strict=True)), flush=True)


@torch.no_grad()
def score(
    teacher: EmbeddedTeacher, task: Task, split: str, prompts: int, picture: Path, seed: int = 777
) -> dict[str, float]:
    """The checker's means over random captions of a split: Euler 20 steps, guidance 2; a picture of the first 64."""
    generator = torch.Generator().manual_seed(seed)
    captions = task.sample(prompts, split, generator)
    images = []
    for first in range(0, len(captions), 128):
        text = teacher.encode(task.tokens(captions[first : first + 128]))
        images.append(sample(teacher, text, teacher.null_text(), shape=task.image_shape, generator=generator).cpu())
    Image.fromarray(task.grid(torch.cat(images)[:64])).save(picture, optimize=True)
    return {"prompts": prompts} | task.check(torch.cat(images), captions).means()


def ship(run: Run) -> dict[str, Any]:
    """Writes the teacher in float16 and, beside it, how it came to be and how well that very file draws."""
    options = run.options
    path = options.out / f"shapes{options.relations}.safetensors"
    content = save_teacher(path, run.ema, dtype=torch.float16).read_bytes()
    teacher = load_embedded(path)
    record = {
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "command": " ".join(["python", "benchmarks/train_teacher.py", *sys.argv[1:]]),
        "settings": asdict(teacher.settings),
        "training": {
            "relations": options.relations,
            "steps": run.step,
            "samples": run.step * options.batch,
            "cpu_s": round(run.cpu_s, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "sampling": "Euler, 20 steps, guidance 2, starting noise and captions from seed 777",
        "scores": {
            split: score(teacher, run.task, split, options.prompts, path.with_name(f"{path.stem}-{split}.png"))
            for split in ("held-out", "all")
        },
        "curve": [dict(zip(CURVE, row, strict=True)) for row in run.curve],
    }
    atomic_write(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    """Trains, writes the teacher and its record, prints the checker's scores."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{size} parameters, {run.task.relations} relations, from step {run.step}", file=sys.stderr)
    run.train()
    record = ship(run)
    for split, values in record["scores"].items():
        print(f"{split}: " + " ".join(f"{name}={value:.4g}" for name, value in values.items()))


if __name__ == "__main__":
    main()
