"""What came of one proxy run, as it is told to the storage and read back from it: facts, no prices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from nas.bench import Curve, Point, ProxySettings, Stopped
from nas.errors import NasError, UntrainableError
from nas.proxies import Score

PROXIED = "proxied"
STOPPED = "stopped"
UNTRAINABLE = "untrainable"
FAILED = "failed"
# Of a candidate that no run was spent on, for what was known when it was proposed.
OVER = "over the budget"
FORBIDDEN = "forbidden"
DUPLICATE = "duplicate"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is told of one trial.

    Attributes:
        state: one of this file's.
        score: of a proxied one.
        reason: why there is no score, in words.
        cause: of an untrainable one, for counts.
        seconds: that a stopped run took.
        curve: its way, as far as it came.
        saved_s: proxy seconds that stopping it saved (an estimate).
        goal: what a stopped run would have ended below, in the score's unit; None where that is not known.
    """

    state: str
    score: Score | None = None
    reason: str = ""
    cause: str = ""
    seconds: float | None = None
    curve: Curve = ()
    saved_s: float = 0.0
    goal: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As the storage keeps it; a curve as [step, training dB, seconds], all that a later run asks of it."""
        found: dict[str, Any] = {"state": self.state}
        if self.score is not None:
            s = self.score
            found["score"] = {"value": s.value, "value_sd": s.value_sd, "text": s.text, "text_sd": s.text_sd}
            found["score"] |= {"seconds": s.seconds, "params": s.params}
        named = {"reason": self.reason, "cause": self.cause, "seconds": self.seconds, "saved_s": self.saved_s}
        found |= {name: value for name, value in named.items() if value}
        if self.goal is not None:
            found["goal"] = self.goal
        if self.curve:
            found["curve"] = [[point.step, point.train_db, point.seconds] for point in self.curve]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Outcome:
        """As `to_json` wrote it."""
        curve = tuple(Point(step=step, train_db=db, seconds=s) for step, db, s in found.get("curve", ()))
        score = Score(**found["score"], curve=curve) if "score" in found else None
        rest = {name: found[name] for name in ("reason", "cause", "seconds", "saved_s", "goal") if name in found}
        return cls(state=found["state"], score=score, curve=curve, **rest)


def outcome_of(future: Future[Score], settings: ProxySettings, goal: float | None = None) -> Outcome:
    """What one proxy run says: a score, or why there is none; not the end of the search.

    Args:
        future: the run, done.
        settings: of the proxy.
        goal: what its rule held it against, if it had one.
    """
    try:
        score = future.result()
    except Stopped as error:
        spent = error.curve[-1].seconds
        whole = spent * len(settings.seeds) * settings.steps / error.curve[-1].step
        return Outcome(
            state=STOPPED, reason=error.message, seconds=spent, curve=error.curve, saved_s=whole - spent, goal=goal
        )
    except UntrainableError as error:
        said = error.message if error.message.startswith(error.cause) else f"{error.cause}: {error.message}"
        return Outcome(state=UNTRAINABLE, reason=said, cause=error.cause)
    except NasError as error:
        return Outcome(state=FAILED, reason=error.message)
    if not math.isfinite(score.value):
        return Outcome(state=UNTRAINABLE, reason=f"its score is {score.value}", cause="score not finite")
    return Outcome(state=PROXIED, score=score, curve=score.curve)
