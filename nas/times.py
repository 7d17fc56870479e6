"""At which noise levels a student is trained, and what is done about levels that its teacher never saw.

Times are rectified flow's, t = s / (a + s), whatever schedule the teacher was trained on. A teacher on a discrete
variance-preserving schedule knows only a part of them: Stable Diffusion 1.x knows 0.0283 to 0.936, and what it says of
purer noise is a guess that a student should not be taught.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from nas.diffusion import FLOW, Schedule, sample_times
from nas.errors import unknown

Kind = Literal["uniform", "logit_normal", "mixed"]
OutOfRange = Literal["clamp", "drop"]

# The two normal distributions of log(t / (1 - t)) behind "mixed" (`nas.diffusion.sample_times`): mean and standard
# deviation; "logit_normal" is the first alone (Esser et al. 2024, SD3, section 3.1).
_LOGIT_NORMAL: Final = ((0.0, 1.0),)
_MIXED: Final = ((0.0, 1.0), (1.2, 1.3))
# Where hardly any time is inside, redrawing would go on for ever; the rest is then clamped.
_REDRAWS: Final = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """A distribution of training times.

    Attributes:
        kind: "uniform" over the levels of `schedule`, as diffusion models on a discrete schedule are trained;
            "logit_normal" (Stable Diffusion 3); "mixed", half of that and half leaning to high noise.
        out_of_range: times below schedule.least or above schedule.most are moved to that end ("clamp") or drawn again
            ("drop").
        schedule: the teacher's.
    """

    kind: Kind = "mixed"
    out_of_range: OutOfRange = "clamp"
    schedule: Schedule = FLOW

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("times", self.kind, get_args(Kind))
        if self.out_of_range not in get_args(OutOfRange):
            raise unknown("out_of_range", self.out_of_range, get_args(OutOfRange))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Times [count] in (0, 1], all of them known to the schedule."""
        t = self._plain(count, generator)
        least, most = self.schedule.least, self.schedule.most
        if self.out_of_range == "drop":
            for _ in range(_REDRAWS):
                outside = (t < least) | (t > most)
                if not bool(outside.any()):
                    break
                # As many as at first, so that what one row gets does not depend on how many others were outside.
                t = torch.where(outside, self._plain(count, generator), t)
        return t.clamp(least, most)

    def _plain(self, count: int, generator: torch.Generator) -> Tensor:
        if self.kind == "uniform":
            return self.schedule.times(torch.randint(0, self.schedule.levels, (count,), generator=generator))
        return sample_times(count, generator, high_noise=0.5 if self.kind == "mixed" else 0.0)

    @property
    def outside(self) -> float:
        """The share of drawn times that the schedule does not know, exactly."""
        if self.kind == "uniform":
            return 0.0
        ends = torch.tensor([self.schedule.least, self.schedule.most], dtype=torch.float64).logit()
        parts = _MIXED if self.kind == "mixed" else _LOGIT_NORMAL
        below, upto = torch.stack([torch.special.ndtr((ends - mean) / sd) for mean, sd in parts]).mean(0).tolist()
        return float(below + 1 - upto)

    def statement(self) -> str:
        """One sentence on which times are asked, and what becomes of those that the teacher never saw."""
        least, most = self.schedule.least, self.schedule.most
        if self.outside == 0:
            return f"training times are {self.kind.replace('_', '-')} over all that the teacher knows"
        done = "moved to its ends" if self.out_of_range == "clamp" else "drawn again"
        return (
            f"training times are {self.kind.replace('_', '-')}; the teacher knows {least:.4f} to {most:.4f}, and the"
            f" {self.outside:.1%} outside are {done}"
        )
