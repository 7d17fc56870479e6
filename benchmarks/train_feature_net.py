"""Trains the classifier behind shapes-FD and writes it with its reference statistics and a record of how it was made.

    OMP_NUM_THREADS=1 python benchmarks/train_feature_net.py

About three minutes on one core, and four more for the teacher's samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from nas.batches import stream
from nas.diffusion import sample
from nas.judge.frechet import Statistics, frechet_distance
from nas.judge.shapes_features import (
    ANSWERS,
    DRAWINGS,
    DRAWINGS_SEED,
    FILE,
    FORMAT,
    TOTAL_VARIANCE,
    FeatureNet,
    drawn_statistics,
    packed,
    shapes_statistics,
)
from nas.paths import atomic_write, package_data
from nas.tasks.shapes import Caption, Task, detect
from nas.tasks.shapes.captions import COLOURS, RELATIONS, SHAPES
from nas.tasks.shapes.scenes import SIZE
from nas.teachers import load_teacher

CLASSES = [name for name in ANSWERS if name != "places"]
PLACES_WEIGHT = 20.0  # squared errors are of shares of the side, far smaller than cross-entropies

MOST_GRAIN = 0.4  # standard deviation of what is added, of images in [-1, 1]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=package_data("judge"))
    parser.add_argument("--pool", type=int, default=12288, help="drawings that are trained on, again and again")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-samples", type=int, default=1024, help="per split")
    return parser.parse_args()


def answers(captions: Sequence[Caption], images: Tensor) -> dict[str, Tensor]:
    """What the classifier should say of drawings; places that the checker could not read are NaN."""
    rows: dict[str, list[int]] = {name: [] for name in CLASSES}
    places = torch.full((len(captions), 4), float("nan"))
    for index, (caption, found) in enumerate(zip(captions, detect(images), strict=True)):
        ordered = caption.reading_order
        first, second = ordered.first, ordered.second
        rows["first_colour"].append(COLOURS.index(first.colour))
        rows["first_shape"].append(SHAPES.index(first.shape))
        rows["second_colour"].append(COLOURS.index(second.colour) if second else len(COLOURS))
        rows["second_shape"].append(SHAPES.index(second.shape) if second else len(SHAPES))
        rows["relation"].append(1 + RELATIONS.index(ordered.relation) if second else 0)
        for place, thing in enumerate(ordered.things):
            for each in found:
                if (each.colour, each.shape) == (thing.colour, thing.shape):
                    places[index, 2 * place : 2 * place + 2] = torch.tensor([each.x, each.y]) / SIZE
    return {name: torch.tensor(values) for name, values in rows.items()} | {"places": places}


def drawn(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Drawings of all captions, and the right answers."""
    task, generator = Task(), stream(seed)
    captions = task.sample(count, "all", generator)
    images = task.render(captions, generator)
    return images, answers(captions, images)


