"""What a teacher says about drawn examples: computed once and cached for proxies, or fresh at every step for long runs.

Legend: B batch, R rows, C channels, H W height and width, T text tokens, D text width.
"""

from nas.targets.cache import CHUNK, TargetSettings, cache_path, cached_targets
from nas.targets.files import FORMAT, _load, cached_rows, rows_in
from nas.targets.lessons import Fresh, Lesson, Prompted, Task
from nas.targets.rows import Cached, Rows, drop_captions

__all__ = [
    "CHUNK",
    "FORMAT",
    "Cached",
    "Fresh",
    "Lesson",
    "Prompted",
    "Rows",
    "TargetSettings",
    "Task",
    "_load",
    "cache_path",
    "cached_rows",
    "cached_targets",
    "drop_captions",
    "rows_in",
]
