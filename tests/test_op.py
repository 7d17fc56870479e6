"""Operators and the features that latency is predicted from."""

from __future__ import annotations

import numpy as np
import pytest

from nas.errors import NasError
from nas.op import FEATURES, KINDS, MULTIPLYING, Op, features


def _named(vector: np.ndarray) -> dict[str, float]:
    return {name: value for name, value in zip(FEATURES, vector.tolist(), strict=True) if value}


def test_every_kind_has_what_it_moves_and_its_count_and_only_multiplying_kinds_have_macs():
    for kind in KINDS:
        moved = ("read", "written") if kind in MULTIPLYING else ("bytes",)
        assert {f"{kind}.{name}" for name in (*moved, "far", "count")} <= set(FEATURES)
        assert (f"{kind}.macs" in FEATURES) == (kind in MULTIPLYING)
    assert len(FEATURES) == len(set(FEATURES)) == 47


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
    named = _named(vector)
    far = {name: named.pop(name) for name in ("conv.far", "softmax.far")}
    assert named == pytest.approx(
        {
            "conv.macs": 3.0,
            "conv.read": 3.0,
            "conv.written": 0.5,
            "conv.count": 0.002,
            "softmax.bytes": 0.5,
            "softmax.count": 0.001,
        }
    )
    assert far == pytest.approx({"conv.far": 3.5 * np.log2(3.5e9 / 2**22), "softmax.far": 0.5 * np.log2(0.5e9 / 2**22)})


def test_what_stays_within_four_mebibytes_is_not_far():
    assert "norm.far" not in _named(features([Op(kind="norm", read_bytes=2**21, written_bytes=2**21)]))
    further = _named(features([Op(kind="norm", read_bytes=2**22, written_bytes=2**22)]))
    assert further["norm.far"] == pytest.approx(further["norm.bytes"])  # one doubling
    twice = _named(features([Op(kind="norm", read_bytes=2**22)] * 2))
    assert "norm.far" not in twice, "told by operator, not by their sum"


@pytest.mark.parametrize(("shape", "few"), [((1, 16, 8), True), ((1, 17, 8), False), ((2, 9, 8), False), ((8,), True)])
def test_linear_layers_over_few_rows_are_told_apart(shape, few):
    named = _named(features([Op(kind="linear", macs=10**9, shape=shape)]))
    assert named == pytest.approx({"linear.few_macs" if few else "linear.macs": 1.0, "linear.count": 0.001})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_lands_in_its_own_features(kind: str):
    macs = 10**9 if kind in MULTIPLYING else 0
    named = _named(features([Op(kind=kind, macs=macs, read_bytes=2**20)]))
    moved = 2**20 / 1e9
    expected = {f"{kind}.macs": 1.0, f"{kind}.read": moved} if macs else {f"{kind}.bytes": moved}
    assert named == pytest.approx(expected | {f"{kind}.count": 0.001})


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
