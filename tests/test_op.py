"""Operators and the features that latency is predicted from."""

from __future__ import annotations

import numpy as np
import pytest

from nas.errors import NasError
from nas.op import FEATURES, KINDS, MULTIPLYING, Op, features


def _named(vector: np.ndarray) -> dict[str, float]:
    return {name: value for name, value in zip(FEATURES, vector.tolist(), strict=True) if value}


def test_every_kind_has_bytes_and_count_and_only_multiplying_kinds_have_macs():
    expected = {f"{kind}.{part}" for kind in KINDS for part in ("bytes", "count")}
    expected |= {f"{kind}.macs" for kind in ("conv", "pointwise", "depthwise", "linear", "attention")}
    assert set(FEATURES) == expected
    assert len(FEATURES) == len(set(FEATURES)) == 29


def test_features_are_sums_in_giga_and_thousands():
    ops = [
        Op(
            kind="conv",
            macs=2_000_000_000,
            weight_bytes=1_000_000_000,
            read_bytes=2_000_000_000,
            written_bytes=500_000_000,
        ),
        Op(kind="conv", macs=1_000_000_000),
        Op(kind="softmax", read_bytes=250_000_000, written_bytes=250_000_000),
    ]
    vector = features(iter(ops))
    assert vector.dtype == np.float64
    assert _named(vector) == pytest.approx(
        {"conv.macs": 3.0, "conv.bytes": 3.5, "conv.count": 0.002, "softmax.bytes": 0.5, "softmax.count": 0.001}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_lands_in_its_own_features(kind: str):
    macs = 10**9 if kind in MULTIPLYING else 0
    named = _named(features([Op(kind=kind, macs=macs, read_bytes=10**9)]))
    assert named == pytest.approx(
        {f"{kind}.bytes": 1.0, f"{kind}.count": 0.001} | ({f"{kind}.macs": 1.0} if macs else {})
    )


def test_features_of_a_network_are_the_sum_of_its_blocks():
    first = [Op(kind="linear", macs=5, weight_bytes=3)]
    second = [Op(kind="norm", read_bytes=7), Op(kind="linear", macs=11)]
    np.testing.assert_allclose(features(first + second), features(first) + features(second))
    assert not features([]).any()


def test_an_operator_of_no_known_kind_or_with_impossible_macs_is_refused():
    with pytest.raises(NasError, match="'matmul'; known: conv"):
        Op(kind="matmul")
    with pytest.raises(NasError, match="'norm' cannot have MACs"):
        Op(kind="norm", macs=1)
