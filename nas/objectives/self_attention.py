"""KOALA's loss (arXiv 2312.04005): the outputs of self-attention in matched transformer layers.

Of all features that its authors compared these teach most, in the decoder above all, and with the bottom layers of the
teacher's transformers; where no transformer stands, at the outermost stages, the stages' last features help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nas.errors import unknown
from nas.objectives import Anatomy, Batch, Common, Outputs, Tap
from nas.objectives._taps import MATCHES, SIDES, attention_taps, compared, is_attention, outer_taps, summed
from nas.objectives.output import squared


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Sum over the compared layers of each one's mean squared difference.

    The paper prints the sum inside the norm; compared are the layers one by one, as BK-SDM's code does.

    Attributes:
        weight: what both terms are multiplied by in the total; the paper's is 1.
        match: which layers of a deeper transformer a shallower one is compared with: "first" (the paper's best),
            "interleave" or "last".
        stages: whose transformers: "all", "encoder" (way down) or "decoder" (way up).
        last_features: also compare the outputs of the outermost down and up stage (the paper's DW-1 and UP-3); a
            diffusion transformer has none.
    """

    match: Literal["first", "interleave", "last"] = "first"
    stages: Literal["all", "encoder", "decoder"] = "all"
    last_features: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("match", self.match, MATCHES), ("stages", self.stages, SIDES)):
            if value not in known:
                raise unknown(name, value, known, where="the objective self_attention")

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """The output projections of matched self-attentions, and the outermost stages."""
        found = attention_taps(student, teacher, match=self.match, side=self.stages)
        return (*found, *outer_taps(student, teacher)) if self.last_features else found

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The terms "self_attention" and, where there are such layers, "last_features", in squared units of them.

        Raises:
            NasError: a feature is missing or has another shape than the teacher's.
        """
        assert teacher is not None  # it says that it needs one
        found = compared(student, teacher, "self_attention", squared)
        inside = {key: value for key, value in found.items() if is_attention(key)}
        outer = {key: value for key, value in found.items() if key not in inside}
        terms = {"self_attention": inside, "last_features": outer}
        return {name: summed(each).mean() for name, each in terms.items() if each}
