"""Ledger: the only reader and writer of a study's trials and attributes in its storage."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.errors import NasError
from nas.study.facts import Fact, Row, read
from nas.study.outcome import FAILED, PROXIED, Outcome
from nas.study.storage import Patience

# A storage keeps one number per trial, the score. Latency is a price: it is made anew from the row. Optuna's parameters
# are left out: they are the row again, and a database would write each of them by itself while all workers wait.
DIRECTIONS = [StudyDirection.MAXIMIZE]


class Ledger:
    """A study in a storage.

    Every method waits for a storage that was lost, and what it writes is written once however often it has to ask.

    Args:
        storage: any of Optuna's.
        name: of the study there.
        patience: how lost storages are waited for.
        create: whether a study that is not there is made.

    Raises:
        NasError: it is not there, or its trials cannot be read.
    """

    def __init__(self, storage: BaseStorage, name: str, patience: Patience, *, create: bool = True) -> None:
        self._storage, self._patience = storage, patience
        self._finished: dict[int, Fact] = {}
        self.study = self._patience(self._opened, name, create)
        self._values = len(self.study.directions)

    def _opened(self, name: str, create: bool) -> optuna.Study:
        if create:
            return optuna.create_study(
                study_name=name, storage=self._storage, directions=DIRECTIONS, load_if_exists=True
            )
        return load(self._storage, name)

    # Reading

    def facts(self) -> list[Fact]:
        """All trials, by number."""
        trials = self._patience(self._storage.get_all_trials, self.study._study_id, deepcopy=False)
        found = []
        for frozen in sorted(trials, key=lambda each: each.number):
            fact = self._finished.get(frozen.number)
            if fact is None:
                fact = read(frozen)
                if frozen.state.is_finished():
                    self._finished[frozen.number] = fact
            found.append(fact)
        return found

    def attributes(self) -> dict[str, Any]:
        """The study's own."""
        return self._patience(self._storage.get_study_user_attrs, self.study._study_id)

    # Writing

    def set(self, name: str, value: Any) -> None:
        """An attribute of the study."""
        self._patience(self._storage.set_study_user_attr, self.study._study_id, name, value)

    def set_once(self, name: str, value: Any) -> None:
        """The same, without waiting for a storage that is lost."""
        self._storage.set_study_user_attr(self.study._study_id, name, value)

    def claim(self, row: Row, source: str, worker: str, origin: int | None, attributes: Mapping[str, Any]) -> int:
        """Adds a running trial; its identifier in the storage.

        Args:
            row: index of each choice's value.
            source: of the proposal.
            worker: who will run it.
            origin: number of the lost trial that it is a repetition of, or None.
            attributes: the sampler's own.
        """
        claim: dict[str, Any] = {"worker": worker}
        if origin is not None:
            claim["origin"] = origin
        return self._add(TrialState.RUNNING, row, source, claim, None, attributes)

    def note(self, row: Row, source: str, outcome: Outcome) -> int:
        """Adds a trial that is finished already; its identifier in the storage."""
        return self._add(_state(outcome), row, source, {}, outcome, {})

    def tell(self, fact: Fact, outcome: Outcome) -> bool:
        """Finishes a running trial; False where another worker has taken this one for dead and failed it."""
        try:
            self._patience(self._storage.set_trial_user_attr, fact.trial_id, "outcome", outcome.to_json())
        except UpdateFinishedTrialError:
            return self._as(fact, outcome)
        return self._finish(fact, _state(outcome), self._number(outcome)) or self._as(fact, outcome)

    def settle(self, fact: Fact) -> bool:
        """Ends a running trial whose worker died: by its outcome where that was written, else as lost.

        Returns:
            False where somebody was faster.
        """
        if not fact.told:
            return self._finish(fact, TrialState.FAIL, None)
        frozen = self._patience(self._storage.get_trial, fact.trial_id)
        outcome = Outcome.from_json(frozen.user_attrs["outcome"])
        return self._finish(fact, _state(outcome), self._number(outcome))

    def withdraw(self, fact: Fact) -> None:
        """Ends one of this worker's own trials without a run."""
        self._finish(fact, TrialState.PRUNED, None)

    def _as(self, mine: Fact, outcome: Outcome) -> bool:
        """Whether a trial that is finished has this outcome: the write before was heard though its answer was lost."""
        return next(fact.state == outcome.state for fact in self.facts() if fact.trial_id == mine.trial_id)

    def _finish(self, fact: Fact, state: TrialState, values: list[float] | None) -> bool:
        try:
            return self._patience(self._storage.set_trial_state_values, fact.trial_id, state, values)
        except UpdateFinishedTrialError:
            return False

    def _number(self, outcome: Outcome) -> list[float] | None:
        """The trial's values; studies of schema 1 have two objectives, of which the first is not read."""
        if outcome.state != PROXIED or outcome.score is None:
            return None
        return [0.0] * (self._values - 1) + [outcome.score.value]

    def _add(
        self,
        state: TrialState,
        row: Row,
        source: str,
        claim: dict[str, Any],
        outcome: Outcome | None,
        attributes: Mapping[str, Any],
    ) -> int:
        token = uuid.uuid4().hex
        found: dict[str, Any] = {"row": list(row), "source": source, "claim": {**claim, "token": token}}
        if outcome is not None:
            found["outcome"] = outcome.to_json()
        trial = optuna.trial.create_trial(
            state=state,
            values=None if outcome is None else self._number(outcome),
            user_attrs=found,
            system_attrs=dict(attributes),
        )
        return self._patience(self._once(trial, token))

    def _once(self, trial: FrozenTrial, token: str) -> Callable[[], int]:
        """Adds the trial, unless an earlier attempt did so and only its answer was lost."""
        attempts = 0

        def attempt() -> int:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                there = [fact.trial_id for fact in self.facts() if fact.token == token]
                if there:
                    return there[0]
            return self._storage.create_new_trial(self.study._study_id, template_trial=trial)

        return attempt


def load(storage: BaseStorage, name: str) -> optuna.Study:
    """A study that is there.

    Raises:
        NasError: it is not; lists what is.
    """
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)]
    if name not in names:
        listed = f"it has {', '.join(sorted(names)[:10])}" if names else "it has none"
        raise NasError(f"the storage has no study {name!r}: {listed}", hint="start it with nas search, then join it")
    return optuna.load_study(study_name=name, storage=storage)


def _state(outcome: Outcome) -> TrialState:
    if outcome.state == PROXIED:
        return TrialState.COMPLETE
    return TrialState.FAIL if outcome.state == FAILED else TrialState.PRUNED
