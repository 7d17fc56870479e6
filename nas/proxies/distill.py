"""Short distillation: the candidate's small copy is trained for seconds and asked how closely it follows the teacher.

The plainest proxy, and the one whose score is of the same kind as what a full training is judged by.
"""

from __future__ import annotations

import time
from typing import Any, Final

from nas.bench import Bench, Curve, Stop, distilled, one_thread
from nas.proxies import Score, combined
from nas.space import Candidate

SUMMARY: Final = "a small copy, distilled from random weights for a few steps"
UNIT: Final = "dB"
DEFAULTS: Final[dict[str, Any]] = {}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """Trains the small copy once per seed and judges each on the held-out rows.

    Raises:
        Stopped: `stop` gave a reason; it is asked about the first seed.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    bench.prepare()
    began = time.perf_counter()
    spec = bench.spec(candidate)
    values: list[float] = []
    texts: list[float] = []
    curve: Curve = ()
    with one_thread():
        for seed in bench.settings.seeds:
            trained, found, way = distilled(bench.student(spec, seed), bench, stop=None if values else stop)
            curve = curve or way
            values.append(found.quality_db)
            texts.append(found.text_db)
    params = sum(each.numel() for each in trained.parameters())
    return combined(values, texts, curve=curve, params=params, seconds=time.perf_counter() - began)
