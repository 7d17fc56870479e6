"""`nas cache`: images and captions, or prompts, made ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, closing, command_line, note, result, result_json, resumable
from nas.errors import NasError, UsageError, unknown

if TYPE_CHECKING:
    from nas.tasks.latents import Store, Targets


def cache(
    images: Annotated[
        Path | None,
        typer.Argument(help="A folder of images with captions, or of webdataset .tar shards of images and texts."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the data; what a stopped run left there is taken up.")] = Path(
        "data"
    ),
    pipeline: Annotated[
        str | None, typer.Option(help="A diffusers pipeline, folder or hub id, whose text encoders and VAE are used.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE than the pipeline's, folder or hub id.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Instead of images: a text file with one prompt per line.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PX", help="Side of the images (default: what the pipeline is made for)."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images or prompts encoded at once.")] = 8,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows per shard.")] = 1000,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Keep the pixels too, to train a decoder.")
    ] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Pass over images that cannot be decoded, and list them.")
    ] = False,
    teacher_targets: Annotated[
        str | None, typer.Option(help="A teacher whose answers about the data are computed once, too.")
    ] = None,
    times: Annotated[
        str, typer.Option(help="Noise levels of those answers: uniform, logit_normal or mixed.")
    ] = "uniform",
    out_of_range: Annotated[
        str, typer.Option(help="Noise levels that the teacher never saw: clamp or drop.")
    ] = "clamp",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of those answers.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the encoders' weights: fp32, bf16 or fp16.")] = "fp32",
    check: Annotated[
        bool, typer.Option("--check", help="Only read the data in --out in full and compare its hashes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn captioned images into latents and text embeddings, once. A stopped run goes on with the same command."""
    from nas.cache import CacheSettings, TargetSettings, cache_images, cache_prompts, cache_targets
    from nas.cache import check as read_all
    from nas.tasks.latents import Store

    if check:
        if images is not None or prompts is not None or teacher_targets is not None:
            raise UsageError("--check makes nothing: give it --out only", hint=f"nas cache --out {out} --check")
        with Progress("check") as progress:
            store = read_all(out, report=progress)
        _say(store, None, as_json, f"{len(store):,} rows read, every file has its hash")
        return
    if images is not None and prompts is not None:
        raise UsageError("give either images or --prompts, and not both")
    if images is None and prompts is None and teacher_targets is None:
        raise UsageError(
            "nas cache needs a folder of images or --prompts FILE", hint="nas cache IMAGES --pipeline ID --out FOLDER"
        )
    chosen = _device(device)
    with resumable(command_line()), Progress("cache") as progress:
        if images is None and prompts is None:
            store = Store.open(out)
        else:
            if pipeline is None:
                raise UsageError(
                    "nas cache needs --pipeline, whose text encoders read the captions",
                    hint="nas cache IMAGES --pipeline stabilityai/stable-diffusion-xl-base-1.0 --out FOLDER",
                )
            settings = CacheSettings(
                pipeline=pipeline,
                vae=vae,
                size=size,
                batch=batch,
                shard_rows=shard_rows,
                keep_images=keep_images,
                skip_unreadable=skip_unreadable,
                device=chosen,
                precision=precision,
            )
            if images is not None:
                store = cache_images(images, settings, out, report=progress)
            else:
                assert prompts is not None  # one of the two is there
                store = cache_prompts(prompts, settings, out, report=progress)
        targets = None
        if teacher_targets is not None:
            how: dict[str, Any] = {"times": times, "out_of_range": out_of_range, "seed": seed, "batch": batch}
            asked = TargetSettings(teacher=teacher_targets, device=chosen, **how)
            targets = cache_targets(out, asked, report=progress)
    _say(store, targets, as_json)
    closing(
        wrote=out,
        following=f"nas train STUDY#CANDIDATE --teacher {pipeline or 'TEACHER'} --data {out}",
        as_json=as_json,
    )


def _say(store: Store, targets: Targets | None, as_json: bool, first: str | None = None) -> None:
    """What the folder holds."""
    manifest = store.manifest
    size = sum(file.bytes for file in (*manifest.shards, *(targets.shards if targets else ())))
    for name in manifest.skipped[:3]:
        note(f"passed over, unreadable: {name}")
    if len(manifest.skipped) > 3:
        note(f"and {len(manifest.skipped) - 3:,} more; manifest.json lists them")
    if as_json:
        result_json(
            {
                "folder": store.folder,
                "rows": len(store),
                "digest": store.digest,
                "bytes": size,
                "shards": len(manifest.shards),
                "latent_shape": manifest.latent_shape,
                "conditions": manifest.conditions,
                "vae": manifest.vae,
                "text": manifest.text,
                "skipped": manifest.skipped,
                "targets": None if targets is None else {"teacher": targets.teacher, **targets.times},
            }
        )
        return
    shape = manifest.latent_shape
    what = "prompts" if shape is None else f"latents of {shape[0]}x{shape[1]}x{shape[2]}"
    parts = ", ".join(f"{name} {'x'.join(map(str, each))}" for name, each in manifest.conditions.items())
    if first is not None:
        result(first)
    result(f"{len(store):,} {what} with {parts}; {size / 1e6:,.1f} MB in {len(manifest.shards)} shards")
    if targets is not None:
        result(f"answers of {targets.teacher}: {targets.times['statement']}")


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise unknown("device to encode on", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NasError("torch sees no CUDA device here", hint="leave --device out")
    return name
