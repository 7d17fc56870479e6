"""What a person asks of a search, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nas.evaluate import Evaluation, Limits
from nas.quality import ProxySettings

# What a machine that joins a search decides for itself, or what the search alone needs.
_OWN = ("jobs", "out", "fresh", "command", "train_on", "storage", "ray", "cpus_per_proxy", "gpus_per_proxy")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a person asks for; None takes the default.

    Attributes:
        space: a space's name, or the path of its file.
        budgets: TIME@DEVICE each, of different devices; the first one's latency is the front's axis.
        limits: what a network may have at most.
        trials: how many candidates a proxy run is spent on; 0 re-prices kept scores alone.
        sampler: one of `nas.sampler.NAMES`.
        confidence: with which a latency must lie within its budget.
        resolution_px: of the images, instead of the space's.
        steps, guidance, decoder, text_encoders: of the pipeline, instead of the space's.
        proxy: None for the default of the space and teacher.
        prune: whether proxy runs that cannot reach the front end early, with `prune_confidence`.
        reuse: whether scores are taken from earlier studies and kept for later ones.
        storage: the URL of an Optuna storage instead of the journal in the study's folder.
        ray: the address of a Ray cluster that runs the proxies, with `cpus_per_proxy` and `gpus_per_proxy` each.
        out: the study's folder; None for the one of the same search, or a new one below reports/.
        fresh: drop what the folder holds.
        command: as it is told to the reader.
    """

    space: str
    budgets: tuple[str, ...]
    limits: Limits = Limits()
    trials: int = 60
    seed: int = 0
    jobs: int = 2
    sampler: str = "front"
    confidence: float = 0.8
    resolution_px: int | None = None
    steps: int | None = None
    guidance: bool | None = None
    decoder: str | None = None
    text_encoders: tuple[str, ...] | None = None
    teacher: str = "embedded"
    out: Path | None = None
    fresh: bool = False
    command: str = "nas search"
    proxy: ProxySettings | None = None
    prune: bool = True
    prune_confidence: float = 0.95
    train_on: str = "cpu"
    reuse: bool = True
    storage: str | None = None
    ray: str | None = None
    cpus_per_proxy: float = 1.0
    gpus_per_proxy: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What another machine needs to know to join the search, as plain data."""
        return {name: value for name, value in asdict(self).items() if name not in _OWN}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], **own: Any) -> SearchSettings:
        """The settings that `to_json` wrote, with this machine's `own` (jobs, storage, ...).

        Names that this version does not know are left out: a newer one wrote them, which the versions will tell.
        """
        found = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        found["budgets"] = tuple(found["budgets"])
        found["limits"] = Limits(**found["limits"])
        if found.get("text_encoders") is not None:
            found["text_encoders"] = tuple(found["text_encoders"])
        if found.get("proxy") is not None:
            found["proxy"] = ProxySettings(**{**found["proxy"], "seeds": tuple(found["proxy"]["seeds"])})
        return cls(**{**found, **own})


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A finished search: its folder, the study record as written to study.json, and the front."""

    folder: Path
    record: dict[str, Any]
    front: list[Evaluation]

    def to_json(self) -> dict[str, Any]:
        """What `nas search --json` prints."""
        record = self.record
        keys = ("text", "ms", "device", "confidence")
        return {
            "study": self.folder.name,
            "space": record["space"],
            "budget": {key: record["budget"][key] for key in keys},
            "budgets": [{key: budget[key] for key in keys} for budget in record["budgets"]],
            "limits": record["limits"],
            "rejected": record["rejected"],
            "sampler": record["sampler"],
            "trials": record["trials"]["proxied"],
            "infeasible": record["trials"]["infeasible"],
            "stopped": record["stopping"]["stopped"],
            "saved_s": record["stopping"]["saved_s"],
            "reuse": record["reuse"],
            "changed": record["changed"],
            "proxy": {"name": record["proxy"]["proxy"], "unit": record["proxy"]["unit"]},
            "wall_s": record["wall_s"],
            "report": str(self.folder / "index.html"),
            "recommended": record["recommended"],
            "front": [asdict(member) for member in self.front],
        }
