"""The search: Optuna's ask and tell around `evaluate`, in a journal that survives being killed.

Trials come in rounds of as many as there are workers: a round is proposed, evaluated side by side, and told in order.
The sampler of trial n is seeded by (seed, n) and a proposal is one write to the journal, so the trials of a study
depend on its settings alone: a run killed at any moment and resumed ends with the same trials as one left in peace.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from nas import quality
from nas.errors import NasError
from nas.evaluate import Evaluation, Evaluator
from nas.network import short_hash
from nas.record import Trial
from nas.space import Candidate, SearchSpace

# Proposals that are over budget or already known cost milliseconds. After a few in a row the next is drawn at random
# (TPE repeats itself in small categorical spaces); after many the feasible part of the space is taken as exhausted.
_REPEATING = 10
_EXHAUSTED = 2_000

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a study's trials."""

    evaluator: Evaluator
    teacher: str
    proxy: quality.ProxySettings
    trials: int
    seed: int
    jobs: int

    def identity(self) -> dict[str, Any]:
        """What must be equal for a journal to be continued; `trials` and `jobs` may change."""
        terms = self.evaluator.terms
        identity = {
            "space": self.evaluator.space.name,
            "space_hash": self.evaluator.space.hash,
            "target": self.evaluator.sheet.slug,
            "predictor": short_hash(json.dumps(self.evaluator.predictor.to_json(), sort_keys=True)),
            "budget": str(terms.budget),
            "pipeline": None if terms.budget.per_step else _paid_for(self.evaluator.space),
            "confidence": terms.confidence,
            "teacher": quality.teacher_hash(self.teacher),
            "proxy": asdict(self.proxy),
            "seed": self.seed,
        }
        # As it will be read back: tuples become lists.
        return dict(json.loads(json.dumps(identity)))


def _paid_for(space: SearchSpace) -> dict[str, Any] | None:
    """What a budget for a whole image is charged with; its words on where that comes from decide nothing."""
    if space.pipeline is None:
        return None
    return {key: value for key, value in asdict(space.pipeline).items() if key != "source"}


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Optuna's view of the choices: an ordinal is the integer index of its value, the others are categories."""
    return {
        choice.name: IntDistribution(0, len(choice.values) - 1)
        if choice.ordinal
        else CategoricalDistribution(list(choice.values))
        for choice in space.choices
    }


def to_params(space: SearchSpace, candidate: Candidate) -> dict[str, Any]:
    """A candidate as Optuna parameters."""
    return {c.name: i if c.ordinal else c.values[i] for c, i in zip(space.choices, candidate.row, strict=True)}


def _row(space: SearchSpace, params: dict[str, Any]) -> list[int]:
    return [int(params[c.name]) if c.ordinal else c.index(params[c.name]) for c in space.choices]


