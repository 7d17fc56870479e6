"""Simulated latency tables with known costs, shared by the tests of nas/latency."""

from __future__ import annotations

import numpy as np

from nas import tables
from nas.device import load_sheet
from nas.latency.regression import Rows, Shrinkage
from nas.op import FEATURES
from nas.tables import Measurement, Subject

SLUG = "toy--onnxruntime--fp16"
USED = ("conv.macs", "conv.read", "linear.macs", "linear.read", "attention.macs", "norm.bytes", "norm.count")
INDEX = [FEATURES.index(name) for name in USED]
TRUTH = np.array([20.0, 90.0, 30.0, 60.0, 45.0, 150.0, 8.0])
SHEET = """
device = "toy"
runtime = "onnxruntime"
precision = "fp16"
aliases = ["toy"]
chip = "{chip}"
{extra}
[roofline]
ms_per_gmac = 25.0
ms_per_gb = 200.0
ms_per_op = 0.01
"""
CHIPS = """
[fit]
trend = {tops = 0.5}
[chips.new]
tops = 40.0
[chips.old]
tops = 10.0
[chips.older]
tops = 5.0
"""


def sheet_in(folder, chip="new", extra=""):
    path = folder / f"{SLUG}.toml"
    path.write_text(SHEET.format(chip=chip, extra="") + extra)
    return load_sheet(path)


def costs():
    full = np.zeros(len(FEATURES))
    full[INDEX] = TRUTH
    return full


def networks(n, seed, spread=0.6):
    """[n, F]: networks of varied size and mixture over the used features."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, len(FEATURES)))
    x[:, INDEX] = rng.lognormal(0, spread, (n, 1)) * rng.lognormal(0, spread, (n, len(USED))) / TRUTH
    return x


def subject(key, vector, kind="network"):
    return Subject(key=key, kind=kind, name=key, features=tables.feature_map(vector))


def measured(key, ms, kind="network", **changes):
    values = {"session": "s1", "device": "toy", "chip": "new", "source": "simulated", "statistic": "median_wall"}
    return Measurement(target=SLUG, subject=key, subject_kind=kind, latency_ms=float(ms), **{**values, **changes})


def simulate(n=24, blocks=0, noise=0.02, seed=0, block_factor=0.9, spread=0.6):
    """Rows and subjects of a device with the true costs, whose lone blocks run faster by `block_factor`."""
    rng = np.random.default_rng(seed + 1000)
    x, b = networks(n, seed, spread), networks(blocks, seed + 1, spread) * 0.05
    rows, known = [], {}
    for kind, vectors, factor in (("network", x, 1.0), ("block", b, block_factor)):
        for i, vector in enumerate(vectors):
            key = f"{kind}{i:03d}"
            known[key] = subject(key, vector, kind)
            rows.append(measured(key, factor * vector @ costs() * np.exp(noise * rng.standard_normal()), kind))
    return rows, known


def rows_of(x, ms, effects=None, weights=None):
    n = len(x)
    return Rows(
        features=x,
        ms=ms,
        effects=np.zeros((n, 0)) if effects is None else effects,
        weights=np.ones(n) if weights is None else weights,
    )


def shrinkage(ridge=1e-6, effects=0, prior=None):
    prior = np.full(len(FEATURES), 50.0) if prior is None else prior
    return Shrinkage(prior=prior, ridge=ridge, centre=np.zeros(effects), effect_ridge=np.full(effects, 1e-4))
