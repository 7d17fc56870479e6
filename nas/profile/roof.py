"""A device's roof: how fast it could compute and move data, by its sheet, and how near to it something comes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nas.device import DeviceSheet
from nas.latency.problem import roofline


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The figures of a sheet's [roofline].

    Attributes:
        gmac_s: 10^9 MACs a second when nothing waits for data.
        gb_s: 10^9 bytes a second that can be moved.
        source: what the sheet says of where they are from.
    """

    target: str
    gmac_s: float
    gb_s: float
    source: str

    @classmethod
    def of(cls, sheet: DeviceSheet) -> Roof:
        """The roof of a device.

        Raises:
            UsageError: the sheet's [roofline] lacks a figure.
        """
        roofline(sheet)  # checks the figures
        said = [text.removeprefix("roofline:").strip() for text in sheet.sources if text.startswith("roofline:")]
        return cls(
            target=sheet.slug,
            gmac_s=1e3 / float(sheet.roofline["ms_per_gmac"]),
            gb_s=1e3 / float(sheet.roofline["ms_per_gb"]),
            source="; ".join(said) or "the sheet does not say",
        )

    @property
    def ridge(self) -> float:
        """MACs per byte from which on computing, not moving data, is the limit."""
        return self.gmac_s / self.gb_s

    def least_ms(self, macs: Any, moved_bytes: Any) -> Any:
        """The least time in ms that MACs and bytes take under this roof (arrays go through)."""
        return 1e3 * np.maximum(np.asarray(macs) / 1e9 / self.gmac_s, np.asarray(moved_bytes) / 1e9 / self.gb_s)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
