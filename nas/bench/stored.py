"""The bench at full size: candidates as they are, a published teacher, and latents that `nas cache` wrote.

Legend: B batch, C channels, H W height and width of the latent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas import families, teachers
from nas.batches import Batch, Batches, Outputs, stream
from nas.bench.drawn import Bench
from nas.bench.held import Fidelity, Held, fidelity_of
from nas.bench.small import teacher_hash
from nas.build import build
from nas.diffusion import Conditioning, NativeDenoiser, noised
from nas.distill import Engine
from nas.errors import NasError, UsageError
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.targets import Lesson, cached_rows
from nas.tasks.latents import Ahead, Store, Targets, Task, check_fit, check_input
from nas.times import Times

_CHUNK = 8  # held-out rows that the teacher is asked about at once, each twice
_ORDER, _NOISE, _TIMES = 7_401, 7_402, 7_403  # first number of each random stream


class FullBench(Bench):
    """A teacher of diffusers and a folder of latents (`settings.data`), with all that a proxy needs of them.

    The candidate's own network is trained, with the teacher's schedule and prediction as `nas train` does by default;
    what `ProxySettings` says of small copies (divisor, norm groups, patch) does not apply. The teacher is asked at
    every step, unless `nas cache --teacher-targets` has left its answers with the data. Rows that nobody trains on are
    drawn from the folder; the teacher's answers about them are computed once. With precision bf16 the teacher's weights
    are bf16 and both networks are called under autocast.

    Raises:
        NasError: on first use: no such teacher or data, they do not fit each other, or too few rows.
    """

    @cached_property
    def _task(self) -> Task:
        if self.settings.data is None:
            raise UsageError(
                "the task latents needs a folder of them", hint="nas cache IMAGES --pipeline ID --out FOLDER"
            )
        return Task(Path(self.settings.data))

    @property
    def _store(self) -> Store:
        return self._task.store

    @cached_property
    def _targets(self) -> Targets | None:
        return self._store.targets(teacher_hash(self.teacher))

    @property
    def digest(self) -> str:
        """Of the teacher, its precision, the data, and whether the answers lie with it."""
        answers = "live" if self._targets is None else "cached"
        return f"{teacher_hash(self.teacher)}/latents/{self._store.digest}/{self.settings.precision}/{answers}"

    @property
    def lesson(self) -> Lesson:
        """Refused: nothing is drawn here.

        Raises:
            NasError: always.
        """
        raise NasError("this needs drawn images and their captions, and the bench has latents", hint="--proxy distill")

    @property
    def embedded(self) -> teachers.EmbeddedTeacher:
        """Refused, as `lesson`."""
        return self.lesson.teacher  # type: ignore[return-value]

    @property
    def asked(self) -> Any:
        """The teacher, on the device; None where its answers lie with the data."""
        return None if self._targets is not None else self._loaded

    @property
    def _loaded(self) -> teachers.DiffusersTeacher:
        loaded = _load_teacher(self.teacher, self.device, self.settings.precision)
        check_fit(self._store.manifest, loaded, f"the teacher {self.teacher}")
        return loaded

    @cached_property
    def _order(self) -> list[int]:
        """All rows of the folder; the held-out ones come first, so that fewer of them are the first of more."""
        rows, needed = len(self._store), self.settings.held_rows + self.settings.batch
        if rows < needed:
            raise NasError(
                f"the data in {self._store.folder} has {rows} rows; {self.settings.held_rows} held-out ones and a batch"
                f" of {self.settings.batch} need {needed}",
                hint="cache more images, or hold fewer rows out",
            )
        found: list[int] = torch.randperm(rows, generator=stream(_ORDER, self.settings.data_seed)).tolist()
        return found

    def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> tuple[None, Held]:  # type: ignore[override]
        """Held-out rows, the teacher's answers about them computed unless they are cached; training rows are read."""
        total = self.settings.held_rows
        rows = self._order[:total]
        if self._targets is not None:
            return None, _Answered(store=self._store, numbers=rows, targets=self._targets)
        about = {
            "teacher": teacher_hash(self.teacher),
            "precision": self.settings.precision,
            "data": self._store.digest,
            "seed": self.settings.data_seed,
            "part": "held",
        }
        found = cached_rows(
            about,
            total,
            _CHUNK,
            self._ask,
            None if on_progress is None else lambda done: on_progress(min(done, total), total),
        )
        return None, _Asked(store=self._store, numbers=rows, found=found)

    @torch.no_grad()
    def _ask(self, index: int) -> dict[str, Tensor]:
        """The teacher's answers about a chunk of held-out rows; the last may have fewer than the others."""
        first, seed, teacher = index * _CHUNK, self.settings.data_seed, self._loaded
        rows = self._order[first : first + _CHUNK]
        rows += rows[:1] * (_CHUNK - len(rows))  # never read: chunks are whole
        clean = self._store.latents(rows)
        times = Times(kind="uniform", schedule=teacher.schedule)
        t = times.draw(_CHUNK, stream(_TIMES, seed, index))
        noise = torch.randn(clean.shape, generator=stream(_NOISE, seed, index))
        x = noised(clean, noise, t).half()
        device = torch.device(self.device)
        there, at = x.float().to(device), t.to(device)
        text, null = self._store.conditions(rows, device), self._store.null(device)
        found = {
            "velocity": teacher.velocity(there, at, text),
            "null_velocity": teacher.velocity(there, at, null.like(text)),
        }
        halves = {name: each.to("cpu", torch.float16) for name, each in found.items()}
        if not all(bool(each.isfinite().all()) for each in halves.values()):
            raise NasError(
                f"the teacher's answers about the rows {rows} are not finite in float16", hint="use precision fp32"
            )
        return {"t": t, "x": x, **halves}

    @cached_property
    def rows(self) -> tuple[Any, Any]:
        """None, since training rows are read batch by batch, and held-out rows."""
        return self.prepare()

    @property
    def data(self) -> Batches:  # type: ignore[override]
        """Training batches, equal for every candidate."""
        settings = self.settings
        # With a text weight every row is asked with and without its caption.
        dropped = 1 / settings.null_every if settings.null_every and not settings.text_weight > 0 else 0.0
        schedule = None if self._targets is not None else self._loaded.schedule
        batches = self._task.batches(
            settings.batch,
            seed=settings.data_seed,
            null_share=dropped,
            times=None if schedule is None else Times(kind="uniform", schedule=schedule),
            teacher_digest=teacher_hash(self.teacher),
            device=torch.device(self.device),
            only=self._order[settings.held_rows :],
        )
        return Ahead(batches) if torch.device(self.device).type == "cuda" else batches

    def spec(self, candidate: Candidate) -> NetworkSpec:
        """The candidate's network as it is.

        Raises:
            NasError: it takes latents or text of another shape than the data has.
        """
        spec, manifest = families.network(candidate), self._store.manifest
        if manifest.latent_shape is None:
            self._store.latents([0])  # says that there are prompts only
        else:
            check_input(manifest, spec.input, manifest.latent_shape, str(candidate))
        return spec

    def student(self, spec: NetworkSpec, seed: int) -> Any:
        """A `NativeDenoiser` of the teacher's schedule and prediction with its own random weights, on the device.

        Made on the CPU and then moved, since weights may not depend on the device.
        """
        return NativeDenoiser(build(spec, seed=seed), self._loaded.schedule).to(self.device)

    def judge(self, denoiser: Any) -> Fidelity:
        """How closely a student follows the teacher on the held-out rows."""
        device = torch.device(self.device)
        return fidelity_of(denoiser, self.held, device=device, at_once=self.settings.batch, autocast=self._autocast())

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        engine = Engine(self.settings.precision)
        return lambda: engine.autocast(torch.device(self.device))


