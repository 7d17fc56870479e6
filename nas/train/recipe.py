"""Recipes: what is trained, on what, for how long, in stages that each start from the one before.

A recipe is a TOML file in nas/recipes/, or any by its path; `nas.train.recipe_file` reads it. Nothing in it says which
network, teacher, data or device: those are the command's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from nas.diffusion import FLOW, Schedule
from nas.distill import TrainSettings
from nas.errors import UsageError, unknown
from nas.objectives import Objective, is_game
from nas.students import Sampling
from nas.times import Kind, OutOfRange

Data = Literal["images", "prompts"]
Widths = Literal["first", "l1"]
DECODING = "reconstruction"  # the objective of decoders
_MOST_STEPS = 8  # of a few-step network
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What the first stage starts from.

    Attributes:
        inherit: start from the teacher's weights where blocks correspond (`nas.inherit`); else all is new.
        inherit_widths: which channels a narrower tensor takes over: the first, or those of the largest weights.
        from_teacher: the student is the teacher's own network with its weights, and no candidate is given.
        remove: blocks or transformer layers that it leaves out of it from the start (see `nas.train.removal`).
        width_divisor: what widths and head width of a candidate are divided by on the embedded task, as a proxy does.
        norm_groups: groups of every GroupNorm there.
        keep_schedule: of a teacher with a schedule of its own: whether the student keeps it, and what it predicts, so
            that diffusers can run it; False makes a rectified flow of it.
    """

    inherit: bool = False
    inherit_widths: Widths = "first"
    from_teacher: bool = False
    remove: tuple[str, ...] = ()
    width_divisor: int = 1
    norm_groups: int = 4
    keep_schedule: bool = True


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a network that was not made for few steps is sampled, and how many images are checked at the end.

    Attributes:
        steps: Euler steps per image.
        guidance: of classifier-free guidance.
        images: that the task's checker scores, per set of captions.
        prompts: texts that are drawn in every grid of samples, by the VAE and the text encoders of the first teacher's
            pipeline; the embedded task draws captions of its own.
    """

    steps: int = 20
    guidance: float = 2.0
    images: int = 256
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Goal:
    """An objective of a stage.

    Attributes:
        name: its file in nas/objectives/, or the path of one.
        objective: it.
    """

    name: str
    objective: Objective

    @property
    def settings(self) -> dict[str, Any]:
        """All its settings, those at their defaults too."""
        record: Any = self.objective
        return {each.name: getattr(record, each.name) for each in fields(record) if each.init}

    @property
    def needs_images(self) -> bool:
        """Whether it looks at real images: every loss does, because it is evaluated on noised ones; a game may not."""
        return self.objective.needs_images if is_game(self.objective) else True

    def times(self, schedule: Schedule, steps: int | None = None) -> tuple[tuple[float, ...], bool]:
        """The times that its result is sampled at, and `unit_start`; none where it makes no few-step network.

        Raises:
            UsageError: it cannot be sampled in so many `steps`.
        """
        record: Any = self.objective
        if not hasattr(record, "sampling"):
            return (), True
        made: tuple[tuple[float, ...], bool] = record.sampling(schedule, steps)
        return made


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training, whose start is the averaged network of the stage before.

    Attributes:
        name: also of its folder.
        train: the loop's settings.
        goals: its objectives.
        data: "images", or "prompts" alone.
        null_share: the share of examples whose caption is taken away, which guidance needs: 0, or one in a whole
            number (0.1).
        times: where on the schedule examples are noised: "uniform" over the teacher's levels, "logit_normal" (sigmoid
            of a standard normal), or "mixed" (half of that, half leaning to high noise).
        out_of_range: what becomes of times that the teacher's schedule never saw: "clamp" to its ends, or "drop".
        teacher: another one than the run's, from this stage on.
        remove: blocks or transformer layers that the student loses before this stage.
        guidance_width: width of the embedding of the guidance scale that the student takes from this stage on (LCM has
            256); 0 adds none.
        few_step_student: says that a network made for few steps shall go through a stage that makes no such network.
        checkpoint_every: steps between checkpoints.
        sample_every: steps between grids of samples, a multiple of `checkpoint_every`; 0 is at every checkpoint.
    """

    name: str
    train: TrainSettings
    goals: tuple[Goal, ...]
    data: Data = "images"
    null_share: float = 0.1
    times: Kind = "uniform"
    out_of_range: OutOfRange = "clamp"
    teacher: str | None = None
    remove: tuple[str, ...] = ()
    guidance_width: int = 0
    few_step_student: bool = False
    checkpoint_every: int = 500
    sample_every: int = 0

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is minimised."""
        return tuple(goal.objective for goal in self.goals)

    @property
    def null_every(self) -> int:
        """Every how many-th example loses its caption; 0 for none."""
        return round(1 / self.null_share) if self.null_share else 0

    @property
    def makes_few_steps(self) -> bool:
        """Whether its result is sampled in few steps."""
        return any(goal.times(FLOW)[0] for goal in self.goals)

    def to_json(self) -> dict[str, Any]:
        """Plain data, every default spelt out, under the keys of a recipe file."""
        train = {name: value for name, value in asdict(self.train).items() if name != "seed"}
        own = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("name", "train", "goals")
        }
        goals = [{"name": goal.name, **goal.settings} for goal in self.goals]
        return {"name": self.name, **train, **own, "objective": goals}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order.

    Attributes:
        name: of its file.
        description: one sentence.
        sources: where its numbers are from.
        student: what the first stage starts from.
        sampling: of the result.
        stages: at least one.
    """

    name: str
    description: str
    sources: tuple[str, ...]
    student: StudentSettings
    sampling: SamplingSettings
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.train.steps for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """What decides a run's weights, as plain data: all but the words."""
        return {
            "student": asdict(self.student),
            "sampling": asdict(self.sampling),
            "stage": [stage.to_json() for stage in self.stages],
        }

    def with_precision(self, precision: Any) -> Recipe:
        """Every stage in that precision, one of PRECISIONS; None changes nothing."""
        if precision is None:
            return self
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        stages = tuple(replace(stage, train=replace(stage.train, precision=precision)) for stage in self.stages)
        return replace(self, stages=stages)


