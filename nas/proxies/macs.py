"""A baseline: the candidate's multiply-adds of one call, at full size. A proxy that ranks no better measures size.

At the space's own resolution, without what `nas.cost` leaves out (norms, activations, softmax).
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from nas.bench import Bench, Stop
from nas.pricing import Pricer
from nas.proxies import Score, combined
from nas.space import Candidate

SUMMARY: Final = "the candidate's multiply-adds of one call, a baseline"
UNIT: Final = "log10"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """log10 of the candidate's multiply-adds per call; no small copy is made, and neither bench nor `stop` is asked."""
    began = time.perf_counter()
    macs = sum(block.cost.macs for block in Pricer(candidate.space).blocks(candidate))
    return combined([math.log10(macs)], (), seconds=time.perf_counter() - began)
