"""Numbers as a person reads them: three significant digits, SI units, an en dash for what is not known."""

from __future__ import annotations

import math
from typing import Any

UNKNOWN = "–"
_POWERS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def known(value: Any) -> bool:
    """Whether there is a number at all."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def significant(value: float | None, digits: int = 3) -> str:
    """1234.5 -> "1,230"; 0.012345 -> "0.0123"; a power of ten below a millionth and from a billion on."""
    if not known(value):
        return UNKNOWN
    assert value is not None
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    size = math.floor(math.log10(abs(value)))
    rounded = round(value, digits - 1 - size)
    if rounded and math.floor(math.log10(abs(rounded))) > size:  # 999.6 becomes 1,000
        size += 1
    if not -6 <= size < 9:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa} × 10{str(int(power)).translate(_POWERS)}".replace("-", "−")
    return f"{rounded:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def scaled(value: float | None, unit: str = "") -> str:
    """383670276 -> "384 M"; with a unit "384 MB". Powers of 1000."""
    if not known(value):
        return UNKNOWN
    assert value is not None
    if abs(value) >= 1e15:
        return f"{significant(value)} {unit}".rstrip()
    for scale, prefix in _SCALES:
        # 999,600 reads "1.00 M", not "1,000 k".
        if abs(value) >= scale * 0.9995:
            return f"{significant(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    """274.26 -> "274 ms"; from one second on "1.22 s"."""
    if not known(value):
        return UNKNOWN
    assert value is not None
    return f"{significant(value / 1000)} s" if abs(value) >= 999.5 else f"{significant(value)} ms"


def exact(ms: float) -> str:
    """A time that somebody chose, as it was chosen: 1400 -> "1.4 s", 274 -> "274 ms"."""
    return f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms"


def decibels(value: float | None, spread: float | None = None) -> str:
    """14.213, 0.08 -> "14.21 ± 0.08": two decimals, because a proxy's gaps are of that size."""
    if not known(value):
        return UNKNOWN
    text = f"{value:.2f}" + (f" ± {spread:.2f}" if known(spread) else "")
    return text.replace("-", "−")


def percent(fraction: float | None) -> str:
    """0.8734 -> "87 %"; small ones keep a digit, and what is not all or nothing is never rounded to it."""
    if not known(fraction):
        return UNKNOWN
    assert fraction is not None
    value = 100 * fraction
    if value in (0, 100):
        return f"{value:.0f} %"
    if abs(value) < 0.1:
        return "under 0.1 %"
    if 99.5 <= value < 100:
        return f"{min(value, 99.9):.1f} %"
    return (f"{value:.1f} %" if abs(value) < 10 else f"{value:.0f} %").replace("-", "−")


def duration(seconds: float | None) -> str:
    """75 -> "1 min 15 s"."""
    if not known(seconds):
        return UNKNOWN
    assert seconds is not None
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plain(value: Any) -> str:
    """Any value of a record: numbers as above, yes and no, lists joined."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        text = significant(value)
        return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or UNKNOWN
    if isinstance(value, dict):
        return ", ".join(f"{label(str(k))} {plain(v)}" for k, v in value.items()) or UNKNOWN
    return str(value)


def label(name: str) -> str:
    """A field's name as words: "learning_rate" -> "learning rate"."""
    return name.replace("_", " ")
