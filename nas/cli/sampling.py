"""`nas sample`, `nas evaluate`: what a trained network draws, and what that is worth beside its teacher."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, closing, note, result, result_json, table
from nas.errors import NasError, UsageError, unknown

if TYPE_CHECKING:
    from nas.judge import Comparison, Pipeline
    from nas.students import TrainedStudent

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[Path, typer.Argument(help="A run's folder, its name under runs/, or a .safetensors file of one.")]

RUNS = Path("runs")
_PROMPTS = 256  # of an evaluation, where the task has captions of its own
# What a table calls a score; what is not here is called by its own name.
_TITLES = {
    "shapes_fd": "shapes-FD",
    "shapes_fd_floor": "floor",
    "teacher_psnr_db": "dB to teacher",
    "clip_score": "CLIP score",
    "fid": "FID",
    "two_objects": "two objects",
}
_SHARES = ("count", "colour", "shape", "relation", "two_objects", "correct")


def sample(
    run: Run,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw; may be given again. Without, the embedded task takes random held-out ones."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt, or random captions.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoiser calls per image (default: the network's own).")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Of classifier-free guidance; 1 is none (default: the network's own).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; decides the noise, with the seed.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The PNG to write (default samples.png in the run).")] = None,
    as_json: Json = False,
) -> None:
    """Draw prompts with a trained network, as a PNG grid. The embedded task checks each image against its caption."""
    from nas.judge import drawn, grid, pipeline_of, write_png
    from nas.paths import writable_dir
    from nas.students import load_student

    source = _source(run)
    target = out if out is not None else _folder(source) / "samples.png"
    writable_dir(target.parent)
    with Progress("sample") as progress:
        progress("load", 0, 1, str(source))
        student = load_student(source, _device(device))
        pipeline = pipeline_of(student, device)
        sampling = student.sampling if steps is None else student.sampling.at(steps)
        sampling = _guided(student, sampling, guidance)
        asked = [text for text in prompt or () for _ in range(count)]
        prompts = pipeline.prompts(asked) if asked else pipeline.random_prompts(count, seed)
        denoiser: Any = student.denoiser
        pictures = drawn(
            denoiser,
            pipeline,
            sampling,
            prompts,
            seed=seed,
            batch=batch,
            on_progress=lambda done, total: progress("sample", done, total, f"{sampling.calls} steps"),
        )
    write_png(target, grid(pictures, columns=count if prompt and count > 1 else 8))
    texts = [str(getattr(each, "text", each)) for each in prompts]
    right = pipeline.right(pictures, prompts)
    scores = pipeline.judged(pictures, prompts) if right is not None and len(prompts) > 1 else {}
    if as_json:
        images = [
            {"prompt": text} | ({} if right is None else {"correct": right[index]}) for index, text in enumerate(texts)
        ]
        told = {"steps": sampling.calls, "guidance": sampling.guidance, "seed": seed, "batch": batch}
        result_json({"run": source, "grid": target, **told, "images": images, "scores": scores})
    else:
        for index, text in enumerate(texts):
            result(text if right is None else f"{'right' if right[index] else 'wrong'}  {text}")
        if scores:
            result(", ".join(f"{_title(name)} {scores[name]:.1%}" for name in _SHARES if not math.isnan(scores[name])))
    closing(wrote=target, following=f"nas evaluate {run}", as_json=as_json)


def evaluate(
    run: Run,
    prompts: Annotated[
        str, typer.Option(help="How many random captions of the embedded task, or a file with a prompt per line.")
    ] = str(_PROMPTS),
    steps: Annotated[
        str | None, typer.Option(help="Of the student, such as 1,2,4 (default: the network's own).")
    ] = None,
    teacher_steps: Annotated[str, typer.Option(help="Of the teacher; the last is whom the student is held to.")] = "20",
    split: Annotated[str, typer.Option(help="Of the embedded task's captions: held-out, train or all.")] = "held-out",
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Of classifier-free guidance (default: the student's own).")
    ] = None,
    teacher_guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Of the teacher (default: the student's, or the pipeline's usual).")
    ] = None,
    fid_weights: Annotated[
        str | None, typer.Option(help="Inception as TorchScript, for FID: a path, or OWNER/REPOSITORY/FILE of the hub.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="A CLIP model of transformers, for the CLIP score: a folder or a hub id.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder of real pictures for FID (default: the task's, else the teacher's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random captions and the noise.")] = 777,
    batch: Annotated[int, typer.Option(min=1, help="Images at once, also when timed.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of evaluation.json and .png (default the run's).")] = None,
    as_json: Json = False,
) -> None:
    """Judge a trained network beside its teacher: same prompts, same noise, at several numbers of steps.

    Of an image decoder: the pictures that it and its teacher make of the same latents.
    """
    import torch

    from nas.judge import compare, grid, load_clip, load_inception, pipeline_of, read_pictures, write_png
    from nas.paths import writable_dir
    from nas.students import load_student
    from nas.teachers.decoders import Decoder

    source = _source(run)
    folder = writable_dir(out if out is not None else _folder(source))
    wanted, teachers = _numbers("--steps", steps or ""), _numbers("--teacher-steps", teacher_steps)
    with Progress("evaluate") as progress:
        progress("load", 0, 1, str(source))
        # Networks of others first: a path that is wrong must not cost minutes of sampling.
        metrics: list[Any] = [] if fid_weights is None else [load_inception(fid_weights)]
        metrics += [] if clip is None else [load_clip(clip)]
        student = load_student(source, _device(device))
        if isinstance(student.denoiser, Decoder):
            options = {
                "--steps": steps,
                "--guidance": guidance,
                "--teacher-guidance": teacher_guidance,
                "--fid-weights": fid_weights,
                "--clip": clip,
            }
            _evaluate_decoder(student, options, prompts, real, seed, batch, folder, as_json)
            return
        pipeline = pipeline_of(student, device, split)
        for number in wanted:
            student.sampling.at(number)  # refuses what the network cannot do
        student = replace(student, sampling=_guided(student, student.sampling, guidance))
        asked = _prompts(prompts, pipeline, seed)
        against = None if real is None else read_pictures(real, _picture_size(pipeline))
        found = compare(
            student,
            pipeline,
            asked,
            steps=wanted,
            teacher_steps=teachers,
            teacher_guidance=teacher_guidance,
            metrics=metrics,
            against=against,
            seed=seed,
            batch=batch,
            report=progress,
        )
    compared = str(real) if real is not None else found.against
    record = {
        "run": str(source),
        "prompts": len(found.prompts),
        "prompts_from": prompts,
        "split": split if getattr(pipeline, "split", None) else None,
        "seed": seed,
        "guidance": student.sampling.guidance,
        "teacher_guidance": found.teacher_guidance,
        "fid_against": compared if fid_weights is not None else None,
        "rows": [asdict(row) for row in found.rows],
    }
    path = _write_record(folder, record, seed)
    rows = list(found.pictures.values())
    write_png(folder / "evaluation.png", grid(torch.cat(rows), columns=len(rows[0])))
    if as_json:
        result_json(record)
    else:
        _say(found, source, compared if fid_weights is not None else None)
    closing(wrote=path, following=f"nas export {_weights(source)}", as_json=as_json)


def _say(found: Comparison, source: Path, fid_against: str | None) -> None:
    """The comparison as a table: a row per network and number of steps."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.scores))
    rows = []
    for row in found.rows:
        values: list[object] = [_cell(name, row.scores.get(name)) for name in names]
        timed = (None, None) if math.isnan(row.images_per_second) else (row.evaluations, row.images_per_second)
        rows.append((row.who, row.steps or None, *values, *timed))
    result(
        f"{source}: {len(found.prompts)} prompts, seed {found.seed}, the same noise for all; the teacher has guidance"
        f" {found.teacher_guidance:g}"
    )
    result(table(("", "steps", *map(_title, names), "calls", "images/s"), rows))
    batch = max(row.batch for row in found.rows)
    note(f"calls: network evaluations per image, guidance counted; images/s: warm, {batch} at once, without decoding")
    if "shapes_fd" in names:
        note("shapes-FD is this task's own Fréchet distance, no FID; floor: that of as many real drawings")
    if fid_against is not None:
        note(f"FID to {fid_against}; it compares only with FIDs of {len(found.prompts)} pictures")


