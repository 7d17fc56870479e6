"""A regression of cheap features on long runs: what size, shape and training-free scores together say of a candidate.

A linear ridge regression (Hoerl & Kennard 1970) of standardised features, one per space, fitted on candidates that were
trained long (benchmarks/proxy_truth.py) and kept in nas/data/proxies/regression.json, for the teacher, space and
settings that it was fitted with and no others. Its spread is that of the leave-one-out residuals. A candidate that it
was fitted on is given the prediction of the fit that left it out, so that no candidate is ever judged by its own truth.

It interpolates: far from the candidates that it was fitted on, and for what its features do not tell apart, it is wrong
without saying so.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nas.bench import Bench, Stop
from nas.errors import NasError
from nas.network import NetworkSpec
from nas.paths import package_data
from nas.proxies import Score, grad_norm, macs, naswot, params, synflow
from nas.space import Candidate, SearchSpace

SUMMARY: Final = "a regression of size, shape and training-free scores, fitted on long runs of the same space"
UNIT: Final = "dB"
DEFAULTS: Final[dict[str, Any]] = {"steps": 0, "held_rows": 1}

FEATURES: Final = (
    "params",
    "macs",
    "naswot",
    "synflow",
    "grad_norm",
    "residual_blocks",
    "transformer_layers",
    "self_attention_layers",
    "separable_share",
    "top_width",
    "mean_width",
)
TARGETS: Final = ("quality_db", "text_db")
FIT: Final = "python benchmarks/fit_regression.py"
FILE: Final = package_data("proxies", "regression.json")

# What decides a feature, besides the candidate and the teacher.
_SETTINGS: Final = (
    "task",
    "width_divisor",
    "norm_groups",
    "patch",
    "batch",
    "null_every",
    "text_weight",
    "data_seed",
    "seeds",
)
_ALPHAS: Final = tuple(10.0**power for power in range(-6, 4))
_FEWEST: Final = 8  # candidates; fewer leave no spread worth the name
_LEAST_EXPLAINED: Final = 0.5  # of the variance of the quality, left out; a fit that explains less is none


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """The quality and text that a long run is predicted to reach; `stop` is not asked.

    `value_sd` and `text_sd` are the spread of the leave-one-out residuals, not of seeds.

    Raises:
        NasError: there is no fit for this space, teacher and settings, or the candidate cannot be scaled down.
    """
    began = time.perf_counter()
    known = fit_for(candidate.space, bench)
    quality, text = predicted(known, candidate, bench)
    return Score(
        value=quality,
        value_sd=known["targets"]["quality_db"]["residual_sd"],
        text=text,
        text_sd=known["targets"]["text_db"]["residual_sd"],
        seeds=(quality,),
        seconds=time.perf_counter() - began,
    )


# ------------------------------------------------------------------------------------------------------- features


def features(candidate: Candidate, bench: Bench) -> dict[str, float]:
    """The numbers of `FEATURES` of one candidate.

    Training-free scores as their proxies give them, grad_norm as log10; of the small copy: residual blocks, transformer
    layers and those that attend to pixels, the share of residual blocks that are separable, and log2 of the width of
    the first stage and of the mean width of the residual blocks.

    Raises:
        NasError: the candidate cannot be scaled down or has no residual blocks.
    """
    plugins = {"params": params, "macs": macs, "naswot": naswot, "synflow": synflow, "grad_norm": grad_norm}
    found = {name: plugin.score(candidate, bench).value for name, plugin in plugins.items()}
    return {**found, "grad_norm": math.log10(found["grad_norm"]), **shape_of(bench.spec(candidate))}


def shape_of(spec: NetworkSpec) -> dict[str, float]:
    """Depth and width of a UNet in a few numbers.

    Raises:
        NasError: it has no residual blocks.
    """
    residual = [block for block in spec.blocks if block.kind in ("resnet", "separable")]
    layers = [block for block in spec.blocks if block.kind == "transformer"]
    if not residual:
        raise NasError(
            f"network {spec.name} has no residual blocks: the regression is of UNets", hint="another --proxy"
        )
    widths = [int(block.setting("out_channels")) for block in residual]
    return {
        "residual_blocks": float(len(residual)),
        "transformer_layers": float(sum(int(block.setting("depth")) for block in layers)),
        "self_attention_layers": float(sum(int(b.setting("depth")) for b in layers if b.setting("self_attention"))),
        "separable_share": sum(block.kind == "separable" for block in residual) / len(residual),
        "top_width": math.log2(widths[-1]),
        "mean_width": math.log2(sum(widths) / len(widths)),
    }


# ------------------------------------------------------------------------------------------------------ prediction


def fit_for(space: SearchSpace, bench: Bench, path: Path | None = None) -> dict[str, Any]:
    """The fit of a space, with the bench's teacher and settings.

    Raises:
        NasError: there is none; says which of the three differs.
    """
    fits = _read(str(path or FILE))
    wanted = belongs(bench)
    own = [each for each in fits if (each["space"], each["space_hash"]) == (space.name, space.hash)]
    if not own:
        known = ", ".join(sorted({each["space"] for each in fits})) or "none"
        raise _unfitted(f"space {space.name} ({space.hash}); fitted are: {known}")
    taught = [each for each in own if each["teacher"] == wanted["teacher"]]
    if not taught:
        raise _unfitted(f"the teacher {bench.teacher!r} with the task {bench.settings.task}")
    for each in taught:
        if each["settings"] == wanted["settings"]:
            return each
    theirs = taught[0]["settings"]
    other = [
        f"{name} = {value} (not {theirs[name]})" for name, value in wanted["settings"].items() if theirs[name] != value
    ]
    raise _unfitted(f"a bench with {', '.join(other)}")


def fitted(space: SearchSpace, bench: Bench) -> bool:
    """Whether there is a fit for this space, teacher and settings."""
    with contextlib.suppress(NasError):
        return bool(fit_for(space, bench))
    return False


def _unfitted(what: str) -> NasError:
    return NasError(f"the regression was not fitted for {what}", hint=FIT)


def belongs(bench: Bench) -> dict[str, Any]:
    """What a fit belongs to besides its space, as plain data: the teacher, and the settings that decide features."""
    settings = asdict(bench.settings)
    chosen: dict[str, Any] = json.loads(json.dumps({name: settings[name] for name in _SETTINGS}))
    return {"teacher": bench.digest, "settings": chosen}


@functools.cache
def _read(path: str) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        return []
    fits: list[dict[str, Any]] = json.loads(Path(path).read_text())["fits"]
    return fits


def predicted(found: Mapping[str, Any], candidate: Candidate, bench: Bench) -> list[float]:
    """The `TARGETS` in dB: left out where the candidate was fitted on, else from its features."""
    targets = [found["targets"][name] for name in TARGETS]
    if candidate.key in targets[0]["left_out"]:
        return [float(target["left_out"][candidate.key]) for target in targets]
    own = features(candidate, bench)
    row = np.array([own[name] for name in FEATURES])
    return [float(Line.from_json(target).at(row)) for target in targets]


# --------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """y = intercept + weights . (x - mean) / scale, with F features.

    Attributes:
        mean, scale: of each feature among the rows that it was fitted on [F].
        weights: [F].
        intercept: mean of the target.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercept: float

    @classmethod
    def fitted(cls, x: np.ndarray, y: np.ndarray, alpha: float) -> Line:
        """The line that minimises sum (y - f(x))^2 + alpha |weights|^2 over rows x [n, F], y [n]."""
        mean, scale = x.mean(0), _scale(x)
        z = (x - mean) / scale
        weights = np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T @ (y - y.mean()))
        return cls(mean=mean, scale=scale, weights=weights, intercept=float(y.mean()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Line:
        """Of what `fit` gives for a target."""
        arrays = {name: np.array(data[name]) for name in ("mean", "scale", "weights")}
        return cls(**arrays, intercept=data["intercept"])

    def at(self, x: np.ndarray) -> np.ndarray:
        """The predictions [...] of rows [..., F]."""
        predictions: np.ndarray = (x - self.mean) / self.scale @ self.weights + self.intercept
        return predictions


def fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fits the candidates of one space, as plain data.

    The penalty is the one with the least leave-one-out error; for the prediction of a row that is left out, it is
    chosen without that row too.

    Args:
        rows: one per candidate, with its "key", the numbers of `FEATURES` and those of `TARGETS`.

    Returns:
        Number of rows, the features' names, and for each target the line, its penalty `alpha`, the leave-one-out
        predictions by key, the spread of their residuals and the share of the variance that they explain.

    Raises:
        NasError: too few rows, or two of one candidate.
    """
    keys = [str(row["key"]) for row in rows]
    if len(set(keys)) < _FEWEST or len(set(keys)) < len(keys):
        raise NasError(
            f"a regression needs {_FEWEST} candidates or more, one row of each, got {len(keys)} rows of"
            f" {len(set(keys))} candidates",
            hint="python benchmarks/proxy_truth.py",
        )
    x = np.array([[float(row[name]) for name in FEATURES] for row in rows])
    targets = {name: _target(x, np.array([float(row[name]) for row in rows]), keys) for name in TARGETS}
    return {"rows": len(rows), "features": list(FEATURES), "targets": targets}


def check_explains(found: Mapping[str, Any]) -> None:
    """Refuses a fit that is not to be used.

    Raises:
        NasError: it explains less than half of the quality of candidates that it was not fitted on.
    """
    explained = found["targets"]["quality_db"]["explained"]
    if explained < _LEAST_EXPLAINED:
        raise NasError(
            f"the features explain {explained:.0%} of the quality of candidates that are left out, and a fit that"
            f" explains less than {_LEAST_EXPLAINED:.0%} is not used",
            hint="more candidates: python benchmarks/proxy_truth.py",
        )


def _target(x: np.ndarray, y: np.ndarray, keys: Sequence[str]) -> dict[str, Any]:
    alpha = _best_alpha(x, y)
    line = Line.fitted(x, y, alpha)
    left_out = []
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        left_out.append(Line.fitted(x[others], y[others], _best_alpha(x[others], y[others])).at(x[i]))
    residual, plain = y - np.array(left_out), (y - y.mean()) * len(y) / (len(y) - 1)  # plain: of the others' mean
    return {
        "alpha": alpha,
        "mean": line.mean.tolist(),
        "scale": line.scale.tolist(),
        "weights": line.weights.tolist(),
        "intercept": line.intercept,
        "residual_sd": float(np.sqrt(np.square(residual).mean())),
        "explained": float(1 - np.square(residual).sum() / np.square(plain).sum()) if plain.any() else 0.0,
        "left_out": {key: round(float(value), 4) for key, value in zip(keys, left_out, strict=True)},
    }


def _best_alpha(x: np.ndarray, y: np.ndarray) -> float:
    """The penalty with the least leave-one-out error, by the hat matrix (Golub, Heath & Wahba 1979)."""
    z = (x - x.mean(0)) / _scale(x)
    errors = {}
    for alpha in _ALPHAS:
        hat = z @ np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T) + 1 / len(y)
        errors[alpha] = float(np.square((y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9)).sum())
    return min(errors, key=lambda alpha: errors[alpha])


def _scale(x: np.ndarray) -> np.ndarray:
    """The standard deviation of each column of [n, F]; 1 where it is constant."""
    spread = x.std(0)
    return np.where(spread > 1e-12, spread, 1.0)
