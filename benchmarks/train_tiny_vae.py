"""Trains the small autoencoder of the task shapes that the recipe decoder-tiny learns from, as a diffusers folder.

    OMP_NUM_THREADS=1 python benchmarks/train_tiny_vae.py

About three minutes on one core. Pictures of 32x32 become latents of 4x4 with 16 channels, an eighth of the side as in
Stable Diffusion's, with the channels of Stable Diffusion 3's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from nas.batches import stream
from nas.judge import psnr_db
from nas.paths import atomic_write, package_data
from nas.provenance import file_sha
from nas.tasks.shapes import Task
from nas.teachers.decoders import SHAPES_VAE

WEIGHTS = "diffusion_pytorch_model.safetensors"
OBJECT_WEIGHT = 4.0  # most of a scene is background, which is learnt at once
LATENT_WEIGHT = 1e-3  # keeps the latents near 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=package_data("teachers", SHAPES_VAE))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def network(seed: int) -> AutoencoderKL:
    """Four stages; the mean of its latents is used, as `nas cache` does."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def pictures(count: int, split: str, *numbers: int) -> torch.Tensor:
    """New drawings [count, 3, 32, 32]."""
    task, generator = Task(), stream(*numbers)
    return task.render(task.sample(count, split, generator), generator)


def main() -> None:
    """Trains, writes the folder and its record."""
    options = arguments()
    vae, began = network(options.seed), time.perf_counter()
    ground = torch.tensor(Task().background).view(1, 3, 1, 1)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.lr, options.steps)
    for step in range(options.steps):
        images = pictures(options.batch, "train", options.seed, step)
        # The mean of the distribution, as it is used here; spread would only cost steps.
        z = vae.encode(images).latent_dist.mode()
        difference = vae.decode(z).sample - images
        weight = torch.where((images - ground).abs().amax(1, keepdim=True) > 0.05, OBJECT_WEIGHT, 1.0)
        loss = (weight * (difference.abs() + difference.square())).mean() + LATENT_WEIGHT * z.square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: loss {float(loss.detach()):.4f}, {seconds:.0f} s", file=sys.stderr)
    seconds = time.perf_counter() - began
    vae = vae.eval().requires_grad_(False)
    task, generator = Task(), stream(options.seed, options.steps, 2)
    captions = task.sample(512, "held-out", generator)
    held = task.render(captions, generator)
    z = vae.encode(held).latent_dist.mode()
    # As Stable Diffusion's: one number that gives the latents a variance of about 1.
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 5))
    vae.half().save_pretrained(options.out)
    loaded = AutoencoderKL.from_pretrained(options.out)
    with torch.no_grad():
        again = loaded.decode(loaded.encode(held).latent_dist.mode()).sample
    record = {
        "command": " ".join(["python", "benchmarks/train_tiny_vae.py", *sys.argv[1:]]),
        "bytes": (options.out / WEIGHTS).stat().st_size,
        "sha256": file_sha(options.out / WEIGHTS),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "steps": options.steps,
        "batch": options.batch,
        "lr": options.lr,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scaling_factor": vae.config.scaling_factor,
        "held_out_psnr_db": round(psnr_db(again, held), 2),
        "held_out_correct": task.check(again, captions).means()["correct"],
    }
    atomic_write(options.out / "record.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
