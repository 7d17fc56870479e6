"""What a study wrote, read back and checked: the report believes nothing else and measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nas.errors import NasError

_SCHEMA = 1
DECIBELS = "dB"
_AGAIN = "run the search again: it resumes and writes its files anew"
# Each field of study.json that the page cannot do without, and its type.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "space": str,
    "space_hash": str,
    "resolution_px": int,
    "target": str,
    "budget.text": str,
    "budget.ms": (int, float),
    "budget.per_step": bool,
    "budget.confidence": (int, float),
    "budget.step_budget_ms": (int, float),
    "pipeline.steps": int,
    "pipeline.guidance": bool,
    "pipeline.fixed_ms": (int, float),
    "pipeline.parts": list,
    "trials.asked": int,
    "trials.proxied": int,
    "trials.infeasible": int,
    "trials.duplicates": int,
    "trials.failed": int,
    "infeasible.share_of_space": (int, float),
    "wall_s": (int, float),
    "seed": int,
    "jobs": int,
    "command": str,
    "provenance": dict,
    "proxy": dict,
    "predictor": dict,
    "references": list,
    "hypervolume.values": list,
    "edges": list,
    "finished": bool,
}
_TEXT = ("key", "state", "source", "reason")
_NUMBERS = (
    "number",
    "params",
    "macs",
    "weight_bytes",
    "peak_activation_bytes",
    "step_ms",
    "latency_ms",
    "latency_low_ms",
    "latency_high_ms",
    "meets_budget_probability",
    "quality",
    "quality_sd",
    "text_quality",
    "text_quality_sd",
    "seconds",
)
_OPTIONAL = ("quality", "quality_sd", "text_quality", "text_quality_sd", "seconds")
_BLOCK_TEXT = ("key", "block", "kind", "stage")
_BLOCK_NUMBERS = ("params", "macs", "weight_bytes", "step_ms", "share")


@dataclass(frozen=True, kw_only=True)
class StudyFiles:
    """A study's folder as data.

    Attributes:
        folder: where the files lie; its name is the study's on the command line.
        record: study.json.
        trials: trials.csv; numbers are floats with NaN where there is none, choices are text with "" where inactive.
            Latencies on a further budget's device are in columns such as `latency_ms@galaxy-s24`.
        front: front.csv, the same columns, fastest first.
        blocks: blocks.csv, the front's blocks.
    """

    folder: Path
    record: Mapping[str, Any]
    trials: pd.DataFrame
    front: pd.DataFrame
    blocks: pd.DataFrame

    @property
    def recommended(self) -> str:
        """The recommended candidate's key, "" when there is none."""
        return str((self.record.get("recommended") or {}).get("key", ""))

    @property
    def unit(self) -> str:
        """Of the proxy's score; studies of 0.1 had dB only."""
        return str(self.record["proxy"].get("unit", DECIBELS))

    @property
    def judges_text(self) -> bool:
        """Whether the proxy says how far captions are followed."""
        return bool(self.trials["text_quality"].notna().any())

    @property
    def elsewhere(self) -> list[str]:
        """The devices of the further budgets; each has columns such as `latency_ms@DEVICE` in trials.csv."""
        return [c.removeprefix("latency_ms@") for c in self.trials.columns if c.startswith("latency_ms@")]

    @property
    def limited(self) -> bool:
        """Whether candidates had to meet more than one latency budget."""
        limits = (self.record.get("limits") or {}).values()
        return len(self.record.get("budgets") or []) > 1 or any(limit is not None for limit in limits)

    @property
    def choices(self) -> list[str]:
        """The names of the space's choices."""
        return [c.removeprefix("choice.") for c in self.trials.columns if c.startswith("choice.")]


def read_files(folder: Path) -> StudyFiles:
    """The study in `folder`.

    Raises:
        NasError: a file is missing or damaged; names the file and the field, or the line and column.
    """
    record = _record(folder / "study.json")
    trials = _frame(folder / "trials.csv", _TEXT, _NUMBERS)
    front = _frame(folder / "front.csv", _TEXT, _NUMBERS)
    blocks = _frame(folder / "blocks.csv", _BLOCK_TEXT, _BLOCK_NUMBERS)
    files = StudyFiles(folder=folder, record=record, trials=trials, front=front, blocks=blocks)
    _agree(files)
    return files


def _agree(files: StudyFiles) -> None:
    """The files must be of one study: every front member is a trial and has blocks."""
    for name, known in (("trials.csv", files.trials["key"]), ("blocks.csv", files.blocks["key"])):
        missing = sorted(set(files.front["key"]) - set(known))
        if missing:
            raise NasError(f"{files.folder / name}: no row for {missing[0]!r}, which is in front.csv", hint=_AGAIN)
    if files.recommended and files.recommended not in set(files.front["key"]):
        raise NasError(
            f"{files.folder / 'study.json'}: recommended.key {files.recommended!r} is not in front.csv", hint=_AGAIN
        )


def _record(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_text(path))
    except ValueError as error:
        raise NasError(f"{path} is not valid JSON: {error}", hint=_AGAIN) from error
    if not isinstance(data, dict):
        raise NasError(f"{path} must hold one JSON object, got {type(data).__name__}", hint=_AGAIN)
    if data.get("schema") != _SCHEMA:
        raise NasError(f"{path}: schema must be {_SCHEMA}, got {data.get('schema')!r}", hint=_AGAIN)
    for name, kind in _FIELDS.items():
        value: Any = data
        for step in name.split("."):
            if not isinstance(value, dict) or step not in value:
                raise NasError(f"{path}: the field {name} is missing", hint=_AGAIN)
            value = value[step]
        # True is an int to Python, not to a reader of the file.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise NasError(f"{path}: the field {name} must be {_words(kind)}, got {value!r}", hint=_AGAIN)
    return data


def _frame(path: Path, text: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
    """A CSV with its text columns as text and its number columns as floats."""
    _text(path)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise NasError(f"{path} is not a CSV table: {str(error).strip()}", hint=_AGAIN) from error
    for name in (*text, *numbers):
        if name not in frame.columns:
            raise NasError(f"{path}: the column {name} is missing", hint=_AGAIN)
    for name in numbers:
        column = pd.to_numeric(frame[name], errors="coerce")
        empty = frame[name] == ""
        bad = column.isna() & ~(empty if name in _OPTIONAL else False)
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise NasError(f"{path}:{row + 2}: {name} must be a number, got {frame[name].iloc[row]!r}", hint=_AGAIN)
        frame[name] = column.astype(float)
    for name in (c for c in frame.columns if "@" in c and not c.startswith("choice.")):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    return frame


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise NasError(f"{path} is not text: {error}", hint=_AGAIN) from error
    except OSError as error:
        raise NasError(f"{path} cannot be read: {error.strerror}", hint="nas search makes a study") from error


def _words(kind: type | tuple[type, ...]) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
    }
    return "a number" if isinstance(kind, tuple) else names[kind]
