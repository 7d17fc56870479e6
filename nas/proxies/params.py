"""A baseline: the candidate's parameters, at full size. A proxy that ranks no better measures size.

That few parameters are also the usual wish makes it a poor quality: it contradicts the cost on every front.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from nas.bench import Bench, Stop
from nas.pricing import Pricer
from nas.proxies import Score, combined
from nas.space import Candidate

SUMMARY: Final = "the candidate's parameters, a baseline"
UNIT: Final = "log10"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """log10 of the candidate's parameters; no small copy is made, and neither bench nor `stop` is asked."""
    began = time.perf_counter()
    params = sum(block.cost.params for block in Pricer(candidate.space).blocks(candidate))
    return combined([math.log10(params)], (), seconds=time.perf_counter() - began)
