"""What the formats share: reading a configuration key by key, and proving that a configuration makes a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nas.errors import NasError, UsageError, unknown
from nas.network import BlockSpec, NetworkSpec


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A configuration with its class's defaults filled in; every refusal names the file and the key.

    Attributes:
        values: key -> value.
        where: the file.
    """

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def refuse(self, key: str, allowed: str) -> UsageError:
        """The error for a value that our blocks do not have."""
        return UsageError(f"{self.where}: {key} = {self.values[key]!r} is not supported; it must be {allowed}")

    def whole(self, key: str) -> int:
        """A whole number above 0."""
        if not is_whole(self[key]):
            raise self.refuse(key, "a whole number above 0")
        return int(self[key])

    def number(self, key: str) -> float:
        """A number above 0."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        if not isinstance(self[key], bool):
            raise self.refuse(key, "true or false")
        return bool(self[key])

    def one_of(self, key: str, known: Mapping[Any, Any]) -> Any:
        """What a value stands for in `known`."""
        value = self[key]
        if isinstance(value, list | tuple | dict) or value not in known:
            raise self.refuse(key, " or ".join(_json(name) for name in known))
        return known[value]

    def each(self, key: str, count: int, check: Callable[[Any], bool], allowed: str) -> list[Any]:
        """One value per stage, where one for all may be given instead of a list."""
        value = self[key]
        found = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(found) != count or not all(check(item) for item in found):
            raise self.refuse(key, f"{allowed}, or a list of {count}, one per stage")
        return found


def read(
    config: Mapping[str, Any],
    *,
    decides: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    inert: Collection[str],
    class_name: str,
    where: str,
) -> Reading:
    """A configuration whose every key is known.

    Args:
        config: the content of config.json.
        decides: the keys that decide the network, with the class's defaults.
        fixed: the keys that our blocks have at some values only: the values allowed, the class's default first.
        inert: the keys that do not change the network at any value.
        class_name: for the error of an unknown key.
        where: the file.

    Raises:
        UsageError: a key that the class does not have, or a value that is not allowed.
    """
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in given:
        if key not in decides and key not in fixed and key not in inert:
            raise unknown(f"key of {class_name}", key, [*decides, *fixed, *inert], where=where)
    reading = Reading(values={**decides, **{key: values[0] for key, values in fixed.items()}, **given}, where=where)
    for key, allowed in fixed.items():
        # 1 == True in Python, but a configuration that says one where the other belongs is wrong.
        if not any(
            reading[key] == value and isinstance(reading[key], bool) == isinstance(value, bool) for value in allowed
        ):
            raise reading.refuse(key, " or ".join(_json(value) for value in allowed))
    return reading


def is_whole(value: object) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def latent_size(reading: Reading, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the latent: those given, else the configuration's sample_size (a side, or height and width).

    Raises:
        UsageError: neither is known, or sample_size is something else.
    """
    size = reading["sample_size"]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if size is not None and (len(sides) != 2 or not all(map(is_whole, sides))):
        raise reading.refuse("sample_size", "a side, a height and a width, or null")
    high, wide = height or sides[0], width or sides[1]
    if high is None or wide is None:
        raise UsageError(f"{reading.where}: sample_size is null, so the height and width of the latent must be given")
    return high, wide


def prove(spec: NetworkSpec, class_name: str, rebuild: Callable[[], NetworkSpec]) -> None:
    """Raises unless what the class makes of the configuration that was written for `spec` is `spec`, block by block.

    Raises:
        NasError: the first block that differs, the setting, and what the class makes there.
    """
    try:
        made = rebuild()
    except NasError as error:
        raise refusal(spec, class_name, error.message) from error
    ours, theirs = ({b.name: b for b in network.blocks} for network in (spec, made))
    for block in spec.blocks:
        if block.name not in theirs:
            raise refusal(spec, class_name, f"it has a block {block.name!r} where the class has none")
        difference = _difference(block, theirs[block.name])
        if difference:
            raise refusal(spec, class_name, f"block {block.name!r} has {difference}")
    for name in theirs:
        if name not in ours:
            raise refusal(spec, class_name, f"it lacks the block {name!r} that the class has there")
    if list(ours) != list(theirs):
        raise refusal(spec, class_name, "its blocks stand in another order")


def refusal(spec: NetworkSpec, class_name: str, because: str) -> NasError:
    """The error for a network that a class cannot hold."""
    return NasError(
        f"network {spec.name} cannot be a diffusers {class_name}: {because}",
        hint="save it in the format of nas instead, which holds every network",
    )


def _difference(ours: BlockSpec, theirs: BlockSpec) -> str:
    """What our block has otherwise than the class's; empty if nothing."""
    if ours.kind != theirs.kind:
        return f"kind {ours.kind!r}, where the class has {theirs.kind!r}"
    settings, wanted = dict(ours.settings), dict(theirs.settings)
    for name in sorted({**settings, **wanted}):
        if settings.get(name) != wanted.get(name):
            got = [repr(values[name]) if name in values else "its default" for values in (settings, wanted)]
            return f"{name} = {got[0]}, where the class has {got[1]}"
    if ours.skip != theirs.skip:
        return f"a skip from {ours.skip!r}, where the class has one from {theirs.skip!r}"
    if (ours.inputs, ours.writes) != (theirs.inputs, theirs.writes):
        return f"inputs {dict(ours.inputs)}, where the class has {dict(theirs.inputs)}"
    return ""


def _json(value: object) -> str:
    """A value as config.json writes it."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else repr(value).replace("'", '"')
