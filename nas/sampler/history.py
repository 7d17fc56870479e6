"""What a study holds, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.errors import UsageError
from nas.sampler.problem import Candidates, Problem, among


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The trials of a study whose candidates are known to the problem.

    Attributes:
        done: finished evaluations.
        quality: their values of the other objective, higher is better, float64 [n].
        feasible: which of them violate no constraint, bool [n].
        pending: what is running or waiting.
        failed: what might have had a value and ended without one, and has not been evaluated otherwise.
        keys: int64 of every trial's row, known to the problem or not.
        trials: how many there are, whatever they are.
    """

    done: Candidates
    quality: np.ndarray
    feasible: np.ndarray
    pending: Candidates
    failed: Candidates
    keys: np.ndarray
    trials: int

    @classmethod
    def of(
        cls, study: Study, problem: Problem, known: int, asked: Mapping[int, np.ndarray], besides: int = -1
    ) -> History:
        """Reads a study.

        Args:
            study: with two objectives.
            problem: whose rows the trials' parameters are.
            known: which objective is the known one.
            asked: rows of running trials whose parameters the study does not have yet, by trial number.
            besides: the number of a trial to leave out.

        Raises:
            UsageError: the study has not two objectives.
        """
        if len(study.directions) != 2:
            raise UsageError(f"the sampler needs a study of two objectives, got {len(study.directions)}")
        sign = 1.0 if study.directions[1 - known] == StudyDirection.MAXIMIZE else -1.0
        every = study.get_trials(deepcopy=False)
        rows, states, quality, feasible, broken = [], [], [], [], []
        for trial in every:
            row = _row(trial, problem, asked) if trial.number != besides else None
            if row is None:
                continue
            value = sign * trial.values[1 - known] if trial.state == TrialState.COMPLETE else np.nan
            rows.append(row)
            states.append(0 if np.isfinite(value) else 2 if trial.state.is_finished() else 1)
            quality.append(value)
            broken.append(trial.state == TrialState.FAIL)
            feasible.append(all(each <= 0 for each in trial.constraints.values()))
        table = np.array(rows, dtype=np.int64).reshape(-1, len(problem.choices))
        found, there = problem.known(table)
        state = np.array(states, dtype=np.int64)[there]
        done, pending = state == 0, state == 1
        allowed = np.array(feasible, dtype=bool)[there]
        # One that was pruned for a constraint says something only if the problem lists it all the same.
        tested = allowed | np.array(broken, dtype=bool)[there] | problem.lists(found.keys)
        failed = (state == 2) & tested & ~among(found.keys, found.keys[done | pending])
        return cls(
            done=found[np.flatnonzero(done)],
            quality=np.array(quality)[there][done],
            feasible=allowed[done],
            pending=found[np.flatnonzero(pending)],
            failed=found[np.flatnonzero(failed)],
            keys=problem.row_keys(table),
            trials=len(every),
        )


def _row(trial: FrozenTrial, problem: Problem, asked: Mapping[int, np.ndarray]) -> np.ndarray | None:
    """A trial's row; before it has its parameters, what was proposed for it or queued with it."""
    row = problem.row(trial.params)
    if row is None and not trial.state.is_finished():
        row = asked.get(trial.number)
        if row is None:
            row = problem.row(trial.system_attrs.get("fixed_params", {}))
    return row
