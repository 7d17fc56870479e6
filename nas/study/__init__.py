"""The search: Optuna's ask and tell around `evaluate`, in a journal that survives being killed.

Trials come in rounds of as many as there are workers: a round is proposed, evaluated side by side, and told in order.
The sampler of trial n is seeded by (seed, n), a proposal is one write to the journal, and what may stop a run early is
known from the rounds before its own. So the trials of a study depend on its settings alone: a run killed at any moment
and resumed ends with the same trials as one left in peace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from nas import proxies, quality, stopping
from nas.errors import NasError
from nas.evaluate import Evaluation, Evaluator
from nas.network import short_hash
from nas.record import Trial
from nas.space import Candidate, SearchSpace
from nas.study.journal import locked, open_journal
from nas.study.outcome import Outcome, outcome_of, read
from nas.study.worker import scored, workers

# Proposals that are over budget or already known cost milliseconds. After a few in a row the next is drawn at random
# (TPE repeats itself in small categorical spaces); after many the feasible part of the space is taken as exhausted.
_REPEATING = 10
_EXHAUSTED = 2_000

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a study's trials; `prune` is the confidence of stopping a run early, None for never.

    `device` is where candidates are trained; like `jobs` it decides the speed alone. `proxy_because` says how the
    proxy came to be chosen, for the reader.
    """

    evaluator: Evaluator
    teacher: str
    proxy: quality.ProxySettings
    trials: int
    seed: int
    jobs: int
    prune: float | None = None
    device: str = "cpu"
    proxy_because: str = "asked for"

    def identity(self) -> dict[str, Any]:
        """What must be equal for a journal to be continued; `trials`, `jobs` and `device` may change."""
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
            "proxy": quality.identity(self.proxy, self.evaluator.space, self.teacher),
            "prune": self.prune,
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
        self.unit = proxies.proxy(plan.proxy.proxy).UNIT

    def __enter__(self) -> Study:
        self._open.enter_context(locked(self.folder))
        try:
            self.study = open_journal(self.folder, self.plan.identity())
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
                found.append(read(frozen))
        return found

    @property
    def proxied(self) -> int:
        """How many trials a proxy run has been spent on."""
        return sum(trial.round is not None for trial in self.trials())

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

    def _tell(self, number: int, found: Outcome) -> None:
        """Writes a trial's outcome: attributes first, so that a finished trial is always whole."""
        storage, trial_id = self.study._storage, self.study.get_trials(deepcopy=False)[number]._trial_id
        for name, value in found.attributes().items():
            storage.set_trial_user_attr(trial_id, name, value)
        if found.state == "infeasible":
            # As a violated constraint the sampler learns to keep away; a bad score would only draw it elsewhere.
            violated = optuna.trial.create_trial(state=TrialState.PRUNED, constraints={"untrainable": 1.0})
            for name, value in violated.system_attrs.items():
                storage.set_trial_system_attr(trial_id, name, value)
        if found.state == "proxied":
            self.study.tell(number, [found.evaluation.latency_ms, float(found.evaluation.quality or 0.0)])
        else:
            self.study.tell(number, state=TrialState.FAIL if found.state == "failed" else TrialState.PRUNED)

    def _rules(self, pending: dict[int, Candidate], priced: dict[int, Evaluation]) -> dict[int, stopping.Rule | None]:
        """When to stop each run of a round, from the rounds before it: a round resumed in its midst has the same.

        References run to their end: a reader wants to know how far the published networks come.
        """
        if self.plan.prune is None:
            return dict.fromkeys(pending)
        trials = self.trials()
        frozen = self.study.get_trials(deepcopy=False)
        this = min(frozen[number].user_attrs["round"] for number in pending)
        runs = [
            stopping.Run(
                key=t.evaluation.key,
                latency_ms=t.evaluation.latency_ms,
                value=float(t.evaluation.quality or 0.0),
                curve=t.curve,
                feasible=t.evaluation.feasible,
            )
            for t in trials
            if t.state == "proxied" and t.round is not None and t.round < this
        ]
        return {
            number: stopping.rule(
                runs if each.source == "search" else (),
                each.latency_ms,
                confidence=self.plan.prune,
                steps=self.plan.proxy.steps,
                unit=self.unit,
            )
            for number, each in priced.items()
        }

    def _evaluate_round(self, pending: dict[int, Candidate]) -> None:
        """Runs the round's proxies side by side, then tells them in the order of their numbers."""
        frozen = {t.number: t for t in self.study.get_trials(deepcopy=False)}
        priced = {
            number: self.plan.evaluator.price([candidate], frozen[number].user_attrs["source"])[0]
            for number, candidate in pending.items()
        }
        rules = self._rules(pending, priced)
        futures: dict[Future[quality.Score], int] = {
            self._workers().submit(
                scored, candidate, self.plan.teacher, self.plan.proxy, rules[number], self.plan.device
            ): number
            for number, candidate in pending.items()
        }
        outcomes: dict[int, Outcome] = {}
        done_before = self.proxied
        goal = max(self.plan.trials, done_before + len(pending))
        self.progress("search", done_before, goal, f"scoring {', '.join(c.key for c in pending.values())}")
        try:
            for future in as_completed(futures):
                number = futures[future]
                outcomes[number] = outcome_of(priced[number], future, self.plan.proxy)
                evaluation = outcomes[number].evaluation
                state = outcomes[number].state
                note = state if evaluation.quality is None else f"{evaluation.quality:.4g} {self.unit}"
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
            self._tell(number, outcomes[number])

    def _workers(self) -> Executor:
        if self._executor is None:
            self._executor = workers(self.plan.jobs)
        return self._executor


def _as_row(trial: FrozenTrial) -> np.ndarray:
    return np.array(trial.user_attrs["row"])
