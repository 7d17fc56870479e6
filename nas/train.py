"""Training at length: a candidate's small copy learns the embedded task from the teacher, is sampled and is checked.

The same loop, rule of scale and preconditioning as the proxy, with fresh drawings at every step. A full-size network on
real images needs data and an accelerator that this recipe does not ask for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nas import registry
from nas.build import Network
from nas.checkpoint import load_network, read_metadata, save_network
from nas.diffusion import Denoiser, FlowDenoiser, Preconditioner, sample
from nas.distill import Checkpoints, Progress, TrainSettings, checkpoint_files, train
from nas.errors import NasError
from nas.objectives import objective
from nas.paths import atomic_write, writable_dir
from nas.provenance import provenance
from nas.quality import ProxySettings, embedded_lesson, small_copy, student, teacher_hash
from nas.space import Candidate
from nas.targets import Fresh, Lesson

Report = Callable[[str, int, int, str], None]  # stage, done, total, note

WEIGHTS, LOSSES, GRID, RESULT = "network.safetensors", "losses.csv", "grid.png", "result.json"
_IDENTITY, _CHECKPOINTS = "identity.json", "checkpoints"
_GRID_IMAGES = 32
_SAMPLED = 64  # images per sampling batch
_CAPTION_SEED, _NOISE_SEED = 777, 778  # the same captions and starting noise for whoever is compared


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """One full run.

    Attributes:
        steps: optimiser steps.
        batch: fresh drawings per step.
        lr: peak learning rate.
        width_divisor: what widths and head width are divided by.
        norm_groups: groups of every GroupNorm.
        patch: pixels folded into channels per side.
        null_every: every n-th drawing is trained without its caption, which guidance needs.
        text_weight: weight of the text objective; above 0 every drawing is asked with and without its caption.
        seed: of initialisation and drawings.
        precision: "fp32", or "bf16" autocast.
        task: the plug-in of nas/tasks/.
        checkpoint_every: steps between checkpoints.
        prompts: images that the checker scores, per set of captions.
        sampling_steps: Euler steps per image.
        guidance: of sampling.
    """

    steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    width_divisor: int = 16
    norm_groups: int = 4
    patch: int = 4
    null_every: int = 10
    text_weight: float = 0.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    task: str = "shapes"
    checkpoint_every: int = 100
    prompts: int = 256
    sampling_steps: int = 20
    guidance: float = 2.0

    @property
    def schedule(self) -> TrainSettings:
        """The loop's settings."""
        return TrainSettings(
            steps=self.steps, batch=self.batch, lr=self.lr, warmup=100, precision=self.precision, seed=self.seed
        )

    @property
    def scale(self) -> ProxySettings:
        """The rule of scale, as the proxy has it."""
        return ProxySettings(
            task=self.task, width_divisor=self.width_divisor, norm_groups=self.norm_groups, patch=self.patch
        )


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: holds network.safetensors, losses.csv, grid.png and result.json.
        weights: the averaged network.
        grid: sampled images, captions of the held-out set.
        scores: set of captions ("held-out", "all") -> what the checker says of the student.
        teacher_scores: the same of the teacher, for the same captions and starting noise.
        held_out_loss: mse of the student's velocity against the teacher's on drawings of held-out captions.
        params: parameters of the trained network.
        seconds: of training.
        resumed_from: step at which an earlier run was taken up, None for a fresh one.
    """

    folder: Path
    weights: Path
    grid: Path
    scores: dict[str, dict[str, float]]
    teacher_scores: dict[str, dict[str, float]]
    held_out_loss: float
    params: int
    seconds: float
    resumed_from: int | None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Images [B, C, H, W] in [-1, 1] for captions, where they were written, and what the checker says."""

    images: Tensor
    grid: Path
    captions: tuple[str, ...]
    correct: tuple[bool, ...]
    scores: dict[str, float]


