"""What several tests of profiles share."""

from __future__ import annotations

import numpy as np

from nas.op import FEATURES


class Linear:
    """A predictor that is a product: what a profile needs of one."""

    target = "a-device--a-runtime--fp16"
    # Nothing for what moves far: a profile's columns do not tell it.
    costs = np.linspace(0.5, 1.5, len(FEATURES)) * [not name.endswith(".far") for name in FEATURES]

    def contributions(self, features):
        return features @ self.costs

    def predict(self, features, confidence=0.8):
        ms = features @ self.costs
        return ms, 0.9 * ms, 1.2 * ms

    def lower(self, features, confidence=0.8):
        return 0.9 * features @ self.costs

    def upper(self, features, confidence=0.8):
        return 1.2 * features @ self.costs

    def extrapolation(self, features):
        return np.zeros(len(features), dtype=bool)

    def warnings(self, features):
        return ("far outside what was fitted",)
