"""Networks side by side: where one has more parameters or MACs than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nas.errors import UsageError
from nas.profile.network import Profile
from nas.profile.operators import OPERATIONS
from nas.profile.subject import Subject
from nas.profile.words import NAMES, change, difference

_SHOWN = 3  # stages that a sentence names


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Profiles of several networks for images of one size; every ratio is to the first of them.

    Attributes:
        profiles: at least two, of different names.
    """

    profiles: tuple[Profile, ...]

    @property
    def names(self) -> list[str]:
        """The networks."""
        return [profile.name for profile in self.profiles]

    def stages(self, measure: str) -> pd.DataFrame:
        """One column of `Profile.stages` per network: a row per stage that any of them has, NaN where one has it not.

        Stages stand in execution order; one that only some have stands after the stage that it follows there.
        """
        order: list[str] = []
        for profile in self.profiles:
            place = 0
            for name in profile.stages.index:
                if name not in order:
                    order.insert(place, name)
                place = order.index(name) + 1
        columns = {profile.name: profile.stages[measure] for profile in self.profiles}
        return pd.DataFrame(columns).reindex(order)

    def totals(self) -> pd.DataFrame:
        """A row per network: params, macs, one column per group of operations, and bytes."""
        rows = [
            {
                "params": p.total.params,
                "macs": p.total.macs,
                **{f"{group}_macs": macs for group, macs in p.operations.items()},
                "weight_bytes": p.total.weight_bytes,
                "peak_activation_bytes": p.total.peak_activation_bytes,
                "step_ms": None if p.latency is None else p.latency.ms,
            }
            for p in self.profiles
        ]
        return pd.DataFrame(rows, index=self.names)

    def sentences(self) -> list[str]:
        """For each network after the first: how it differs in parameters and MACs, and which stages make that up."""
        first, said = self.profiles[0], []
        for other in self.profiles[1:]:
            parts = []
            for measure in ("params", "macs"):
                mine, theirs = (float(getattr(p.total, measure)) for p in (first, other))
                parts.append(f"{difference(theirs / mine - 1)} {NAMES[measure]} ({self._apart(measure, other.name)})")
            said.append(f"{other.name} against {first.name}: {'; '.join(parts)}")
        return said

    def _apart(self, measure: str, name: str) -> str:
        """The stages and the group of operations in which a network differs most from the first."""
        table = self.stages(measure).fillna(0.0)
        apart = (table[name] - table[self.names[0]]).sort_values(key=abs, ascending=False, kind="stable")
        stages = [f"{stage} {change(measure, value)}" for stage, value in apart.items() if value][:_SHOWN]
        if stages and measure == "macs":
            totals = self.totals()
            groups = {g: float(totals[f"{g}_macs"][name] - totals[f"{g}_macs"].iloc[0]) for g in OPERATIONS}
            stages += [f"by operation: {', '.join(f'{g} {change(measure, v)}' for g, v in groups.items())}"]
        return ", ".join(stages) if stages else "the same in every stage"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `nas profile --compare --json` prints it."""
        stages = {measure: self.stages(measure) for measure in ("params", "macs")}
        totals = self.totals()
        return {
            "networks": [p.to_json() for p in self.profiles],
            "resolution_px": self.profiles[0].subject.resolution_px,
            "stages": [
                {"stage": stage} | {m: _plain(table.loc[stage].to_dict()) for m, table in stages.items()}
                for stage in stages["params"].index
            ],
            "totals": {name: _plain(totals.loc[name].to_dict()) for name in self.names},
            "relative_to": self.names[0],
            "ratios": {
                name: {m: float(totals[m][name] / totals[m].iloc[0]) for m in ("params", "macs")} for name in self.names
            },
            "differences": self.sentences(),
        }


def check_comparable(subjects: Sequence[Subject]) -> None:
    """Refuses networks that cannot be set side by side.

    Raises:
        UsageError: fewer than two, two of one name, or images of different sizes.
    """
    if len(subjects) < 2:
        raise UsageError(f"a comparison needs at least two networks, got {len(subjects)}", hint="nas spaces")
    names = [subject.name for subject in subjects]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"{name} is named twice in the comparison")
    sizes = {subject.image for subject in subjects}
    if len(sizes) > 1:
        raise UsageError(
            f"networks are compared at one size of the image, got {', '.join(sorted(sizes))}", hint="--resolution PX"
        )


def compare(profiles: Sequence[Profile]) -> Comparison:
    """Sets profiles side by side.

    Raises:
        UsageError: see `check_comparable`.
    """
    check_comparable([profile.subject for profile in profiles])
    return Comparison(profiles=tuple(profiles))


def _plain(values: dict[Any, Any]) -> dict[str, Any]:
    """Whole numbers as such, and what a network does not have as None."""
    found = {str(k): None if pd.isna(v) else v for k, v in values.items()}
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in found.items()}
