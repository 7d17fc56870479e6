"""Block and network records: identity, order, JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from nas.errors import NasError
from nas.network import BlockSpec, InputShape, NetworkSpec, block, short_hash

_INPUT = InputShape(channels=4, height=8, width=8, text_tokens=7, text_width=16)


def _resnet(name: str = "a", *, skip: str | None = None, out_channels: int = 8) -> BlockSpec:
    inputs: dict[str, tuple[int, ...]] = {"x": (8, 4, 4), "temb": (32,)}
    if skip:
        inputs["skip"] = (8, 4, 4)
    return block(name, "resnet", inputs, skip=skip, in_channels=16 if skip else 8, out_channels=out_channels)


def _network(*blocks: BlockSpec, name: str = "n") -> NetworkSpec:
    return NetworkSpec(name=name, input=_INPUT, blocks=blocks)


def test_a_block_is_frozen_hashable_and_knows_its_settings():
    spec = _resnet()
    with pytest.raises(FrozenInstanceError):
        spec.name = "b"  # type: ignore[misc]
    assert {spec: 1}[_resnet()] == 1
    assert spec.setting("out_channels") == 8
    assert spec.input("temb") == (32,)
    with pytest.raises(KeyError):
        spec.setting("depth")


def test_signature_and_key_ignore_name_and_skip_source_only():
    spec = _resnet("a", skip="s")
    assert replace(spec, name="b", skip="t").signature == spec.signature
    assert replace(spec, name="b", skip="t").key == spec.key
    for other in (
        replace(spec, kind="separable"),
        _resnet("a", skip="s", out_channels=16),
        replace(spec, inputs=(("x", (8, 8, 8)), *spec.inputs[1:])),
        _resnet("a"),
    ):
        assert other.key != spec.key
        assert other.signature != spec.signature


def test_block_key_is_stable_across_runs():
    assert _resnet().key == "7a102da336e3"


def test_order_of_settings_and_inputs_does_not_matter():
    one = block("a", "resnet", {"x": (1, 2, 2), "skip": (3, 2, 2), "temb": (4,)}, skip="s", a=1, b=2)
    two = block("a", "resnet", {"temb": [4], "skip": [3, 2, 2], "x": [1, 2, 2]}, skip="s", b=2, a=1)
    assert one == two
    assert one.key == two.key
    assert [name for name, _ in two.inputs] == ["x", "skip", "temb"]


def test_inputs_of_other_names_come_last():
    spec = block("a", "mine", {"zeta": (1,), "text": (2, 3), "x": (1, 2, 2), "alpha": ()})
    assert [name for name, _ in spec.inputs] == ["x", "text", "alpha", "zeta"]


@pytest.mark.parametrize("sort_keys", [False, True])
def test_json_round_trip_is_exact(sort_keys: bool):
    attention = block(
        "t", "transformer", {"x": (8, 4, 4), "text": (7, 16)}, self_attention=False, ffn_ratio=2.5, qk="none"
    )
    network = _network(_resnet("a"), attention, _resnet("b", skip="a"))
    data = json.loads(json.dumps(network.to_json(), sort_keys=sort_keys))
    assert NetworkSpec.from_json(data) == network
    assert NetworkSpec.from_json(data).key == network.key


def test_network_key_ignores_names_but_not_wiring_order_or_input():
    network = _network(_resnet("a"), _resnet("b"), _resnet("c", skip="a"))
    renamed = _network(_resnet("q"), _resnet("b"), _resnet("c", skip="q"), name="other")
    assert renamed.key == network.key
    assert _network(_resnet("a"), _resnet("b"), _resnet("c", skip="b")).key != network.key
    assert _network(_resnet("a"), _resnet("b")).key != network.key
    assert replace(network, input=replace(_INPUT, text_tokens=8)).key != network.key
    wide = _resnet("b", out_channels=16)
    assert _network(_resnet("a"), wide).key != _network(replace(wide, name="a"), _resnet("b")).key


def test_two_blocks_of_one_name_and_a_skip_from_nowhere_are_refused():
    with pytest.raises(NasError, match="network n: two blocks are named 'a'"):
        _network(_resnet("a"), _resnet("a"))
    for blocks in ((_resnet("b", skip="a"), _resnet("a")), (_resnet("b", skip="b"),)):
        with pytest.raises(NasError, match=r"'b' skips from .* which is not before it"):
            _network(*blocks)


def test_short_hash_is_twelve_digits_of_sha256():
    assert short_hash("") == "e3b0c44298fc"
