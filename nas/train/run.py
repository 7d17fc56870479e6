"""A recipe's stages, one after the other: each from the averaged network of the one before, each resumed where it was.

A finished stage is known by its record, which is written after its network; an unfinished one by its checkpoints. So a
run that was killed anywhere and is started again by the same command ends in the same bits.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nas.build import Network, build
from nas.diffusion import FLOW, Schedule
from nas.distill import Checkpoints, Progress, checkpoint_files, train
from nas.errors import NasError
from nas.features import anatomy, body
from nas.network import short_hash
from nas.objectives import is_game
from nas.paths import atomic_write, writable_dir
from nas.provenance import provenance
from nas.students import WEIGHTS, Sampling, load_student, save_student
from nas.teachers import teacher_digest
from nas.train.accelerated import AccelerateEngine, accelerator
from nas.train.decoding import open_decoding, trains_decoder
from nas.train.logs import Logs
from nas.train.recipe import Recipe, Stage, differences, sampling_after
from nas.train.sources import Source, Subject, open_source
from nas.train.starting import Plan, first_network, plan, reshaped

Report = Callable[[str, float, float, str], None]  # stage, done, total, note

STAGES, RECORD, IDENTITY, CHECKPOINTS = "stages", "stage.json", "identity.json", "checkpoints"
_SEED_PER_STAGE = 1_009  # so that no stage repeats another's drawings


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a run is computed; nothing here changes what is computed.

    Attributes:
        device: "cpu" or "cuda".
        compiled: torch.compile the networks, in stages whose objectives look at no layer.
        gradient_checkpointing: keep no activations inside the blocks, and compute them again for the gradients.
    """

    device: str = "cpu"
    compiled: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage.

    Attributes:
        name: of the stage.
        steps: trained.
        seconds: of training, over all runs that it took.
        loss: mean weighted loss of the last line of its record; None where the student rested then.
        params: of the student's network.
        compiled: whether its networks were compiled when it was finished.
    """

    name: str
    steps: int
    seconds: float
    loss: float | None
    params: int
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run of a recipe, put together and not yet begun.

    Attributes:
        recipe: its stages.
        subject: whom and what it is applied to.
        source: of teachers and examples.
        planned: the student's networks.
        seed: of initialisation, drawings and games.
        machine: where and how.
        accelerator: the processes.
        identity: what the run's weights are decided by, as plain data.
    """

    recipe: Recipe
    subject: Subject
    source: Source
    planned: Plan
    seed: int
    machine: Machine
    accelerator: Accelerator
    identity: dict[str, Any]

    def teacher_name(self, number: int) -> str:
        """Whom stage `number` (from 0) learns from: the last one named."""
        named = [stage.teacher for stage in self.recipe.stages[: number + 1] if stage.teacher is not None]
        return named[-1] if named else self.subject.teacher

    def stage_seed(self, number: int) -> int:
        """Of a stage's examples and games."""
        return self.seed + _SEED_PER_STAGE * number

    @property
    def first_process(self) -> bool:
        """Whether this one writes and speaks."""
        return bool(self.accelerator.is_main_process)


def course(recipe: Recipe, subject: Subject, *, seed: int = 0, machine: Machine | None = None) -> Course:
    """Puts a run together: every teacher is loaded once and every network planned before anything is trained.

    Raises:
        NasError: the teacher, the candidate, the data and the stages do not go together.
    """
    machine = machine or Machine()
    processes = accelerator(machine.device)
    source: Source
    if trains_decoder(recipe):
        source = open_decoding(subject, processes.device)
    else:
        source = open_source(recipe, subject, processes.device)
    planned = plan(recipe, subject, source)
    candidate = subject.candidate
    identity = {
        "recipe": recipe.to_json(),
        "seed": seed,
        "candidate": candidate.key if candidate else None,
        "choices": dict(candidate.choices) if candidate else None,
        "space": candidate.space.name if candidate else None,
        "network": planned.first.spec.key,
        "teacher": subject.teacher,
        "teacher_digest": source.identity.get("vae") or teacher_digest(subject.teacher),
        "data": source.identity,
    }
    made = Course(
        recipe=recipe,
        subject=subject,
        source=source,
        planned=planned,
        seed=seed,
        machine=machine,
        accelerator=processes,
        identity=json.loads(json.dumps(identity)),
    )
    _check_teachers(made)
    return made


