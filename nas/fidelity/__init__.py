"""How well proxies rank: candidates trained long, the proxies' scores of them, and how the two agree."""

from __future__ import annotations

from nas.fidelity.choose import pool_of, spread_out
from nas.fidelity.rows import Table
from nas.fidelity.truth import Samples, checked, long_run, settings_key

__all__ = ["Samples", "Table", "checked", "long_run", "pool_of", "settings_key", "spread_out"]
