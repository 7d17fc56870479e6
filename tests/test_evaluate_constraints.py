"""Limits as they are typed, and what they bound at the precision of every target."""

from __future__ import annotations

import numpy as np
import pytest

from nas.errors import UsageError
from nas.evaluate import Limits
from nas.pricing import Prices

# Two networks priced at fp16: two bytes of each weight and activation.
PRICES = Prices(
    features=np.zeros((2, 1)),
    params=np.array([100, 300]),
    macs=np.array([1, 1]),
    weight_bytes=np.array([200, 600]),
    peak_activation_bytes=np.array([80, 40]),
)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"params": "400M"}, Limits(max_params=400_000_000)),
        ({"params": "1.2b"}, Limits(max_params=1_200_000_000)),
        ({"params": "12"}, Limits(max_params=12)),
        ({"memory": "1.2GB"}, Limits(max_memory_bytes=1_200_000_000)),
        ({"memory": "1 GiB"}, Limits(max_memory_bytes=2**30)),
        ({"size": "800mb", "params": "5k"}, Limits(max_weight_bytes=800_000_000, max_params=5_000)),
        ({}, Limits()),
    ],
)
def test_limits_are_read_with_their_units(given, found):
    assert Limits.parse(**given) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"params": "400MB"}, r"--max-params '400MB' is not a count such as 400M \(units: K, M, B\)"),
        ({"params": "-4M"}, "--max-params '-4M' is not a count"),
        ({"params": "many"}, "--max-params 'many' is not a count"),
        ({"memory": "1.2"}, r"--max-memory '1.2' is not a size such as 1.2GB \(units: B, kB, MB, GB, KiB, MiB, GiB\)"),
        ({"memory": "1.2G"}, "--max-memory '1.2G' is not a size"),
        ({"size": ""}, "--max-size '' is not a size such as 800MB"),
        ({"size": "0.4B"}, "--max-size '0.4B' leaves nothing"),
        ({"params": "0"}, "--max-params '0' leaves nothing"),
    ],
)
def test_a_limit_of_another_form_is_refused_with_what_was_typed(given, said):
    with pytest.raises(UsageError, match=said):
        Limits.parse(**given)


def test_only_what_was_asked_for_is_a_constraint():
    assert Limits().constraints("fp16", ("fp16",)) == ()
    limits = Limits(max_params=400_000_000, max_memory_bytes=1_200_000_000, max_weight_bytes=900)
    names = [each.name for each in limits.constraints("fp16", ("fp16",))]
    assert names == ["--max-params 400M", "--max-memory 1.2GB", "--max-size 900B"]


def test_bytes_are_those_of_the_target_and_of_several_the_most():
    limits = Limits(max_params=250, max_memory_bytes=700, max_weight_bytes=500)
    params, memory, size = limits.constraints("fp16", ("fp16",))
    assert params.values(PRICES).tolist() == [100, 300]
    assert memory.values(PRICES).tolist() == [280, 640]
    assert size.values(PRICES).tolist() == [200, 600]
    _, memory, size = limits.constraints("fp16", ("fp16", "fp32", "int8"))
    assert memory.values(PRICES).tolist() == [560, 1280]
    assert size.values(PRICES).tolist() == [400, 1200]
    _, memory, size = limits.constraints("fp16", ("w8a16",))
    assert memory.values(PRICES).tolist() == [180, 340]


def test_what_is_broken_is_told_in_its_unit():
    params, size = Limits(max_params=6_000_000, max_weight_bytes=800_000_000).constraints("fp16", ("fp16",))
    assert params.broken(7_160_000) == "7.16M parameters, over --max-params 6M"
    assert size.broken(1_250_000_000) == "1.25GB, over --max-size 800MB"
    assert params.words(0) == "0 parameters"
