"""What hardware said of a study's finalists, and how a measuring kit goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nas.cli.console import closing, note, result, table

if TYPE_CHECKING:
    from nas.measure.kit import Kit
    from nas.remeasure import Remeasured


def kit_following(kit: Kit, alias: str) -> str:
    """The command that reads a filled kit back."""
    return f"nas measure --target {alias} --import {kit.rows}"


def print_remeasured(found: Remeasured, card: Mapping[str, Any] | None, as_json: bool) -> None:
    """Predicted beside measured of each finalist, and whether it still is within the budget.

    Args:
        found: of `nas.remeasure.remeasure`.
        card: of the predictor that was fitted with the new rows; None where none was.
        as_json: print only the closing lines, to stderr.
    """
    if found.kit is not None:
        if not as_json:
            result(f"{found.alias} cannot be measured from here: a kit of {len(found.kit.files)} finalists was written")
        closing(wrote=found.kit.folder, following=kit_following(found.kit, found.alias), as_json=as_json)
        return
    if not as_json:
        _print_finalists(found, card)
    if found.rows:
        note(
            f"the study keeps the predictor that it was made with; {found.alias} has a newer one now, so a search with"
            " the same options starts a new study"
        )
    closing(wrote=found.path, following=f"nas devices show {found.alias}", as_json=as_json)


def _print_finalists(found: Remeasured, card: Mapping[str, Any] | None) -> None:
    from nas.remeasure import mean_error

    rows = [
        (
            f.key,
            f"{f.latency_ms:.4g}",
            f"{f.low_ms:.4g}-{f.high_ms:.4g}",
            None if f.measured_ms is None else f"{f.measured_ms:.4g}",
            None if f.error is None else f"{f.error:+.1%}",
            "-" if f.within_budget is None else "within" if f.within_budget else "OVER",
            str(f.sessions or "-"),
        )
        for f in found.finalists
    ]
    result(f"measured on {found.alias}: {found.what}")
    header = ("candidate", "predicted ms", "interval", "measured ms", "step error", "budget", "sessions")
    result(table(header, rows))
    for f in found.finalists:
        if f.skipped:
            result(f"{f.key} was not measured: {f.skipped}")
    error = mean_error(found.finalists)
    if error is not None:
        result(f"mean error of the predicted calls {error:.1%}; budget {found.budget_ms:.4g} ms")
    if card is not None:
        held_out = card["held_out"]
        result(f"the card of {found.alias}: {card['networks']} networks, held-out error {held_out['mape']:.1%}")