def train_candidate(
    candidate: Candidate,
    settings: RecipeSettings,
    out: Path,
    *,
    teacher: str = "embedded",
    resume: bool = True,
    device: str = "cpu",
    report: Report | None = None,
) -> TrainResult:
    """Trains, samples and checks; a run that was killed and is started again goes on where it was.

    Args:
        candidate: whose structure is trained.
        settings: the recipe.
        out: folder of the run.
        teacher: as for `nas.teachers.load_teacher`.
        resume: take up the run in `out`; False refuses a folder that has one.
        device: "cpu" or "cuda".
        report: called with stage, done, total and a note.

    Raises:
        NasError: the folder belongs to another run or cannot be written, the loss is not finite, or the candidate
            cannot be scaled down.
    """
    tell = report or (lambda stage, done, total, note: None)
    loaded, lesson = embedded_lesson(teacher, settings.task)
    spec = small_copy(candidate, loaded, settings.scale)
    identity = {
        "candidate": candidate.key,
        "choices": candidate.choices,
        "space": candidate.space.name,
        "network": spec.key,
        "teacher": teacher,
        "teacher_digest": teacher_hash(teacher),
        "settings": asdict(settings),
    }
    folder = _claim(writable_dir(out), identity, resume)
    loaded.to(device)
    fresh = student(spec, loaded, settings.patch, settings.seed).to(device)
    weighted = (objective("text", weight=settings.text_weight),) if settings.text_weight > 0 else ()
    data = Fresh(
        lesson=lesson,
        size=settings.batch,
        seed=settings.seed,
        null_every=settings.null_every,
        both=bool(weighted),
        device=torch.device(device),
    )
    trained = train(
        fresh,
        data,
        (objective("output"), *weighted),
        settings.schedule,
        checkpoints=Checkpoints(folder=folder / _CHECKPOINTS, every=settings.checkpoint_every),
        on_progress=lambda history: _record(folder, history, tell),
    )
    result = _finish(trained.average, lesson, settings, folder, identity, tell)
    summary = TrainResult(
        folder=folder,
        params=sum(p.numel() for p in fresh.parameters()),
        seconds=trained.history[-1].seconds,
        resumed_from=trained.resumed_from,
        **result,
    )
    plain = {k: v for k, v in asdict(summary).items() if k not in ("folder", "weights", "grid")}
    record = {**plain, "identity": identity, "provenance": provenance(seed=settings.seed)}
    atomic_write(folder / RESULT, json.dumps(record, indent=1) + "\n")
    loaded.to("cpu")
    return summary


def sample_checkpoint(
    weights: Path,
    captions: Sequence[str],
    grid: Path,
    *,
    count: int = 1,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 2.0,
    device: str = "cpu",
) -> Sampled:
    """Images of captions from a network that `train_candidate` wrote, or that file's folder.

    Args:
        weights: network.safetensors or the folder that holds it.
        captions: sentences of the task; none takes random held-out ones, `count` of them.
        grid: PNG to write.
        count: images per caption.
        seed: of the starting noise, and of the captions where none are given.
        steps: Euler steps.
        guidance: of classifier-free guidance.
        device: "cpu" or "cuda".

    Raises:
        UsageError: a caption is not one of the task's.
        NasError: no such file, a file of another kind, or one whose teacher has changed.
    """
    path = weights / WEIGHTS if weights.is_dir() else weights
    denoiser, lesson, plugin = load_student(path, device)
    generator = torch.Generator().manual_seed(seed)
    if captions:
        asked = [plugin.parse(text) for text in captions for _ in range(count)]
    else:
        asked = lesson.task.sample(count, "held-out", generator)
    images = _images(denoiser, lesson, asked, generator, steps=steps, guidance=guidance)
    scores = lesson.task.check(images, asked)
    _write_png(grid, lesson.task.grid(images))
    return Sampled(
        images=images,
        grid=grid,
        captions=tuple(caption.text for caption in asked),
        correct=tuple(bool(flag) for flag in scores.correct),
        scores=scores.means(),
    )


def load_student(path: Path, device: str = "cpu") -> tuple[FlowDenoiser, Lesson, Any]:
    """The trained denoiser, its lesson and its task's module.

    Raises:
        NasError: no such file, no student's file, or one whose teacher (its text encoder is needed) has changed.
    """
    about = read_metadata(path)
    if "preconditioner" not in about:
        raise NasError(f"{path} is not a network that nas train wrote", hint="nas train STUDY#CANDIDATE")
    if teacher_hash(about["teacher"]) != about["teacher_digest"]:
        raise NasError(
            f"{path} was trained with another version of the teacher {about['teacher']!r}, whose text it reads",
            hint="train it again: nas train STUDY#CANDIDATE",
        )
    loaded, lesson = embedded_lesson(about["teacher"], about["task"])
    loaded.to(device)
    given = about["preconditioner"]
    preconditioner = Preconditioner(mean=tuple(given["mean"]), sd=given["sd"])
    denoiser = FlowDenoiser(load_network(path, device), preconditioner, patch=about["patch"]).eval()
    return denoiser, lesson, registry.load("nas.tasks", about["task"])


