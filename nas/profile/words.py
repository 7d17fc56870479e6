"""What a cost is called and how it is written."""

from __future__ import annotations

from nas.page.numbers import UNKNOWN, milliseconds, percent, scaled

_UNITS = {"params": "", "macs": "", "weight_bytes": "B", "activation_bytes": "B", "peak_activation_bytes": "B"}
NAMES = {
    "params": "parameters",
    "macs": "MACs",
    "weight_bytes": "weights",
    "activation_bytes": "activation traffic",
    "peak_activation_bytes": "peak activations",
    "step_ms": "latency",
}


def shown(measure: str, value: float) -> str:
    """A cost with its unit."""
    return milliseconds(value) if measure == "step_ms" else scaled(value, _UNITS[measure])


def change(measure: str, value: float) -> str:
    """A difference between two costs, with its sign: "+31.1 M", "−60 G", "0"."""
    return ("+" if value > 0 else "−" if value < 0 else "") + shown(measure, abs(value))


def difference(fraction: float | None) -> str:
    """0.0026 -> "+0.3 %"; equal is "equal"."""
    if fraction is None:
        return UNKNOWN
    if fraction == 0:
        return "equal"
    if abs(fraction) < 0.001:
        return f"under 0.1 % {'more' if fraction > 0 else 'less'}"
    return ("+" if fraction > 0 else "") + percent(fraction)
