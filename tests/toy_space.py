"""A two-stage space small enough to enumerate, trace and train within a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nas.op import FEATURES

TOML = """
family = "unet"
summary = "a toy"
sources = ["made for tests"]
[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
text_tokens = 6
text_width = 32
[fixed]
stages = 2
downscale = 2
head_width = 64
norm_groups = 32
resnets_1 = 1
conv_1 = "separable-2"
self_attention_0 = false
self_attention_1 = true
depth_0 = 0
attention = "mqa"
qk_norm = "none"
ffn_ratio = 2
[choices]
width_0 = [64, 128]
width_1 = [64, 128, 192]
resnets_0 = [1, 2]
conv_0 = ["full", "separable-2"]
depth_1 = [0, 1]
[[rules]]
when = { width_0 = [128], width_1 = [64] }
forbid = true
because = "networks do not narrow downwards"
[pipeline]
steps = 4
guidance = false
text_encoders = ["snapgen-text-encoders"]
decoder = "snapgen-tiny"
source = "made for tests"
[[reference]]
name = "known"
title = "a published one"
source = "made for tests"
params = 7_161_028
[reference.choices]
width_0 = 128
width_1 = 192
resnets_0 = 2
conv_0 = "full"
depth_1 = 1
"""


def write_space(folder: Path, name: str = "toy", text: str = TOML) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@dataclass(frozen=True)
class ToyPredictor:
    """A millisecond per giga-MAC and per operator, known to ten per cent: bounds follow from `confidence` alone."""

    target: str = "toy--none--fp32"
    scale: float = 1.0
    range_ms: tuple[float, float] = (1.0, 100.0)
    card: dict[str, Any] = field(default_factory=lambda: {"networks": 7, "rows": 7})

    @property
    def _costs(self) -> np.ndarray:
        each = [10.0 if f.endswith(".macs") else 1.0 if f.endswith(".count") else 0.0 for f in FEATURES]
        return self.scale * np.array(each)

    def predict(self, features: np.ndarray, confidence: float = 0.8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ms = features @ self._costs
        return ms, self.lower(features, confidence), self.upper(features, confidence)

    def upper(self, features: np.ndarray, confidence: float = 0.8) -> np.ndarray:
        return features @ self._costs * (1 + 0.2 * (confidence - 0.5))

    def lower(self, features: np.ndarray, confidence: float = 0.8) -> np.ndarray:
        return features @ self._costs * (1 - 0.2 * (confidence - 0.5))

    def probability_within(self, features: np.ndarray, ms: float) -> np.ndarray:
        return np.clip(0.5 + (ms / (features @ self._costs) - 1) / 0.2, 0.0, 1.0)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        return features @ self._costs

    def extrapolation(self, features: np.ndarray) -> np.ndarray:
        return np.zeros(len(features), dtype=bool)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "toy", "scale": self.scale}