def _claim(folder: Path, identity: dict[str, Any], resume: bool) -> Path:
    """Marks `folder` as this run's, or checks that it is."""
    asked, path = json.loads(json.dumps(identity)), folder / _IDENTITY
    if not path.is_file():
        atomic_write(path, json.dumps(asked, indent=1) + "\n")
        return folder
    if not resume and checkpoint_files(folder / _CHECKPOINTS):
        raise NasError(f"{folder} already holds a run", hint="resume it, or choose another folder with --out")
    saved = json.loads(path.read_text())
    if saved != asked:
        differing = sorted(key for key in asked if saved.get(key) != asked[key])
        if differing == ["settings"]:
            differing = [key for key, value in asked["settings"].items() if saved["settings"].get(key) != value]
        raise NasError(
            f"the run in {folder} differs from this one in {', '.join(differing)}",
            hint="choose another folder with --out",
        )
    return folder


def _record(folder: Path, history: Sequence[Progress], tell: Report) -> None:
    """Writes the losses so far and tells how far the run is."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "loss", *history[0].terms, "lr", "seconds"])
    for line in history:
        numbers = [line.loss, *line.terms.values(), line.lr]
        writer.writerow([line.step, *(f"{number:.6g}" for number in numbers), f"{line.seconds:.1f}"])
    atomic_write(folder / LOSSES, buffer.getvalue())
    last = history[-1]
    tell("train", last.step, last.steps, f"loss {last.loss:.4f}")


def _finish(
    average: FlowDenoiser,
    lesson: Lesson,
    settings: RecipeSettings,
    folder: Path,
    identity: dict[str, Any],
    tell: Report,
) -> dict[str, Any]:
    """Saves the averaged network, samples it and the teacher alike, and lets the checker judge both."""
    network = average.network
    assert isinstance(network, Network)
    about = {**identity, "preconditioner": asdict(average.preconditioner)}
    about |= {"patch": settings.patch, "task": settings.task}
    weights = save_network(folder / WEIGHTS, network, about)
    scores: dict[str, dict[str, float]] = {}
    teacher_scores: dict[str, dict[str, float]] = {}
    for number, split in enumerate(("held-out", "all")):
        captions = lesson.task.sample(settings.prompts, split, torch.Generator().manual_seed(_CAPTION_SEED))
        for name, denoiser, into in (("student", average, scores), ("teacher", lesson.teacher, teacher_scores)):
            tell("sample", 2 * number + (name == "teacher"), 4, f"{name}, {split} captions")
            images = _images(
                denoiser,
                lesson,
                captions,
                torch.Generator().manual_seed(_NOISE_SEED),
                steps=settings.sampling_steps,
                guidance=settings.guidance,
            )
            into[split] = lesson.task.check(images, captions).means()
            if name == "student" and split == "held-out":
                grid = _write_png(folder / GRID, lesson.task.grid(images[:_GRID_IMAGES]))
    tell("sample", 4, 4, "")
    return {
        "weights": weights,
        "grid": grid,
        "scores": scores,
        "teacher_scores": teacher_scores,
        "held_out_loss": _held_out_loss(average, lesson, settings),
    }


@torch.no_grad()
def _held_out_loss(average: FlowDenoiser, lesson: Lesson, settings: RecipeSettings) -> float:
    device = next(average.parameters()).device
    data = Fresh(lesson=lesson, size=256, seed=_CAPTION_SEED, null_every=0, device=device, splits=("held-out",))
    batch = data.batch(0)
    difference = average.velocity(batch.x, batch.t, batch.text) - batch.teacher.velocity
    return float(difference.square().mean())


def _images(
    denoiser: Denoiser,
    lesson: Lesson,
    captions: Sequence[Any],
    generator: torch.Generator,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """One image [B, C, H, W] on the CPU per caption, in batches that each continue the generator."""
    shape = lesson.task.image_shape
    parts = [
        sample(
            denoiser,
            lesson.text(captions[first : first + _SAMPLED]),
            lesson.teacher.null_text(),
            shape=shape,
            generator=generator,
            steps=steps,
            guidance=guidance,
        ).cpu()
        for first in range(0, len(captions), _SAMPLED)
    ]
    return torch.cat(parts)


def _write_png(path: Path, pixels: Any) -> Path:
    """Writes uint8 [H, W, 3] four times enlarged, for eyes."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return atomic_write(path, buffer.getvalue())