def _check_teachers(run: Course) -> None:
    """Refuses a later teacher that cannot follow the first."""
    first: Any = run.source.teacher(run.subject.teacher)
    for number, stage in enumerate(run.recipe.stages):
        if stage.teacher is None:
            continue
        later: Any = run.source.teacher(run.teacher_name(number))
        ours, theirs = schedule_of(first), schedule_of(later)
        same = theirs.prediction == ours.prediction and _equal(theirs.alpha_bar, ours.alpha_bar)
        if run.recipe.student.keep_schedule and not same:
            raise NasError(
                f"recipe {run.recipe.name}, stage {stage.name!r}: its teacher {stage.teacher} has another noise"
                f" schedule or prediction than {run.subject.teacher}, whose own the student keeps",
                hint="set student.keep_schedule=false, and both are asked at equal signal-to-noise ratio",
            )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def claim(run: Course, out: Path, resume: bool) -> Path:
    """Marks `out` as this run's, or checks that it is.

    Raises:
        NasError: it is another run's (says in what), holds a run and is not to be resumed, or cannot be written.
    """
    folder = writable_dir(out)
    path = folder / IDENTITY
    if not path.is_file():
        if run.first_process:
            atomic_write(path, json.dumps(run.identity, indent=1) + "\n")
        run.accelerator.wait_for_everyone()
        return folder
    if not resume and (any(folder.glob(f"{STAGES}/*/{RECORD}")) or any(folder.glob(f"{STAGES}/*/{CHECKPOINTS}/*"))):
        raise NasError(f"{folder} already holds a run", hint="resume it, or choose another folder with --out")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise NasError(f"{path} is not valid JSON: {error}", hint="choose another folder with --out") from error
    if found := differences(saved, run.identity):
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise NasError(
            f"the run in {folder} is another one: {'; '.join(found[:3])}{more}",
            hint="go on with what it had, or choose another folder with --out",
        )
    run.accelerator.wait_for_everyone()
    return folder


def stage_folder(folder: Path, number: int, stage: Stage) -> Path:
    """Where stage `number` (from 0) keeps what it writes."""
    return folder / STAGES / f"{number + 1}-{stage.name}"


def run_stage(run: Course, number: int, folder: Path, tell: Report) -> tuple[StageResult, int | None]:
    """Trains one stage, or recognises that it is finished.

    Returns:
        Its result, and the step at which it was taken up: all of them for a finished one, None for a fresh one.
    """
    stage = run.recipe.stages[number]
    place = stage_folder(folder, number, stage)
    if (place / RECORD).is_file() and (place / WEIGHTS).is_file():
        return StageResult(**json.loads((place / RECORD).read_text())), stage.train.steps
    label = stage.name if len(run.recipe.stages) == 1 else f"{number + 1}/{len(run.recipe.stages)} {stage.name}"
    tell(label, 0, stage.train.steps, "loading")
    teacher = run.source.teacher(run.teacher_name(number))
    student = _student(run, number, folder)
    data = run.source.batches(stage, teacher, run.stage_seed(number))
    engine = AccelerateEngine(run.accelerator, stage.train.precision)
    how = sampling_after(run.recipe, number, schedule_of(student))
    settings = replace(stage.train, seed=run.stage_seed(number))
    with prepared(run.machine, stage, student, teacher) as compiled, Logs(place) as logs:

        def record(history: Sequence[Progress]) -> None:
            if run.first_process:
                logs.record(history)
                last = history[-1]
                tell(label, last.step, last.steps, f"loss {last.loss:.4f}")

        def grid(step: int, average: Any) -> None:
            if step % (stage.sample_every or stage.checkpoint_every) == 0 or step == stage.train.steps:
                pixels = run.source.grid(average, how)
                if pixels is not None and run.first_process:
                    logs.grid(step, pixels)

        with _explained(stage, run.recipe, place / CHECKPOINTS):
            trained = train(
                student,
                data,
                stage.objectives,
                settings,
                teacher=teacher,
                engine=engine,
                checkpoints=Checkpoints(
                    folder=place / CHECKPOINTS,
                    every=stage.checkpoint_every,
                    identity=short_hash(json.dumps([run.identity, number], sort_keys=True)),
                    on_save=grid,
                ),
                on_progress=record,
            )
            last = trained.history[-1]
            result = StageResult(
                name=stage.name,
                steps=last.step,
                seconds=last.seconds,
                loss=None if last.loss != last.loss else last.loss,
                params=sum(block.numel() for block in build(run.planned.specs[number], "meta").parameters()),
                compiled=compiled,
            )
            _finish(run, engine, trained.average, how, place, stage)
            if run.first_process:
                atomic_write(place / RECORD, json.dumps(asdict(result), indent=1) + "\n")
            engine.wait()
    return result, trained.resumed_from