def loss(said: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Cross-entropies of the classes, and the squared error of the places that are known."""
    classes = sum((functional.cross_entropy(said[name], right[name]) for name in CLASSES), torch.zeros(()))
    known = ~right["places"].isnan()
    return classes + PLACES_WEIGHT * functional.mse_loss(said["places"][known], right["places"][known])


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings as networks may draw them: with grain, blurred, in another light, each in half of the images.

    A classifier of clean drawings alone answers anything else at random: the slightest grain, which no eye minds, would
    outweigh a wrong shape in its features.
    """
    count = len(images)
    chance = torch.rand((3, count, 1, 1, 1), generator=generator)
    amount = torch.rand((3, count, 1, 1, 1), generator=generator)
    blurred = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.where(chance[0] < 0.5, images + amount[0] * (blurred - images), images)
    centre = images.mean((2, 3), keepdim=True)
    lighter = 0.15 * (2 * torch.rand((count, 1, 1, 1), generator=generator) - 1)
    other = centre + (0.6 + 0.6 * amount[1]) * (images - centre) + lighter
    images = torch.where(chance[1] < 0.5, other, images)
    grain = MOST_GRAIN * amount[2] * torch.randn(images.shape, generator=generator)
    return torch.where(chance[2] < 0.5, images + grain, images).clamp(-1, 1)


def train(options: argparse.Namespace) -> tuple[FeatureNet, float]:
    """The trained classifier, and the seconds of it."""
    began = time.perf_counter()
    images, right = drawn(options.pool, options.seed)
    torch.manual_seed(options.seed)
    network, generator = FeatureNet(), stream(options.seed, 1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.lr, options.steps)
    for step in range(options.steps):
        rows = torch.randint(options.pool, (options.batch,), generator=generator)
        found = loss(
            network(disturbed(images[rows], generator)), {name: values[rows] for name, values in right.items()}
        )
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: loss {float(found.detach()):.4f}, {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
            )
    seconds = time.perf_counter() - began
    # What is shipped is float16: everything below is of the network as it will be loaded.
    network = network.half().float().requires_grad_(False).eval()
    variance = float(drawn_statistics(network=network).covariance.trace())
    network.scale = torch.tensor((TOTAL_VARIANCE / variance) ** 0.5).half().float()
    return network, seconds


@torch.no_grad()
def accuracy(network: FeatureNet, seed: int = 10_001, count: int = 2048) -> dict[str, float]:
    """Shares of new drawings answered right, and the mean distance of the places in pixels."""
    images, right = drawn(count, seed)
    said = network(images)
    hits = {name: said[name].argmax(1) == right[name] for name in CLASSES}
    everything = torch.stack(list(hits.values())).all(0)
    apart = (said["places"] - right["places"]).view(-1, 2).square().sum(1).sqrt() * SIZE
    return (
        {"drawings": count}
        | {name: float(flags.float().mean()) for name, flags in hits.items()}
        | {"all_classes": float(everything.float().mean()), "place_error_px": float(apart.nanmean())}
    )


def teacher_statistics(network: FeatureNet, split: str, count: int) -> Statistics:
    """Statistics of the embedded teacher's samples: Euler, 20 steps, guidance 2."""
    task, teacher, parts = Task(), load_teacher(), []
    for index in range(0, count, 64):
        generator = stream(DRAWINGS_SEED, 1, index)
        captions = task.sample(min(64, count - index), split, generator)
        with torch.no_grad():
            text, null = teacher.encode(task.tokens(captions)), teacher.null_text()
        parts.append(sample(teacher, text, null, shape=task.image_shape, generator=generator))
        print(f"teacher, {split} captions: {index + len(captions)}/{count}", file=sys.stderr)
    return shapes_statistics(torch.cat(parts), network)


def main() -> None:
    """Trains, gathers the references, writes the file and its record."""
    options = arguments()
    network, seconds = train(options)
    found = {f"drawings.{split}": drawn_statistics(split=split, network=network) for split in ("all", "held-out")}
    for split in ("all", "held-out"):
        found[f"teacher.{split}"] = teacher_statistics(network, split, options.teacher_samples)
    state = network.state_dict().items()
    tensors = {f"net.{name}": value.half().contiguous() for name, value in state if value.is_floating_point()}
    for name, each in found.items():
        tensors |= packed(name, each)
    content = save(tensors, {"format": FORMAT})
    path = atomic_write(options.out / FILE, content)
    other = {
        split: drawn_statistics(options.teacher_samples, split, DRAWINGS_SEED + 1, network)
        for split in ("all", "held-out")
    }
    record = {
        "file": FILE,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "command": " ".join(["python", "benchmarks/train_feature_net.py", *sys.argv[1:]]),
        "training": {
            "pool": options.pool,
            "steps": options.steps,
            "batch": options.batch,
            "lr": options.lr,
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "accuracy": accuracy(network),
        "references": {
            "drawings": {"count": DRAWINGS, "seed": DRAWINGS_SEED},
            "teacher": {"count": options.teacher_samples, "sampling": "Euler, 20 steps, guidance 2"},
        },
        "shapes_fd": {
            split: {
                "count": options.teacher_samples,
                "floor": frechet_distance(other[split], found[f"drawings.{split}"]),
                "teacher": frechet_distance(found[f"teacher.{split}"], found[f"drawings.{split}"]),
            }
            for split in ("all", "held-out")
        },
    }
    atomic_write(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["accuracy"]), json.dumps(record["shapes_fd"]))


if __name__ == "__main__":
    main()
