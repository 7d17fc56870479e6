"""A recipe as a TOML file again, every default spelt out: what `--dry-run` shows and what a run keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nas.train.recipe import Recipe


def as_toml(recipe: Recipe) -> str:
    """The text of a file that `load_recipe` reads as an equal recipe."""
    lines = [f"description = {_value(recipe.description)}", f"sources = {_value(list(recipe.sources))}"]
    plain = recipe.to_json()
    for name in ("student", "sampling"):
        lines += ["", f"[{name}]", *_pairs(plain[name])]
    for stage in plain["stage"]:
        lines += ["", "[[stage]]", *_pairs({key: value for key, value in stage.items() if key != "objective"})]
        for goal in stage["objective"]:
            lines += ["", "[[stage.objective]]", *_pairs(goal)]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    """TOML has no word for None: the key is left out."""
    return (f"{key} = {_value(value)}" for key, value in table.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # What JSON writes of a text, a whole number or a truth value is TOML too; DEL alone must be escaped there.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
