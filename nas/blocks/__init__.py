"""Block kinds: one file each, found by listing this folder.

A file defines `Settings`, a frozen keyword-only dataclass of scalars, and `Block(nn.Module)` with
`Block(settings)` and a `forward` whose keyword arguments are the input names of its `BlockSpec`:

* `x` `[B, C, H, W]`, the running activation;
* `skip` `[B, C', H, W]`, concatenated after `x` on channels inside the block, so that the copy is
  part of the block's cost;
* `temb` `[B, E]`, the time embedding; `text` `[B, T, D]`, the text tokens; `pooled` `[B, P]`, a summary of them;
  `size_ids` `[B, n]`, sizes of the wanted image; `timestep` `[B]`; `guidance` `[B, G]`, an embedding of the guidance
  scale.

It returns what its `BlockSpec` writes: one tensor, or a tuple in the order of `writes`.

Parameter names and numerics follow diffusers wherever it has the same block. Shapes are static and
nothing is stored in buffers, so a block built on `meta` can be given its weights later.
"""

from __future__ import annotations

from nas.errors import NasError


def check(ok: bool, kind: str, field: str, got: object, allowed: str) -> None:
    """Raise the one sentence all block settings use when a value is out of range.

    Args:
        ok: The condition that must hold.
        kind: Block kind whose settings are checked.
        field: Name of the setting.
        got: Its value.
        allowed: What is allowed, in words.

    Raises:
        NasError: If `ok` is false.
    """
    if not ok:
        raise NasError(f"{kind} block: {field} = {got!r} is not allowed; it must be {allowed}")


def check_positive(kind: str, **values: int) -> None:
    """Raise unless every named value is at least 1."""
    for field, value in values.items():
        check(value >= 1, kind, field, value, "at least 1")


def check_groups(kind: str, groups: int, **channels: int) -> None:
    """Raise unless `groups` divides every named channel count (GroupNorm needs equal groups)."""
    for field, value in channels.items():
        check(value % groups == 0, kind, "norm_groups", groups, f"a divisor of {field} = {value}")
