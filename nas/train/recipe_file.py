"""The recipe file: found by name or path, changed by the command's `--set`, checked key by key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from nas import registry
from nas.distill import TrainSettings
from nas.errors import NasError, UsageError, unknown
from nas.objectives import objective
from nas.train.forms import UnfitError, fitted, hints
from nas.train.recipe import Goal, Recipe, SamplingSettings, Stage, StudentSettings, check_order, scaled_steps

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
_TOP = ("description", "sources", "student", "sampling", "stage")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OWN = [each.name for each in fields(Stage) if each.name not in ("train", "goals")]
_TRAIN = [each.name for each in fields(TrainSettings) if each.name != "seed"]


def recipes() -> tuple[str, ...]:
    """The names of the recipes that are shipped, read off their folder."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def recipe_path(name: str) -> Path:
    """The file of a recipe by name, or the file that `name` is the path of.

    Raises:
        UsageError: no such recipe; the nearest is offered.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no recipe file at {path}", hint=f"known recipes: {', '.join(recipes())}")
        return path
    if name not in recipes():
        raise unknown("recipe", name, recipes(), hint="or give the path of a .toml file")
    return FOLDER / f"{name}.toml"


def load_recipe(name: str, changes: Sequence[str] = (), *, steps: int | None = None) -> Recipe:
    """The recipe of that name or path.

    Args:
        name: one of `recipes`, or the path of a .toml file.
        changes: "KEY=VALUE", each replacing one value of the file: KEY is a key of every stage ("lr"), of one
            ("distil.lr"), of one's objective ("distil.output.weight"), or of a table ("student.width_divisor").
        steps: of all stages together, which keep their shares.

    Raises:
        UsageError: not TOML; a key, objective or setting that is not known (the nearest is named), missing or of the
            wrong form; or stages that cannot follow one another.
    """
    path = recipe_path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    _keys(data, _TOP, str(path), required=("stage",))
    if not isinstance(data["stage"], list) or not data["stage"]:
        raise UsageError(f"{path}: a recipe needs at least one [[stage]]")
    _keep_names(data["stage"], str(path))
    for change in changes:
        _change(data, change, str(path))
    if steps is not None:
        for stage, share in zip(
            data["stage"], scaled_steps([_steps(s, path) for s in data["stage"]], steps), strict=True
        ):
            stage["steps"] = share
    found = Recipe(
        name=path.stem,
        description=_value(data, "description", str, str(path), ""),
        sources=_value(data, "sources", tuple[str, ...], str(path), ()),
        student=_record(StudentSettings, data.get("student", {}), f"{path} [student]"),
        sampling=_record(SamplingSettings, data.get("sampling", {}), f"{path} [sampling]"),
        stages=tuple(_stage(table, f"{path} [stage {table['name']}]") for table in data["stage"]),
    )
    check_order(found)
    return found


def _steps(stage: Mapping[str, Any], path: Path) -> int:
    found: int = _value(stage, "steps", int, f"{path} [stage {stage['name']}]", MISSING)
    return found


def _keep_names(stages: Sequence[Any], where: str) -> None:
    """Every stage is a table with a name of its own, fit for a folder."""
    names: list[str] = []
    for number, stage in enumerate(stages, start=1):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{where}: stage {number} needs a name of letters, digits, - and _, got {name!r}")
        if name in names:
            raise UsageError(f"{where}: two stages are named {name!r}")
        names.append(name)


def _stage(table: Mapping[str, Any], where: str) -> Stage:
    """[[stage]]: its own keys, those of TrainSettings, and its objectives."""
    _keys(table, (*_OWN, *_TRAIN, "objective"), where, required=("steps", "batch", "lr", "objective"))
    forms, train_forms = hints(Stage), hints(TrainSettings)
    train = {key: _value(table, key, train_forms[key], where, MISSING) for key in _TRAIN if key in table}
    own = {key: _value(table, key, forms[key], where, MISSING) for key in _OWN if key in table}
    _ranges({**train, **own}, where)
    goals = table["objective"]
    if not isinstance(goals, list) or not goals:
        raise UsageError(f"{where} needs at least one [[stage.objective]]")
    made = tuple(_goal(goal, where) for goal in goals)
    try:
        return Stage(train=TrainSettings(**train), goals=made, **own)
    except NasError as error:
        raise UsageError(f"{where}: {error.message}") from error


def _goal(table: Any, where: str) -> Goal:
    """[[stage.objective]]: a name and the objective's own settings."""
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise UsageError(f"{where}: an objective needs a name, got {table!r}")
    name, settings = table["name"], {key: value for key, value in table.items() if key != "name"}
    place = f"{where} [objective {name}]"
    try:
        plugin = registry.load("nas.objectives", name).Objective
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from error
    forms = hints(plugin)
    known = [each.name for each in fields(plugin) if each.init]
    _keys(settings, known, place, kind="setting")
    try:
        made = objective(name, **{key: _value(settings, key, forms[key], place, MISSING) for key in settings})
    except UsageError as error:
        raise error if error.message.startswith(place) else UsageError(f"{place}: {error.message}") from error
    except NasError as error:
        raise UsageError(f"{place}: {error.message}", hint=error.hint) from error
    return Goal(name=name, objective=made)


