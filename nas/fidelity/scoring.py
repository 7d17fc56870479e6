"""What a proxy says of one candidate, as a row of a table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nas import quality
from nas.bench import Bench, Point, ProxySettings
from nas.errors import NasError
from nas.space import Candidate


def score_row(candidate: Candidate, teacher: str, settings: ProxySettings) -> dict[str, Any]:
    """A candidate's score and what it cost, in one thread; fit for a process pool.

    Returns:
        value, value_sd, text, text_sd (as `nas.proxies.Score`, empty where there is none), seeds (JSON), curve (JSON of
        points [step, seconds, train_db]: quarters of the way), params of the small copy, seconds (wall) and cpu_s, both
        without what candidates share, and failed: why there is no score, else empty.
    """
    Bench(teacher, settings).prepare()  # loaded once per process, so that no candidate's time includes it
    began, used = time.perf_counter(), time.process_time()
    try:
        found = quality.score(candidate, teacher, settings, _watched)
    except NasError as error:
        spent = {"seconds": round(time.perf_counter() - began, 2), "cpu_s": round(time.process_time() - used, 2)}
        return {"failed": error.message, **spent}
    return {
        "value": round(found.value, 5),
        "value_sd": round(found.value_sd, 5),
        "text": "" if found.text is None else round(found.text, 5),
        "text_sd": round(found.text_sd, 5),
        "seeds": json.dumps([round(value, 5) for value in found.seeds]),
        "curve": json.dumps([[p.step, round(p.seconds, 2), round(p.train_db, 4)] for p in found.curve]),
        "params": found.params,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_s": round(time.process_time() - used, 2),
        "failed": "",
    }


def _watched(points: Sequence[Point]) -> str | None:
    """Stops nothing: a run that is asked about keeps its curve."""
    return None


def value_of(row: Mapping[str, Any], name: str = "value") -> float | None:
    """A figure of a row that `score_row` made or a CSV gave back; None where there is none."""
    found = row.get(name, "")
    return None if found in ("", None) else float(found)
