"""Facts: a study's trials as the storage has them, without prices; and which of them count.

A trial in the storage has `row` (the choices), `source`, `claim` (who runs it) and, once it is finished, `outcome`. A
RUNNING trial belongs to the worker of its claim. One that failed without an outcome is lost: its worker died, and its
row waits to be claimed again by a new trial that names the first as its `origin`. One that was pruned without an
outcome was withdrawn by its own worker: another trial had its row, or the study had enough.

Trials that stand for the same proposal are a chain. Whatever workers do at the same moment, everybody who reads the
storage finds the same chains, so nobody needs a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from nas.bench import Point
from nas.proxies import Score
from nas.record import REUSED
from nas.study.outcome import DUPLICATE, FAILED, FORBIDDEN, OVER, PROXIED, STOPPED, UNTRAINABLE, Outcome

RUNNING = "running"
LOST = "lost"
WITHDRAWN = "withdrawn"

_RAN = (RUNNING, LOST, PROXIED, STOPPED, UNTRAINABLE, FAILED)

Row = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One trial.

    Attributes:
        number: Optuna's; in the order in which trials reached the storage.
        trial_id: the storage's own name of it.
        row: index of each choice's value.
        source: "search", "reference:NAME" or "reused".
        state: running, lost, withdrawn, or its outcome's.
        outcome: None while there is none.
        worker: who runs or ran it; None in studies of schema 1.
        origin: number of the chain's first trial, its own where it is the first.
        token: of the claim, so that a write whose answer was lost is found again.
        told: whether a running one's outcome is written already; its worker died before the last word.
        attributes: the sampler's own, which it wants to see again.
    """

    number: int
    trial_id: int
    row: Row
    source: str
    state: str
    outcome: Outcome | None = None
    worker: str | None = None
    origin: int
    token: str = ""
    told: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        """Whether a proxy run of this study was or is spent on it."""
        return self.state in _RAN and self.source != REUSED


def read(frozen: FrozenTrial) -> Fact:
    """A trial as the storage has it, of this schema or the first."""
    found = frozen.user_attrs
    claim = found.get("claim", {})
    outcome = Outcome.from_json(found["outcome"]) if "outcome" in found else _first_schema(frozen)
    if not frozen.state.is_finished():
        state = RUNNING
    elif outcome is not None:
        state = outcome.state
    else:
        state = LOST if frozen.state == TrialState.FAIL else WITHDRAWN
    return Fact(
        number=frozen.number,
        trial_id=frozen._trial_id,
        row=tuple(found["row"]),
        source=found["source"],
        state=state,
        outcome=outcome if state != RUNNING else None,
        worker=claim.get("worker"),
        origin=claim.get("origin", frozen.number),
        token=claim.get("token", ""),
        told=state == RUNNING and "outcome" in found,
        attributes={k: v for k, v in frozen.system_attrs.items() if not k.startswith("constraints")},
    )


def _first_schema(frozen: FrozenTrial) -> Outcome | None:
    """The outcome in a trial of schema 1, which held a whole evaluation; its prices are left where they are."""
    found = frozen.user_attrs
    if not frozen.state.is_finished() or "claim" in found:
        return None
    if "evaluation" not in found:
        return Outcome(state=FORBIDDEN)
    evaluation, cause = found["evaluation"], found.get("cause", "")
    curve = tuple(Point(step=step, train_db=db, seconds=s) for step, db, s in found.get("curve", ()))
    if found["state"] == PROXIED:
        score = Score(
            value=evaluation["quality"],
            value_sd=evaluation["quality_sd"] or 0.0,
            text=evaluation["text_quality"],
            text_sd=evaluation["text_quality_sd"] or 0.0,
            seconds=evaluation["seconds"] or 0.0,
            curve=curve,
        )
        return Outcome(state=PROXIED, score=score, curve=curve)
    state = {"infeasible": UNTRAINABLE if cause else OVER}.get(found["state"], found["state"])
    return Outcome(
        state=state,
        reason=evaluation["reason"] if state in (STOPPED, UNTRAINABLE, FAILED) else "",
        cause=cause,
        seconds=evaluation["seconds"],
        curve=curve,
        saved_s=found.get("saved_s", 0.0),
    )


class Snapshot:
    """A study at one moment.

    Args:
        facts: of all its trials, by number.
        open_again: whether a stopped trial is worth another run, because what once beat it no longer does.
    """

    def __init__(self, facts: Sequence[Fact], open_again: Callable[[Fact], bool] = lambda fact: False) -> None:
        self.facts = facts
        self._open_again = open_again

    @cached_property
    def chains(self) -> tuple[Fact, ...]:
        """What came of each proposal, in the order of their origins; a lost one is still to be run."""
        chains: dict[int, list[Fact]] = {}
        for fact in self.facts:
            if fact.state != WITHDRAWN:
                chains.setdefault(fact.origin, []).append(fact)
        held = {fact.row for fact in self.facts if fact.state not in (LOST, WITHDRAWN) and self.holds(fact)}
        found = []
        for origin in sorted(chains):
            alive = [fact for fact in chains[origin] if fact.state != LOST]
            last = alive[0] if alive else chains[origin][-1]
            if not alive and last.row in held:
                continue  # its worker died before it could withdraw
            held.add(last.row)
            found.append(last)
        return tuple(found)

    def holds(self, fact: Fact) -> bool:
        """Whether nobody else needs to run the row of a trial that is neither lost nor withdrawn."""
        if fact.state in (OVER, FORBIDDEN, DUPLICATE):
            return False
        return fact.state != STOPPED or not self._open_again(fact)

    @cached_property
    def spending(self) -> tuple[Fact, ...]:
        """The chains that a proxy run is or was spent on: the budget counts these."""
        return tuple(fact for fact in self.chains if fact.ran)

    @cached_property
    def known(self) -> dict[Row, Fact]:
        """Row -> the trial that holds it, or that still waits for its run."""
        return {fact.row: fact for fact in reversed(self.chains) if self.holds(fact)}

    def waiting(self, trials: int) -> tuple[Fact, ...]:
        """Lost trials that must be run again, within a budget of `trials`."""
        return tuple(fact for fact in self.spending[:trials] if fact.state == LOST)

    def complete(self, trials: int) -> bool:
        """Whether `trials` runs are finished."""
        first = self.spending[:trials]
        return len(first) >= trials and all(fact.outcome is not None for fact in first)

    def stands(self, mine: Fact, trials: int) -> bool:
        """Whether a claim holds: no trial before it has its row, and the budget has room for its chain.

        All who ask get answers that agree, because each looks only at trials that reached the storage before its own.
        """
        for fact in self.facts[: mine.number]:
            if fact.row == mine.row and fact.state not in (LOST, WITHDRAWN) and self.holds(fact):
                return False
        return sum(fact.origin < mine.origin for fact in self.spending) < trials

    @property
    def proposals(self) -> int:
        """How many there were: what the next one's seed is made from. A run that was lost and repeated counts once."""
        return sum(fact.origin == fact.number for fact in self.facts)

    @property
    def fruitless(self) -> int:
        """How many proposals since the last one that was worth a proxy run."""
        streak = 0
        for fact in reversed(self.facts):
            if fact.state in _RAN or fact.source == REUSED:
                break
            streak += fact.state != WITHDRAWN
        return streak