def schedule_of(denoiser: Any) -> Schedule:
    """The noise levels that a student knows; a decoder knows none."""
    found: Schedule = getattr(denoiser, "schedule", FLOW)
    return found


def _student(run: Course, number: int, folder: Path) -> nn.Module:
    """The network that a stage starts from, on the device."""
    if number == 0:
        network, _ = first_network(run.recipe, run.planned, run.source, run.seed)
    else:
        before = stage_folder(folder, number - 1, run.recipe.stages[number - 1]) / WEIGHTS
        loaded = load_student(before).denoiser.network
        assert isinstance(loaded, Network)  # load_student builds one
        network = reshaped(loaded, run.planned.stages[number], run.seed)
    return run.source.denoiser(network.requires_grad_(True), run.recipe.student)


def _finish(
    run: Course, engine: AccelerateEngine, average: nn.Module, how: Sampling, place: Path, stage: Stage
) -> None:
    """Writes the averaged network, put together where it was sharded."""
    if engine.shards:
        state = engine.module_state(average)
        if run.first_process:
            whole = run.source.denoiser(build(body(average).spec), run.recipe.student)  # type: ignore[arg-type]
            whole.load_state_dict(state)
            average = whole
    if run.first_process:
        save_student(place / WEIGHTS, average, how, about(run, stage))


def about(run: Course, stage: Stage) -> dict[str, Any]:
    """What a student's file says of where it came from."""
    told = {key: value for key, value in run.identity.items() if key not in ("recipe", "data", "network")}
    return {**told, **run.identity["data"], "recipe": run.recipe.name, "stage": stage.name}


@contextmanager
def _explained(stage: Stage, recipe: Recipe, checkpoints: Path) -> Iterator[None]:
    """Says of a failure which stage it befell, and of a full disk how to go on."""
    try:
        yield
    except NasError as error:
        where = f"stage {stage.name!r}: " if len(recipe.stages) > 1 else ""
        cause, hint, kept = error.__cause__, error.hint, ""
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            files = checkpoint_files(checkpoints)
            step = int(files[0].stem.partition("-")[2]) if files else 0
            kept = f"; the checkpoint of step {step} is kept" if files else "; nothing was saved yet"
            hint = "make room there and run the same command again, which goes on from it"
        raise error.restated(f"{where}{error.message}{kept}", hint) from error


@contextmanager
def prepared(machine: Machine, stage: Stage, student: nn.Module, teacher: nn.Module) -> Iterator[bool]:
    """Sets up compilation and gradient checkpointing for a stage; yields whether anything is compiled.

    Hooks are not run inside a compiled network. Where a loss compares layers nothing is compiled, and where a game
    plays, only the student is, because the game may look into the teacher.
    """
    losses = [each for each in stage.objectives if not is_game(each)]
    looks = any(each.taps(anatomy(student), anatomy(teacher)) for each in losses if each.needs_teacher)
    chosen: list[nn.Module] = []
    if machine.compiled and not looks:
        chosen = [body(student)] if len(losses) < len(stage.objectives) else [body(student), body(teacher)]
    for network in (body(student), body(teacher)):
        _keep_activations(network, not machine.gradient_checkpointing)
    for network in chosen:
        network.compile()
    try:
        yield bool(chosen)
    finally:
        for network in chosen:
            network._compiled_call_impl = None


def _keep_activations(network: nn.Module, keep: bool) -> None:
    if isinstance(network, Network):
        network.checkpoint_blocks = not keep
    elif not keep:
        enable: Any = getattr(network, "enable_gradient_checkpointing", None)  # diffusers' networks have it
        if enable is not None:
            enable()


def stamp(run: Course) -> dict[str, Any]:
    """The provenance of a run's record."""
    return provenance(seed=run.seed, device=run.machine.device, processes=run.accelerator.num_processes)