class Study:
    """One search in one folder. Used as a context manager: it holds the folder's lock while open.

    `executor` runs the proxies; by default worker processes of this machine, `plan.jobs` of them.

    Raises:
        NasError: the folder's journal belongs to another space version or other settings, is damaged, or is in use.
    """

    def __init__(
        self, plan: Plan, folder: Path, progress: Progress | None = None, executor: Executor | None = None
    ) -> None:
        self.plan = plan
        self.space = plan.evaluator.space
        self.folder = folder
        self.progress = progress or (lambda stage, done, total, note: None)
        self._open = contextlib.ExitStack()
        self._executor = executor

    def __enter__(self) -> Study:
        self._open.enter_context(_lock(self.folder))
        try:
            self.study = _open_journal(self.folder, self.plan)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            # Proxy runs that nobody waits for any more must not keep a stopped search alive.
            for process in list(getattr(self._executor, "_processes", None) or {}):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._open.close()

    # What the journal holds

    def trials(self) -> list[Trial]:
        """The finished trials, by number."""
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.is_finished() and "evaluation" in frozen.user_attrs:
                found.append(
                    Trial(
                        number=frozen.number,
                        state=frozen.user_attrs["state"],
                        evaluation=Evaluation(**frozen.user_attrs["evaluation"]),
                    )
                )
        return found

    @property
    def proxied(self) -> int:
        """How many trials a proxy run has been spent on."""
        return sum(trial.state in ("proxied", "failed") for trial in self.trials())

    def attr(self, name: str, value: Any = None) -> Any:
        """Reads a study attribute, or sets it where a value is given."""
        if value is not None:
            self.study.set_user_attr(name, value)
        return self.study.user_attrs.get(name)

    # The loop

    def run(self) -> None:
        """Asks, evaluates and tells until `plan.trials` candidates have been proxied or nothing new is proposed."""
        started, before = time.monotonic(), float(self.attr("wall_s") or 0.0)
        while pending := self._fill_round():
            self._evaluate_round(pending)
            self.attr("wall_s", before + time.monotonic() - started)

    def _fill_round(self) -> dict[int, Candidate]:
        """Trial number -> candidate, for the round to evaluate: what was running when the last run ended, then new."""
        frozen = self.study.get_trials(deepcopy=False)
        number = max((t.user_attrs.get("round", 0) for t in frozen), default=0)
        members = [t for t in frozen if t.user_attrs.get("round") == number]
        pending = {t.number: self.space.from_row(_as_row(t)) for t in members if t.state == TrialState.RUNNING}
        if any(t.state.is_finished() for t in members):
            if pending:
                # Killed between two tells: the round was complete, so nothing may be added to it.
                return pending
            number += 1
        known = {t.evaluation.key: t for t in self.trials()}
        for reference in self._untried_references():
            self._settle(self.space.reference(reference), f"reference:{reference}", number, known, pending)
        goal = min(self.plan.jobs, max(self.plan.trials - self.proxied, 0))
        while len(pending) < goal and (streak := self._fruitless()) < _EXHAUSTED:
            candidate = self._propose(at_random=streak >= _REPEATING)
            if candidate is not None:
                self._settle(candidate, "search", number, known, pending)
        return pending

    def _fruitless(self) -> int:
        """How many proposals since the last one that was worth a proxy run; read from the journal, so it resumes."""
        streak = 0
        for trial in reversed(self.study.get_trials(deepcopy=False)):
            if "round" in trial.user_attrs:
                break
            streak += 1
        return streak

    def _untried_references(self) -> list[str]:
        """Starting references that the journal does not hold yet; all of them go into the first round."""
        tried = {t.user_attrs["source"] for t in self.study.get_trials(deepcopy=False)}
        return [r.name for r in self.space.starting if f"reference:{r.name}" not in tried]

    def _propose(self, at_random: bool) -> Candidate | None:
        """The sampler's next candidate, or a random one; None, and a trial that says so, where the rules forbid it.

        The sampler is asked without a trial of its own: a proposal then reaches the journal in one write, with all it
        needs, or not at all.
        """
        number = len(self.study.get_trials(deepcopy=False))
        seed = int(short_hash(f"{self.plan.seed}:{number}"), 16) % 2**31
        if at_random:
            return self.space.from_row(self.space.sample(1, seed)[0])
        # Loaded anew: a Study caches its trials until its own `ask`, and the proposal must see the journal as it is.
        study = optuna.load_study(study_name=self.study.study_name, storage=self.study._storage)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=False)
        trial = optuna.trial.create_trial(state=TrialState.RUNNING)
        params = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        for name, distribution in distributions(self.space).items():
            if name not in params:
                params[name] = sampler.sample_independent(study, trial, name, distribution)
        row = self.space.canonical(np.array([_row(self.space, params)]))
        if self.space.allowed(row)[0]:
            return self.space.from_row(row[0])
        self._add(TrialState.PRUNED, params, {"source": "search", "row": row[0].tolist()}, {"forbidden": 1.0})
        return None

    def _settle(
        self, candidate: Candidate, source: str, number: int, known: dict[str, Trial], pending: dict[int, Candidate]
    ) -> None:
        """Adds a candidate's trial: running where a proxy run is worth its price, finished where it is not."""
        evaluation = self.plan.evaluator.price([candidate], source)[0]
        constraints = {"latency_over_budget_ms": evaluation.latency_high_ms - self.plan.evaluator.terms.budget.ms}
        attributes: dict[str, Any] = {"source": source, "row": list(candidate.row)}
        params = to_params(self.space, candidate)
        trial_number = len(self.study.get_trials(deepcopy=False))
        if candidate.key in known or any(other.key == candidate.key for other in pending.values()):
            twin = known[candidate.key].evaluation if candidate.key in known else evaluation
            attributes |= {"state": "duplicate", "evaluation": asdict(twin)}
            self._add(TrialState.PRUNED, params, attributes, constraints)
        elif not evaluation.feasible and source == "search":
            attributes |= {"state": "infeasible", "evaluation": asdict(evaluation)}
            self._add(TrialState.PRUNED, params, attributes, constraints)
            known[candidate.key] = Trial(number=trial_number, state="infeasible", evaluation=evaluation)
        else:
            self._add(TrialState.RUNNING, params, {**attributes, "round": number}, constraints)
            pending[trial_number] = candidate

    def _add(
        self, state: TrialState, params: dict[str, Any], attributes: dict[str, Any], constraints: dict[str, float]
    ) -> None:
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=params,
                distributions=distributions(self.space),
                user_attrs=attributes,
                constraints=constraints,
            )
        )

    def _tell(self, number: int, evaluation: Evaluation, state: str) -> None:
        """Writes a trial's outcome: attributes first, so that a finished trial is always whole."""
        storage, trial_id = self.study._storage, self.study.get_trials(deepcopy=False)[number]._trial_id
        storage.set_trial_user_attr(trial_id, "evaluation", asdict(evaluation))
        storage.set_trial_user_attr(trial_id, "state", state)
        if evaluation.quality is None:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, [evaluation.latency_ms, evaluation.quality])

    def _evaluate_round(self, pending: dict[int, Candidate]) -> None:
        """Runs the round's proxies side by side, then tells them in the order of their numbers."""
        frozen = {t.number: t for t in self.study.get_trials(deepcopy=False)}
        futures: dict[Future[quality.Score], int] = {
            self._workers().submit(quality.score, candidate, self.plan.teacher, self.plan.proxy): number
            for number, candidate in pending.items()
        }
        outcomes: dict[int, tuple[Evaluation, str]] = {}
        done_before = self.proxied
        goal = max(self.plan.trials, done_before + len(pending))
        self.progress("search", done_before, goal, f"distilling {', '.join(c.key for c in pending.values())}")
        try:
            for future in as_completed(futures):
                number = futures[future]
                priced = self.plan.evaluator.price([pending[number]], frozen[number].user_attrs["source"])[0]
                outcomes[number] = _outcome(priced, future)
                evaluation = outcomes[number][0]
                note = "failed" if evaluation.quality is None else f"{evaluation.quality:.2f} dB"
                self.progress(
                    "search",
                    done_before + len(outcomes),
                    goal,
                    f"{evaluation.key} {evaluation.latency_ms:.0f} ms {note}",
                )
        except BrokenProcessPool as error:
            raise NasError(
                "a proxy worker process died (out of memory?)",
                hint="the same command resumes; --jobs 1 needs less memory",
            ) from error
        for number in sorted(outcomes):
            self._tell(number, *outcomes[number])

    def _workers(self) -> Executor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                max_workers=self.plan.jobs,
                mp_context=get_context("spawn"),
                initializer=_worker,
                initargs=(os.getpid(),),
            )
        return self._executor


