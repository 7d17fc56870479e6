"""What a budget pays for: the components of a pipeline once per image, and as many denoiser calls as it has steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nas import components
from nas.components import Part
from nas.device import Budget, DeviceSheet
from nas.errors import UsageError
from nas.latency import LatencyPredictor
from nas.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A budget in the terms of one space: what one denoiser call may take after everything else is paid.

    Attributes:
        calls: denoiser calls that the budget pays for: 1 for a `/step` budget.
        parts: what is charged once per image; empty for a `/step` budget.
        confidence: the probability with which a latency must lie within the budget to count as feasible.
    """

    budget: Budget
    calls: int
    parts: tuple[Part, ...]
    confidence: float

    @property
    def fixed_ms(self) -> float:
        """Milliseconds per image that no choice of denoiser changes."""
        return sum(part.ms for part in self.parts)

    @property
    def fixed_low_ms(self) -> float:
        """`fixed_ms` with predicted parts at their lower bounds."""
        return sum(part.low_ms for part in self.parts)

    @property
    def fixed_high_ms(self) -> float:
        """`fixed_ms` with predicted parts at their upper bounds."""
        return sum(part.high_ms for part in self.parts)

    @property
    def step_budget_ms(self) -> float:
        """What one denoiser call may take beside the fixed parts' upper bounds; not positive if those break the budget.

        The upper bound of the whole is the sum of the parts' upper bounds: exact where a predictor's errors move
        together, which one predictor's mostly do, and too wide rather than too narrow where they do not.
        """
        return (self.budget.ms - self.fixed_high_ms) / self.calls

    def total_ms(self, step_ms: Any) -> Any:
        """One image (or one call) from one denoiser call."""
        return self.fixed_ms + self.calls * step_ms

    def total_low_ms(self, step_low_ms: Any) -> Any:
        """The lower bound on one image from that on one denoiser call."""
        return self.fixed_low_ms + self.calls * step_low_ms

    def total_high_ms(self, step_high_ms: Any) -> Any:
        """The upper bound on one image from that on one denoiser call."""
        return self.fixed_high_ms + self.calls * step_high_ms

    def words(self, step_ms: float | None = None) -> str:
        """What an image is the sum of: each part with its milliseconds and where they are from, in running order."""
        denoiser = "the denoiser" if step_ms is None else f"the denoiser at {step_ms:.0f} ms (predicted)"
        before = [_part_words(part) for part in self.parts if part.role == components.TEXT_ENCODERS]
        after = [_part_words(part) for part in self.parts if part.role == components.DECODER]
        return " + ".join([*before, f"{self.calls} x {denoiser}", *after])


def _part_words(part: Part) -> str:
    bounds = f", {part.low_ms:.0f} to {part.high_ms:.0f}" if part.low_ms < part.high_ms else ""
    return f"{part.name} {part.ms:.0f} ms ({part.basis}{bounds})"


def with_pipeline(
    space: SearchSpace,
    *,
    steps: int | None = None,
    guidance: bool | None = None,
    text_encoders: Sequence[str] | None = None,
    decoder: str | None = None,
) -> SearchSpace:
    """The same space with other settings in its [pipeline]; None keeps the space's own.

    Its networks and its hash stay the same, because a pipeline decides nothing about them.

    Raises:
        UsageError: the space has no pipeline, fewer steps than one, or an unknown component.
    """
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "text_encoders": text_encoders, "decoder": decoder}
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return space
    if space.pipeline is None:
        raise UsageError(f"space {space.name} has no [pipeline], so its {', '.join(changed)} cannot be set")
    if steps is not None and steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if text_encoders is not None:
        changed["text_encoders"] = tuple(text_encoders)
    listed = ", ".join(f"{key} = {', '.join(v) or 'none' if isinstance(v, tuple) else v}" for key, v in changed.items())
    changed["source"] = f"{space.pipeline.source}; but asked for: {listed}"
    found = replace(space, pipeline=replace(space.pipeline, **changed))
    components.components(found)  # refuses unknown names
    return found


def terms(
    space: SearchSpace,
    sheet: DeviceSheet,
    budget: Budget,
    confidence: float,
    predictor: LatencyPredictor | None = None,
) -> Terms:
    """What a budget means for a space on a device.

    Args:
        space: its networks' latents and its [pipeline].
        sheet: the device.
        budget: of one image, or of one denoiser call.
        confidence: of the bounds on components that are predicted.
        predictor: prices the components that the device's table has no row of.

    Raises:
        UsageError: confidence is not between 0.5 and 0.999, the space has no pipeline that a budget in seconds could
            pay for, or the fixed parts alone are over the budget.
        NasError: a component has no latency on that device at that resolution and none can be predicted.
    """
    if not 0.5 <= confidence <= 0.999:
        raise UsageError(f"confidence must be between 0.5 and 0.999, got {confidence}")
    if budget.per_step:
        return Terms(budget=budget, calls=1, parts=(), confidence=confidence)
    if space.pipeline is None:
        raise UsageError(
            f"space {space.name} has no [pipeline], so a budget for a whole image has no meaning for it",
            hint=f"budget one call: --budget {budget.ms:g}ms/step@{budget.device}",
        )
    parts = tuple(
        components.charge(part, space.resolution_px, sheet, predictor, confidence)
        for part in components.components(space)
    )
    found = Terms(budget=budget, calls=space.pipeline.calls, parts=parts, confidence=confidence)
    if found.step_budget_ms <= 0:
        listed = " + ".join(f"{part.name} {part.high_ms:.4g} ms" for part in parts)
        raise UsageError(
            f"budget {budget} is spent before the first denoiser call: {listed} = {found.fixed_high_ms:.4g} ms",
            hint=f"raise the budget, or budget one call: --budget {found.budget.ms:g}ms/step@{budget.device}",
        )
    return found