def _record(kind: type, table: Any, where: str) -> Any:
    """A frozen dataclass from a table."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a table, got {table!r}")
    forms = hints(kind)
    _keys(table, forms, where)
    given = {key: _value(table, key, forms[key], where, MISSING) for key in table}
    _ranges(given, where)
    return kind(**given)


def _keys(
    table: Mapping[str, Any], known: Iterable[str], where: str, *, required: Sequence[str] = (), kind: str = "key"
) -> None:
    for key in table:
        if key not in known:
            raise unknown(kind, key, known, where=where)
    for key in required:
        if key not in table:
            raise UsageError(f"{where} needs the key {key!r}")


def _value(table: Mapping[str, Any], key: str, form: Any, where: str, default: Any) -> Any:
    """The value of a key in the form of its field."""
    if key not in table:
        if default is MISSING:
            raise UsageError(f"{where} needs the key {key!r}")
        return default
    try:
        return fitted(table[key], form)
    except UnfitError as error:
        raise UsageError(f"{where}: {key} must be {error}, got {table[key]!r}") from error


_ABOVE_0 = ("lr", "steps", "batch", "accumulate", "width_divisor", "norm_groups", "images", "checkpoint_every", "eps")
_FROM_0 = (
    "warmup",
    "clip",
    "weight_decay",
    "guidance",
    "guidance_width",
    "sample_every",
    "ema_gamma",
    "ema_half_life",
    "ema_ramp_up",
)
_SHARES = ("null_share", "decay_share", "ema_decay")


def _ranges(values: Mapping[str, Any], where: str) -> None:
    """Numbers that no training can use."""
    for key, value in values.items():
        if key in _ABOVE_0 and not value > 0:
            raise UsageError(f"{where}: {key} must be above 0, got {value}")
        if key in _FROM_0 and not value >= 0:
            raise UsageError(f"{where}: {key} must be 0 or more, got {value}")
        if key in _SHARES and not 0 <= value <= 1:
            raise UsageError(f"{where}: {key} must be from 0 to 1, got {value}")
    share = values.get("null_share", 0)
    if share and abs(round(1 / share) * share - 1) > 1e-6:
        raise UsageError(f"{where}: null_share must be one in a whole number (0.1 is one in ten), got {share}")
    every, grids = values.get("checkpoint_every", Stage.checkpoint_every), values.get("sample_every", 0)
    if grids % every:
        raise UsageError(f"{where}: sample_every ({grids}) must be a multiple of checkpoint_every ({every})")


# ---------------------------------------------------------------------------------------------- changes by --set


def _change(data: dict[str, Any], change: str, where: str) -> None:
    """Replaces one value as `--set KEY=VALUE` says; a key that is not known is found when the file is read."""
    key, separator, text = (part.strip() for part in change.partition("="))
    if not separator or not key:
        raise UsageError(f"--set takes KEY=VALUE, got {change!r}")
    value = _typed(text)
    first, _, rest = key.partition(".")
    stages = {stage["name"]: stage for stage in data["stage"]}
    if not rest:
        for stage in stages.values():
            stage[key] = value
    elif first in stages:
        name, _, setting = rest.rpartition(".")
        table = _objective(stages[first], name, f"{where} [stage {first}]") if name else stages[first]
        table[setting] = value
    elif first in ("student", "sampling"):
        data.setdefault(first, {})[rest] = value
    else:
        raise unknown("stage or table", first, [*stages, "student", "sampling"], where=f"--set {change}")


def _objective(stage: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The table of a stage's objective."""
    tables = stage.get("objective")
    found = [each for each in tables if isinstance(each, dict)] if isinstance(tables, list) else []
    for table in found:
        if table.get("name") == name:
            return table
    raise unknown("objective", name, [str(each.get("name")) for each in found], where=where)


def _typed(text: str) -> Any:
    """The TOML value that is written; what is none is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