def _outcome(priced: Evaluation, future: Future[quality.Score]) -> tuple[Evaluation, str]:
    """What one proxy run says; a run that diverged is a failed trial with its reason, not the end of the search."""
    try:
        return priced.with_quality(future.result()), "proxied"
    except NasError as error:
        return Evaluation(**{**asdict(priced), "reason": error.message}), "failed"


def _as_row(trial: FrozenTrial) -> np.ndarray:
    return np.array(trial.user_attrs["row"])


def _worker(parent: int) -> None:
    """Sets a worker up: Ctrl-C is the parent's business, and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One search per folder at a time; the lock goes with the process, so a killed run leaves none behind."""
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NasError(
                f"another search is running in {folder}", hint="wait for it, or choose another --out"
            ) from error
        yield


def _repair(path: Path) -> None:
    """Removes what a killed writer leaves: half a last line, and Optuna's lock file. The caller holds the folder."""
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _open_journal(folder: Path, plan: Plan) -> optuna.Study:
    """The study in the folder's journal, new or continued.

    Raises:
        NasError: it belongs to other settings (each difference is named) or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "journal.log"
    identity = plan.identity()
    _repair(path)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            study_name="search", storage=storage, directions=["minimize", "maximize"], load_if_exists=True
        )
        found = study.user_attrs.get("identity")
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise NasError(
            f"the journal {path} is damaged and cannot be read ({type(error).__name__}: {error})",
            hint="move it away and run the search again, or choose another --out",
        ) from error
    if found is None:
        study.set_user_attr("identity", identity)
        return study
    changed = [f"{k} was {found.get(k)!r}, is now {v!r}" for k, v in identity.items() if found.get(k) != v]
    if changed:
        raise NasError(
            f"the study in {folder} was made with other settings: {'; '.join(changed)}",
            hint="choose another --out; studies of different settings cannot be joined",
        )
    return study
