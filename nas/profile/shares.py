"""Where a network's parameters, MACs and time are, at a glance: stage by part, and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nas.page.numbers import percent
from nas.profile.operators import PARTS

_MEASURES = ("params", "macs", "activation_bytes", "step_ms")
_MOST = 0.8  # of the parameters: the stages that hold so much are named,
_NAMED = 5  # if they are no more than this


def shares(blocks: pd.DataFrame) -> pd.DataFrame:
    """Stage by part, in execution order: blocks, and the share of each measure.

    Args:
        blocks: of a profile.

    Returns:
        Columns stage, part, blocks, and params, macs, activation_bytes and step_ms as fractions of the network's
        (step_ms is NaN without a predictor). Each adds up to 1.
    """
    columns = list(_MEASURES)
    order = {name: i for i, name in enumerate(dict.fromkeys(blocks["stage"]))}
    grouped = blocks.groupby(["stage", "part"], sort=False)
    found = (grouped[columns].sum(min_count=1) / blocks[columns].sum(min_count=1)).assign(blocks=grouped.size())
    found = found.reset_index()
    rank = [(order[s], PARTS.index(p)) for s, p in zip(found["stage"], found["part"], strict=True)]
    found = found.iloc[sorted(range(len(rank)), key=rank.__getitem__)].reset_index(drop=True)
    return found[["stage", "part", "blocks", *columns]]


def by(found: pd.DataFrame, column: str) -> pd.DataFrame:
    """`shares` summed over stages or parts: indexed by `column`, in the order in which they come."""
    return found.groupby(column, sort=False)[list(_MEASURES)].sum(min_count=1)


def headline(found: pd.DataFrame) -> str:
    """One sentence: which stages hold the parameters, and which parts take the time (the MACs without a device)."""
    timed = bool(found["step_ms"].notna().all())
    measure, words = ("step_ms", "the time") if timed else ("macs", "the MACs")
    parts = by(found, "part").sort_values(measure, ascending=False)
    said = []
    if stages := holders(found):
        inside = found[found["stage"].isin(stages)]
        first = inside.groupby("part", sort=False)["params"].sum().sort_values(ascending=False)
        verb = ("holds", "takes") if len(stages) == 1 else ("hold", "take")
        said.append(
            f"{_listed(stages)} {verb[0]} {percent(float(inside['params'].sum()))} of the parameters"
            f" ({percent(float(first.iloc[0]))} in {first.index[0]}) and {verb[1]}"
            f" {percent(float(inside[measure].sum()))} of {words}"
        )
    else:
        first = parts["params"].sort_values(ascending=False)
        said.append(f"{first.index[0]} hold {percent(float(first.iloc[0]))} of the parameters")
    leading = [(str(name), float(row[measure])) for name, row in parts.iterrows() if row[measure] > 0.05]
    taking = [f"{leading[0][0]} take {percent(leading[0][1])} of {words}"]
    return "; ".join([*said, ", ".join([*taking, *(f"{name} {percent(share)}" for name, share in leading[1:])])])


def holders(found: pd.DataFrame) -> tuple[str, ...]:
    """The fewest stages that hold most parameters, in execution order; empty if these are many."""
    params = by(found, "stage")["params"]
    ranked = params.sort_values(ascending=False)
    count = int((ranked.cumsum() < _MOST).sum()) + 1
    if count > min(_NAMED, len(params) // 2):
        return ()
    chosen = set(ranked.index[:count])
    return tuple(str(s) for s in params.index if s in chosen)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
