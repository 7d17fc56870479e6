"""What came of one proxy run, as it is told to the journal and read back from it."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial

from nas.bench import Curve, Point, ProxySettings, Stopped
from nas.errors import NasError, UntrainableError
from nas.evaluate import Evaluation
from nas.proxies import Score
from nas.record import Trial


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is told of one proxy run."""

    evaluation: Evaluation
    state: str
    cause: str = ""
    curve: Curve = ()
    saved_s: float = 0.0

    def attributes(self) -> dict[str, Any]:
        """As the journal keeps it; a curve as [step, training dB, seconds], all that a later round asks of it."""
        return {
            "evaluation": asdict(self.evaluation),
            "state": self.state,
            "cause": self.cause,
            "curve": [[point.step, point.train_db, point.seconds] for point in self.curve],
            "saved_s": self.saved_s,
        }


def outcome_of(priced: Evaluation, future: Future[Score], settings: ProxySettings) -> Outcome:
    """What one proxy run says: a score, or why there is none; not the end of the search."""
    try:
        score = future.result()
    except Stopped as error:
        spent = error.curve[-1].seconds
        whole = spent * len(settings.seeds) * settings.steps / error.curve[-1].step
        evaluation = replace(priced, reason=error.message, seconds=spent)
        return Outcome(evaluation=evaluation, state="stopped", curve=error.curve, saved_s=whole - spent)
    except UntrainableError as error:
        said = error.message if error.message.startswith(error.cause) else f"{error.cause}: {error.message}"
        evaluation = replace(priced, reason=said, feasible=False)
        return Outcome(evaluation=evaluation, state="infeasible", cause=error.cause)
    except NasError as error:
        return Outcome(evaluation=replace(priced, reason=error.message), state="failed")
    if not math.isfinite(score.value):
        evaluation = replace(priced, reason=f"its score is {score.value}", feasible=False)
        return Outcome(evaluation=evaluation, state="infeasible", cause="score not finite")
    return Outcome(evaluation=priced.with_quality(score), state="proxied", curve=score.curve)


def read(frozen: FrozenTrial) -> Trial:
    """A finished trial as the journal has it."""
    found = frozen.user_attrs
    return Trial(
        number=frozen.number,
        state=found["state"],
        evaluation=Evaluation(**found["evaluation"]),
        round=found.get("round"),
        cause=found.get("cause", ""),
        curve=tuple(Point(step=step, train_db=db, seconds=s) for step, db, s in found.get("curve", ())),
        saved_s=found.get("saved_s", 0.0),
    )
