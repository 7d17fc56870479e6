"""Scores that other studies paid for: taken when a study begins, kept when a run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nas.record import REUSED
from nas.scores import StoredScore
from nas.study.outcome import PROXIED, UNTRAINABLE, Outcome

if TYPE_CHECKING:
    from nas.space import Candidate
    from nas.study.study import Study


def take(study: Study) -> None:
    """Adds what is stored as finished trials, once per study: it is then the same however often a run is resumed.

    They cost no trial of the budget. Those over the present budget are taken too: they teach the sampler.
    """
    if study.plan.scores is None or study.attr("reused") is not None:
        return
    snapshot = study.snapshot()
    stored = study.plan.scores.all()
    if not any(fact.ran for fact in snapshot.facts):
        for key in sorted(stored):
            each = stored[key]
            row = tuple(int(i) for i in each.row)
            if row not in snapshot.known and study.space.allowed(np.array([row]))[0]:
                study.ledger.note(row, REUSED, _outcome(each))
    taken = [fact for fact in study.snapshot().facts if fact.source == REUSED]
    scores = [fact.outcome.score for fact in taken if fact.outcome is not None and fact.outcome.score is not None]
    seconds = round(sum(score.seconds for score in scores), 1)
    study.attr("reused", {"available": len(stored), "used": len(taken), "seconds_saved": seconds})


def _outcome(stored: StoredScore) -> Outcome:
    if stored.state == PROXIED:
        return Outcome(state=PROXIED, score=stored.score, curve=tuple(stored.curve))
    return Outcome(state=UNTRAINABLE, cause=stored.cause, reason=stored.reason, curve=tuple(stored.curve))


def keep(study: Study, candidate: Candidate, outcome: Outcome) -> None:
    """Keeps what depends on the candidate and the proxy alone: a score, or that it cannot be trained."""
    if study.plan.scores is not None and outcome.state in (PROXIED, UNTRAINABLE):
        study.plan.scores.keep(
            candidate,
            StoredScore(
                row=candidate.row,
                score=outcome.score,
                curve=outcome.curve,
                cause=outcome.cause,
                state=outcome.state,
                reason=outcome.reason,
            ),
        )
