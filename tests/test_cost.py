"""Cost from operators, precision, and the peak of a network with skips held alive."""

from __future__ import annotations

import pytest

from nas.cost import bytes_per_element, cost, network_peak_bytes, skip_bytes, takes_x
from nas.errors import UsageError
from nas.network import block
from nas.op import Op

OPS = (
    Op(kind="conv", macs=1000, weight_bytes=400, read_bytes=80, written_bytes=80),
    Op(kind="attention", macs=50, read_bytes=40, written_bytes=40),
    Op(kind="linear", macs=7, weight_bytes=40, read_bytes=8, written_bytes=8),
)


def test_sums_of_operators():
    got = cost(OPS, peak_bytes=320)
    assert (got.params, got.macs, got.weight_bytes, got.peak_activation_bytes) == (110, 1057, 440, 320)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)])
def test_precision_scales_bytes_only(precision, size):
    got = cost(OPS, peak_bytes=320, precision=precision)
    assert (got.params, got.macs) == (110, 1057)
    assert got.weight_bytes == 110 * size
    assert got.peak_activation_bytes == 80 * size


def test_small_weights_do_not_make_activations_small():
    got = cost(OPS, peak_bytes=320, precision="w8a16")
    assert (got.weight_bytes, got.peak_activation_bytes) == (110, 160)


def test_an_unknown_precision_is_refused_with_the_known():
    with pytest.raises(
        UsageError, match=r"unknown precision 'fp61'; did you mean 'fp16'\? known: bf16, fp16, fp32, int8, w8a16"
    ):
        bytes_per_element("fp61")


def piece(name, skip=None, size=10):
    inputs = {"x": (size, 1, 1)} if skip is None else {"x": (size, 1, 1), "skip": (size, 1, 1)}
    return block(name, "resnet", inputs, skip=skip)


TIME = block("time", "time_embedding", {"timestep": ()})


def test_a_skip_is_its_shape_in_bytes():
    assert skip_bytes(piece("b", skip="a", size=25)) == 100
    assert skip_bytes(piece("b")) == 0
    assert takes_x(piece("b"))
    assert not takes_x(TIME)


def test_without_skips_the_peak_is_the_largest_block():
    assert network_peak_bytes([piece("a"), piece("b"), piece("c")], [5, 90, 7]) == 90
    assert network_peak_bytes([], []) == 0


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ([1, 100, 1, 1, 1], 100),  # b reads a as x: a is in b's own peak
        ([1, 1, 100, 1, 1], 140),  # c runs while a (40 bytes) waits; b is its x
        ([1, 1, 1, 100, 1], 140),  # d takes b, a waits
        ([1, 1, 1, 1, 100], 100),  # e takes a, nothing waits
    ],
)
def test_what_waits_beside_each_block(peaks, expected):
    blocks = [piece("a"), piece("b"), piece("c"), piece("d", skip="b"), piece("e", skip="a")]
    assert network_peak_bytes(blocks, peaks) == expected


def test_a_skip_used_twice_waits_until_the_second_use():
    blocks = [piece("a"), piece("b"), piece("c", skip="a"), piece("d"), piece("e", skip="a")]
    assert network_peak_bytes(blocks, [1, 1, 1, 100, 1]) == 140


def test_a_block_off_the_path_counts_alone():
    blocks = [piece("a"), TIME, piece("b"), piece("c"), piece("d", skip="a")]
    assert network_peak_bytes(blocks, [1, 500, 1, 1, 1]) == 500
    assert network_peak_bytes(blocks, [1, 1, 100, 1, 1]) == 100
    assert network_peak_bytes(blocks, [1, 1, 1, 100, 1]) == 140