def check_order(recipe: Recipe) -> None:
    """Refuses stages that cannot follow one another, as far as the recipe alone tells.

    Raises:
        UsageError: an objective without the images that it needs, or a network made for few steps in a stage that asks
            for many.
    """
    few: Stage | None = None
    names = {goal.name for stage in recipe.stages for goal in stage.goals}
    if DECODING in names and len(names) > 1:
        raise UsageError(
            f"recipe {recipe.name}: {DECODING} trains image decoders, and {', '.join(sorted(names - {DECODING}))} train"
            " denoisers; no recipe can do both",
            hint="make two recipes of it",
        )
    for stage in recipe.stages:
        if stage.data == "prompts":
            for goal in stage.goals:
                if goal.needs_images:
                    raise UsageError(
                        f"recipe {recipe.name}, stage {stage.name!r}: the objective {goal.name} needs images, and the"
                        ' stage has data = "prompts"',
                        hint='set data = "images", or take a data-free objective such as sid_lsg',
                    )
        if few is not None and not stage.makes_few_steps and not stage.few_step_student:
            raise UsageError(
                f"recipe {recipe.name}: stage {stage.name!r} trains a network that is sampled in many steps, and cannot"
                f" follow stage {few.name!r}, which made it one of few steps",
                hint="put it first, or say few_step_student = true in that stage",
            )
        few = stage if stage.makes_few_steps else few
    few_times(recipe, FLOW)


def few_times(recipe: Recipe, schedule: Schedule) -> list[tuple[tuple[float, ...], bool]]:
    """After each stage, the times at which its network is sampled (none: in many steps), and `unit_start`.

    Raises:
        UsageError: two objectives of a stage want it sampled differently.
    """
    found: list[tuple[tuple[float, ...], bool]] = []
    now: tuple[tuple[float, ...], bool] = ((), True)
    for stage in recipe.stages:
        wanted = {goal.name: times for goal in stage.goals if (times := goal.times(schedule))[0]}
        if len(set(wanted.values())) > 1:
            raise UsageError(
                f"recipe {recipe.name}, stage {stage.name!r}: {' and '.join(wanted)} make networks that are sampled at"
                " different times",
                hint="give them the same steps, or a stage each",
            )
        now = next(iter(wanted.values()), now)
        found.append(now)
    return found


def sampling_after(recipe: Recipe, number: int, schedule: Schedule) -> Sampling:
    """How the network of stage `number` (from 0) is sampled, and in which other numbers of few steps it can be."""
    times, unit_start = few_times(recipe, schedule)[number]
    settings, stages = recipe.sampling, recipe.stages[: number + 1]
    if not times:
        return Sampling(steps=settings.steps, guidance=settings.guidance)
    # A network that takes no embedding of the guidance has learnt one scale.
    guidance = settings.guidance if any(stage.guidance_width for stage in stages) else 1.0
    maker = next(goal for stage in reversed(stages) for goal in stage.goals if goal.times(schedule)[0])
    return Sampling(
        steps=len(times),
        guidance=guidance,
        times=times,
        unit_start=unit_start,
        choices=tuple(_choices(maker, schedule, len(times))),
    )


def _choices(maker: Goal, schedule: Schedule, own: int) -> Iterator[tuple[float, ...]]:
    """The times for other numbers of steps."""
    for steps in range(1, _MOST_STEPS + 1):
        if steps != own:
            try:
                yield maker.times(schedule, steps)[0]
            except UsageError:
                return  # more than it was made for


def scaled_steps(steps: Sequence[int], total: int) -> list[int]:
    """Stages' steps in the same proportion, `total` in all and at least one each.

    Raises:
        UsageError: fewer steps than stages.
    """
    if total < len(steps):
        raise UsageError(f"{total} steps cannot be shared by {len(steps)} stages")
    ends, done = [], 0
    for count in steps:
        done += count
        ends.append(round(done / sum(steps) * total))
    found, before = [], 0
    for number, end in enumerate(ends):
        left = len(steps) - 1 - number
        end = min(max(end, before + 1), total - left)
        found.append(end - before)
        before = end
    return found


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two records of plain data differ, in words ("stage distil lr was 0.1 and is now 0.2")."""
    found: list[str] = []
    for key in [*asked, *(key for key in saved if key not in asked)]:
        old, new = saved.get(key), asked.get(key)
        where = f"{path} {key}".strip()
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, where)
        elif isinstance(old, list) and isinstance(new, list) and _named(old) and _named(new):
            found += differences(_by_name(old), _by_name(new), where)
        else:
            found.append(f"{where} was {_word(old)} and is now {_word(new)}")
    return found


def _named(records: list[Any]) -> bool:
    names = [each.get("name") for each in records if isinstance(each, Mapping)]
    return len(names) == len(records) == len(set(names)) and None not in names


def _by_name(records: list[Any]) -> dict[str, Any]:
    return {str(each["name"]): each for each in records}


def _word(value: Any) -> str:
    """A value as a sentence has it: what is long is only named."""
    if value is None:
        return "not there"
    if isinstance(value, Mapping | list) and value:
        return "another"
    return str(value)
