"""FrontSampler: proposes what is expected to push the front out furthest, given that one objective is known."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from nas.errors import NasError, UsageError
from nas.sampler.history import History
from nas.sampler.hunt import Hunt
from nas.sampler.problem import Problem, among
from nas.sampler.start import next_start

_START = 10


class Exhausted(NasError):
    """Every candidate has been tried."""


class FrontSampler(BaseSampler):
    """Proposes candidates of a two-objective study whose one objective is a known function of the choices.

    The first proposals are the references, and then candidates spread over the cost. From then on a Gaussian process
    predicts the other objective, and the candidate with the greatest expected hypervolume improvement is proposed: a
    mean over draws of the process's hyperparameters and of what noisy evaluations truly are. Running trials count as if
    they had ended as predicted. No row is proposed twice, and none outside the problem.

    The same seed and the same trials give the same proposal.

    Args:
        problem: the candidates and what is known of them.
        seed: of the draws; None draws one.
        noise_sd: standard deviation of one evaluation of the other objective; None where it is to be learned.
        known: which objective of the study is the known one, 0 or 1. Its values in the study are not read.
        start: how many trials are spread out before the surrogate is asked.

    Raises:
        UsageError: `known` is neither 0 nor 1, `start` is less than 1, or `noise_sd` no finite number from 0.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        seed: int | None = None,
        noise_sd: float | None = None,
        known: int = 0,
        start: int = _START,
    ) -> None:
        if known not in (0, 1):
            raise UsageError(f"the known objective must be 0 or 1, got {known}")
        if start < 1:
            raise UsageError(f"the number of first trials must be at least 1, got {start}")
        if noise_sd is not None and not 0 <= noise_sd < np.inf:
            raise UsageError(f"noise_sd must be a finite number from 0, got {noise_sd}")
        self.problem = problem
        self._noise_sd = noise_sd
        self._known = known
        self._start = start
        self._lock = threading.Lock()
        self._asked: dict[str, dict[int, np.ndarray]] = {}
        self._seed = _drawn_seed() if seed is None else seed

    def reseed_rng(self) -> None:
        """Draws another seed."""
        self._seed = _drawn_seed()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All choices: they are proposed together."""
        return dict(self.problem.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next candidate's parameters.

        Raises:
            Exhausted: every candidate has been tried.
            UsageError: the study has not two objectives.
        """
        with self._lock:
            # Proxies have the other cores; on busy ones two threads of a product this small wait for each other.
            with threadpool_limits(limits=1, user_api="blas"):
                row = self.propose(study, besides=trial.number)
            if trial.number >= 0:
                self._asked.setdefault(study.study_name, {})[trial.number] = row
        return self.problem.params(row)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refused: nothing is known of a parameter that is not among the problem's choices.

        Raises:
            UsageError: always.
        """
        known = self.problem.distributions.get(param_name)
        if known is not None:
            raise UsageError(f"parameter {param_name} must be suggested as {known}, got {param_distribution}")
        raise UsageError(
            f"parameter {param_name} is not among the problem's choices: {', '.join(self.problem.distributions)}"
        )

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Stops `study.optimize` once every candidate has been tried."""
        with self._lock:
            history = self._history(study)
            if state.is_finished():
                self._asked.get(study.study_name, {}).pop(trial.number, None)
        if self.problem.more is None and among(self.problem.pool.keys, history.keys).all():
            # Asked and told by hand, there is nothing to stop: the next `ask` says so.
            with contextlib.suppress(RuntimeError):
                study.stop()

    def propose(self, study: Study, besides: int = -1) -> np.ndarray:
        """The next row, int64 [choices].

        Args:
            study: with two objectives.
            besides: the number of the trial that is being asked for.

        Raises:
            Exhausted: every candidate has been tried.
            UsageError: the study has not two objectives.
        """
        history = self._history(study, besides)
        untried = ~among(self.problem.pool.keys, history.keys)
        for reference in self.problem.references:
            place = self.problem.find(np.array(reference))
            if place is not None and untried[place]:
                return self.problem.pool.rows[place]
        if untried.any() and (len(history.done) + len(history.pending) < self._start or not len(history.done)):
            return self._spread(history, untried)
        found = Hunt(self.problem, history, self._noise_sd).chosen() if len(history.done) else None
        if found is None or not len(found):
            raise Exhausted(f"all {len(self.problem.rows)} candidates have been tried")
        return found.rows[0]

    def _spread(self, history: History, untried: np.ndarray) -> np.ndarray:
        """A row to begin with, unlike those that were tried."""
        pool, tried = self.problem.pool, history.done.joined(history.pending).joined(history.failed)
        generator = np.random.default_rng([self._seed, history.trials])
        chosen = next_start(
            pool.cost, pool.inputs.coordinates, untried, tried.cost, tried.inputs.coordinates, self._start, generator
        )
        return pool.rows[chosen]

    def _history(self, study: Study, besides: int = -1) -> History:
        return History.of(study, self.problem, self._known, self._asked.get(study.study_name, {}), besides)


def _drawn_seed() -> int:
    return int(np.random.default_rng().integers(2**31))