@functools.lru_cache(maxsize=1)
def _load_teacher(name: str, device: str, precision: str) -> teachers.DiffusersTeacher:
    """One teacher per process: it may be large, and every candidate asks the same."""
    if teachers.teacher_file(name) is not None:
        raise NasError(
            f"teacher {name!r} draws pictures of its own task, and the data has latents",
            hint="give a diffusers teacher, as a local folder or a hub id",
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    loaded = teachers.load_teacher(name, device=device, dtype=dtype)
    assert isinstance(loaded, teachers.DiffusersTeacher)  # no file of ours
    return loaded


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stored:
    """Held-out rows of a folder.

    Attributes:
        store: the folder.
        numbers: of the rows.
    """

    store: Store
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def _text(self, rows: slice, device: torch.device | None) -> tuple[Conditioning, Conditioning]:
        return self.store.conditions(self.numbers[rows], device), self.store.null(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked(_Stored):
    """With the teacher's answers as `FullBench` asked for them.

    Attributes:
        found: t [R], x, velocity and null_velocity [R, C, H, W].
    """

    found: dict[str, Tensor]

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of the rows in float32."""
        text, null = self._text(rows, device)
        t, x, velocity, null_velocity = (
            self.found[name][rows].to(device=device, dtype=torch.float32).contiguous()
            for name in ("t", "x", "velocity", "null_velocity")
        )
        return Batch(
            x=x, t=t, text=text, null_text=null, teacher=Outputs(velocity=velocity, null_velocity=null_velocity)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answered(_Stored):
    """With the teacher's answers that `nas cache` left with the data.

    Attributes:
        targets: the answers.
    """

    targets: Targets

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of the rows in float32."""
        text, null = self._text(rows, device)
        numbers = self.numbers[rows]
        noise, t, velocity, null_velocity = (
            self.targets.tensor(name, numbers, device) for name in ("noise", "t", "velocity", "null_velocity")
        )
        x = noised(self.store.latents(numbers, device), noise, t)
        return Batch(
            x=x, t=t, text=text, null_text=null, teacher=Outputs(velocity=velocity, null_velocity=null_velocity)
        )
