"""Short distillation: the candidate's small copy is trained for seconds and asked how closely it follows the teacher.

The plainest proxy, and the one whose score is of the same kind as what a full training is judged by.
"""

from __future__ import annotations

from typing import Any, Final

from nas.bench import Bench, Stop
from nas.proxies import Score
from nas.proxies._shared import trained
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
    return trained(candidate, bench, stop)