def _cell(name: str, value: float | None) -> object:
    if value is None or math.isnan(value):
        return None
    return f"{value:.1%}" if name in _SHARES else value


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _evaluate_decoder(
    student: TrainedStudent,
    options: dict[str, Any],
    count: str,
    real: Path | None,
    seed: int,
    batch: int,
    folder: Path,
    as_json: bool,
) -> None:
    """The table, record and pictures of an image decoder.

    Raises:
        UsageError: an option that decoders have no use for, or no pictures to encode.
    """
    import torch

    from nas.judge import decoder_scores, drawings, grid, read_pictures, write_png
    from nas.teachers.decoders import EMBEDDED, load_decoder

    useless = [name for name, value in options.items() if value is not None]
    if useless:
        raise UsageError(f"{student.path} is an image decoder, which has no use for {', '.join(useless)}")
    name = str(student.about["teacher"])
    device = next(student.denoiser.parameters()).device
    teacher, vae = load_decoder(name, device=device)
    if real is None and name != EMBEDDED:
        raise UsageError("a decoder is judged on pictures, and there are none", hint="--real FOLDER")
    if real is not None:
        spec: Any = student.denoiser.network.spec
        pictures = read_pictures(real, (spec.input.height * vae.factor, spec.input.width * vae.factor))
    elif count.isdecimal():
        pictures = torch.cat(list(drawings(int(count), "held-out", seed)))
    else:
        raise UsageError(f"--prompts must be a number of drawings for a decoder, got {count!r}")
    found = decoder_scores(student.denoiser, teacher, vae, pictures, batch)
    numbers = {key: value for key, value in asdict(found).items() if key != "pictures"}
    record = {"run": str(student.path), "pictures": len(pictures), "from": str(real or "drawings"), **numbers}
    path = _write_record(folder, record, seed)
    write_png(folder / "evaluation.png", grid(found.pictures, columns=len(found.pictures) // 3))
    if as_json:
        result_json(record)
    else:
        result(f"{student.path}: {len(pictures)} pictures, encoded by {name} and painted again")
        rows = [
            ("student", found.params, found.teacher_db, found.real_db, found.images_per_second),
            ("teacher", found.teachers_params, None, found.teachers_real_db, found.teachers_images_per_second),
        ]
        result(table(("", "parameters", "dB to teacher", "dB to picture", "images/s"), rows))
        note(f"images/s: warm, {found.batch} at once; the grid has pictures, teacher and student in that order")
    closing(wrote=path, following=f"nas export {student.path}", as_json=as_json)


def _write_record(folder: Path, record: dict[str, Any], seed: int) -> Path:
    """evaluation.json: the numbers and what made them."""
    from nas.paths import atomic_write
    from nas.provenance import provenance

    stamped = _finite({**record, "provenance": provenance(seed=seed)})
    return atomic_write(folder / "evaluation.json", json.dumps(stamped, indent=1, allow_nan=False) + "\n")


def _source(run: Path) -> Path:
    """Where the run is.

    Raises:
        UsageError: nowhere; the nearest is offered.
    """
    source = run if run.exists() or not (RUNS / run).exists() else RUNS / run
    if not source.exists():
        known = [folder.name for folder in RUNS.glob("*") if folder.is_dir()]
        raise unknown("run", run, known, where=f"{RUNS}/", hint="nas train STUDY#CANDIDATE")
    return source


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _weights(source: Path) -> Path:
    return source / "network.safetensors" if source.is_dir() else source


def _guided(student: TrainedStudent, sampling: Any, guidance: float | None) -> Any:
    """The sampling with another guidance.

    Raises:
        UsageError: a few-step network whose guidance was fixed when it was distilled.
    """
    from nas.students import takes_guidance

    if guidance is None:
        return sampling
    if sampling.times and not takes_guidance(student.denoiser):
        raise UsageError(
            f"{student.path} was distilled to few steps with its guidance in it, so --guidance changes nothing",
            hint="leave --guidance out",
        )
    return replace(sampling, guidance=guidance)


def _prompts(given: str, pipeline: Pipeline, seed: int) -> list[Any]:
    """Random prompts by number, or those of a file."""
    if given.isdecimal():
        return pipeline.random_prompts(int(given), seed)
    path = Path(given)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts must be a number or a text file with a prompt per line, got {given!r}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 2:
        raise UsageError(f"{path} holds {len(texts)} prompts, and a comparison needs at least 2")
    return pipeline.prompts(texts)


def _numbers(option: str, given: str) -> list[int]:
    """Rising whole numbers of a comma list."""
    try:
        found = sorted({int(part) for part in given.split(",") if part.strip()})
    except ValueError as error:
        raise UsageError(f"{option} must be whole numbers such as 1,2,4, got {given!r}") from error
    if found and found[0] < 1:
        raise UsageError(f"{option} must be numbers from 1, got {given!r}")
    return found


def _picture_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the pictures it makes."""
    factor = getattr(getattr(pipeline, "published", None), "vae", None)
    scale = 1 if factor is None else factor.factor
    return pipeline.shape[1] * scale, pipeline.shape[2] * scale


def _finite(data: Any) -> Any:
    """The data with None for numbers that JSON cannot hold."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise unknown("device to draw on", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NasError("torch sees no CUDA device here", hint="leave --device out")
    return name
