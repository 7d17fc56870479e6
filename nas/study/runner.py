"""Runner: takes trials as long as there are some to take, runs their proxies, and tells what came of them."""

from __future__ import annotations

import random
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nas import stopping
from nas.errors import NasError
from nas.evaluate import Evaluation
from nas.proxies import Score
from nas.space import Candidate
from nas.study.facts import RUNNING, Fact, Row, Snapshot
from nas.study.outcome import DUPLICATE, FORBIDDEN, OVER, PROXIED, Outcome, outcome_of
from nas.study.plan import changed
from nas.study.worker import scored

if TYPE_CHECKING:
    from nas.study.study import Study

# Proposals that are over budget or already known cost milliseconds. After a few in a row the next is drawn at random
# (TPE repeats itself in small categorical spaces); after many the feasible part of the space is taken as exhausted.
_REPEATING = 10
EXHAUSTED = 2_000

POLL_S = 1.0  # between looks at a study that has nothing to take while others still run
_WALL_S = 30.0  # between notes of how long the search has taken


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A proxy on its way."""

    fact: Fact
    candidate: Candidate
    priced: Evaluation
    rule: stopping.Rule | None


@dataclass(frozen=True, kw_only=True)
class _Next:
    """A row to be claimed; `origin` is the number of the lost trial that it repeats, if it does."""

    row: Row
    source: str
    origin: int | None = None
    attributes: dict[str, object]


class Runner:
    """One worker's loop over a study. A free slot takes a trial at once; there are no rounds.

    Args:
        study: open.
        executor: runs the proxies.
    """

    def __init__(self, study: Study, executor: Executor) -> None:
        self._study, self._executor, self._plan = study, executor, study.plan
        self._ledger, self._space = study.ledger, study.space
        self._running: dict[Future[Score], _Run] = {}
        self._exhausted = False
        self._done = 0  # runs that were finished when the study was last read, and mine since
        self._began, self._noted = time.monotonic(), time.monotonic()
        self._wall_s = float(study.attr("wall_s") or 0.0)

    def run(self) -> None:
        """Until the study has its trials, or nothing new is proposed and nobody runs any."""
        try:
            while True:
                self._fill()
                if self._running:
                    self._finish()
                elif self._over():
                    return
                else:
                    time.sleep(POLL_S)
        finally:
            self._note_wall()

    def _over(self) -> bool:
        snapshot = self._study.snapshot()
        if snapshot.complete(self._plan.trials):
            return True
        return self._exhausted and all(fact.outcome is not None for fact in snapshot.spending)

    # Taking trials

    def _fill(self) -> None:
        while len(self._running) < self._plan.jobs and (claimed := self._claim()) is not None:
            fact, snapshot = claimed
            candidate = self._space.from_row(np.array(fact.row))
            priced = self._study.price(fact.row, fact.source)
            rule = self._rule(fact, priced, snapshot)
            self._done = sum(each.outcome is not None for each in snapshot.spending)
            self._say(f"scoring {candidate.key}")
            future = self._executor.submit(
                scored, candidate, self._plan.teacher, self._plan.proxy, rule, self._plan.device
            )
            self._running[future] = _Run(fact=fact, candidate=candidate, priced=priced, rule=rule)

    def _claim(self) -> tuple[Fact, Snapshot] | None:
        """A trial that is this worker's to run, with the study as it was then; None where there is none to take.

        The trial is added first and then looked at among the others. Where one before it has its row, or the study has
        enough without it, it is withdrawn. All workers see the trials in one order, so exactly one keeps a row.
        """
        while True:
            attributes = self._ledger.attributes()
            self._check_terms(attributes)
            snapshot = self._study.snapshot()
            if self._gave_back(snapshot, attributes):
                continue
            chosen = self._next(snapshot, attributes)
            if chosen is None:
                return None
            worker = self._study.worker.name
            added = self._ledger.claim(chosen.row, chosen.source, worker, chosen.origin, chosen.attributes)
            snapshot = self._study.snapshot()
            mine = next(fact for fact in snapshot.facts if fact.trial_id == added)
            if snapshot.stands(mine, self._plan.trials):
                return mine, snapshot
            self._ledger.withdraw(mine)
            time.sleep(random.uniform(0.0, 0.05))

    def _check_terms(self, attributes: dict[str, object]) -> None:
        """Stops this worker where another search has changed what the study is priced by.

        Raises:
            NasError: names what changed.
        """
        now = attributes.get("terms")
        said = changed(self._plan.terms(), now) if isinstance(now, dict) else ()
        if said:
            raise NasError(
                f"another search changed the terms of {self._study.where}: {'; '.join(said)}",
                hint="start this command again to go on under the new ones",
            )

    def _gave_back(self, snapshot: Snapshot, attributes: dict[str, object]) -> bool:
        """Whether trials of dead workers were ended just now."""
        theirs = [fact for fact in snapshot.facts if fact.state == RUNNING]
        orphans = [fact for fact in theirs if self._study.worker.dead(fact.worker, attributes)]
        return sum(self._ledger.settle(fact) for fact in orphans) > 0

    def _next(self, snapshot: Snapshot, attributes: dict[str, object]) -> _Next | None:
        """What to claim: a lost trial, a reference, or a proposal that is worth its run."""
        trials = self._plan.trials
        for lost in snapshot.waiting(trials):
            return _Next(row=lost.row, source=lost.source, origin=lost.origin, attributes=lost.attributes)
        while len(snapshot.spending) < trials:
            source, row, kept = self._candidate(snapshot, attributes)
            if row is None:
                self._exhausted = True
                return None
            if not self._noted_without_run(row, source, snapshot):
                self._exhausted = False
                return _Next(row=row, source=source, attributes=kept)
            snapshot = self._study.snapshot()
        return None

    def _candidate(
        self, snapshot: Snapshot, attributes: dict[str, object]
    ) -> tuple[str, Row | None, dict[str, object]]:
        tried = {fact.source for fact in snapshot.chains}
        for reference in self._space.starting:
            if f"reference:{reference.name}" not in tried:
                return f"reference:{reference.name}", self._space.reference(reference.name).row, {}
        streak = snapshot.fruitless
        if streak >= EXHAUSTED:
            return "search", None, {}
        place = self._study.worker.place(attributes)
        row, kept = self._study.proposer.propose(snapshot, self._study.price, place, at_random=streak >= _REPEATING)
        return "search", row, kept

    def _noted_without_run(self, row: Row, source: str, snapshot: Snapshot) -> bool:
        """Whether a proposal is not worth a run; then a trial says why."""
        state = None
        if not self._space.allowed(np.array([row]))[0]:
            state = FORBIDDEN
        elif row in snapshot.known:
            state = DUPLICATE
        elif source == "search" and not self._study.price(row).feasible:
            state = OVER
        if state is not None:
            self._ledger.note(row, source, Outcome(state=state))
        return state is not None

    def _rule(self, mine: Fact, priced: Evaluation, snapshot: Snapshot) -> stopping.Rule | None:
        """When to stop a run, from the finished trials before it.

        References run to their end: a reader wants to know how far the published networks come.
        """
        if self._plan.prune is None:
            return None
        before = [f for f in snapshot.chains if f.state == PROXIED and f.origin < mine.origin]
        return stopping.rule(
            [self._study.past_run(fact) for fact in before] if mine.source == "search" else (),
            priced.latency_ms,
            confidence=self._plan.prune,
            steps=self._plan.proxy.steps,
            unit=self._study.unit,
        )

    # Telling

    def _finish(self) -> None:
        """Waits for a run to end, or until it is time to look for another trial, and tells what ended."""
        free = len(self._running) < self._plan.jobs and not self._exhausted
        ended = wait(self._running, timeout=POLL_S if free else None, return_when=FIRST_COMPLETED).done
        for future in sorted(ended, key=lambda each: self._running[each].fact.number):
            run = self._running.pop(future)
            try:
                outcome = outcome_of(future, self._plan.proxy, run.rule.goal if run.rule is not None else None)
            except BrokenExecutor as error:
                raise NasError(
                    f"the process of a proxy run died (out of memory?): {error}",
                    hint="the same command resumes; --jobs 1 needs less memory",
                ) from error
            heard = self._ledger.tell(run.fact, outcome)
            self._study.keep(run.candidate, outcome)
            self._report(run, outcome, heard)
        if time.monotonic() - self._noted > _WALL_S:
            self._note_wall()

    def _report(self, run: _Run, outcome: Outcome, heard: bool) -> None:
        self._done += heard
        note = outcome.state if outcome.score is None else f"{outcome.score.value:.4g} {self._study.unit}"
        if not heard:
            note += ", but this worker was silent so long that another was given it"
        self._say(f"{run.candidate.key} {run.priced.latency_ms:.0f} ms {note}")

    def _say(self, note: str) -> None:
        self._study.progress("search", self._done, max(self._plan.trials, self._done), note)

    def _note_wall(self) -> None:
        """How long the search has taken, over all its sessions; the search says it, not those who join."""
        self._noted = time.monotonic()
        if not self._study.joins:
            self._study.attr("wall_s", self._wall_s + self._noted - self._began)
