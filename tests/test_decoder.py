"""The image decoder family: published sizes, wiring, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from nas import families
from nas.build import build
from nas.errors import NasError, UsageError
from nas.families import decoder, network, network_of, scaled
from nas.network import InputShape, Scale
from nas.pricing import Pricer
from nas.space import SearchSpace, load_space
from nas.trace import block_trace

SHAPE = InputShape(channels=4, height=8, width=8)
BASE = {"stages": 2, "norm_groups": 4, "width_0": 8, "width_1": 16, "resnets_0": 1, "resnets_1": 2, "mid": "residual"}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("decoder")


def names(style: str, **more: object) -> list[str]:
    settings = BASE | {"style": style, "expansion": 1} | more
    return [block.name for block in network_of("decoder", settings, SHAPE, name="x").blocks]


@pytest.mark.parametrize("reference", ["sd-vae", "taesd"])
def test_parameters_and_macs_are_the_published_ones(space: SearchSpace, reference: str) -> None:
    record = space.find_reference(reference)
    assert record.gmacs is not None
    assert set(record.gmacs) == {"512", "1024"}
    for side, gmacs in record.gmacs.items():
        found = Pricer(space.at_resolution(int(side))).candidate(space.at_resolution(int(side)).reference(reference))
        assert found.params == record.params
        assert found.macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_the_reconstruction_of_snapgens_decoder_has_its_size_and_says_what_it_is(space: SearchSpace) -> None:
    record = space.find_reference("snapgen-tiny")
    assert record.params is None
    assert "reconstruction" in record.title
    params = Pricer(space).candidate(space.reference("snapgen-tiny")).params
    assert f"{params / 1e6:.2f}" == "1.38"
    spec = network(space.reference("snapgen-tiny"))
    assert not any("attention" in block.kind for block in spec.blocks)
    widths = [b.setting("out_channels") for b in spec.blocks if b.kind == "separable_decoder"]
    assert widths == sorted(widths, reverse=True)
    # The first block of a stage narrows already: the stage's own blocks are as wide as the next one's input.
    first = next(b for b in spec.blocks if b.name == "up_blocks.0.resnets.0")
    assert (first.setting("in_channels"), first.setting("out_channels")) == (320, 256)


def test_half_of_every_width_is_a_quarter_of_the_parameters(space: SearchSpace) -> None:
    pricer = Pricer(space)
    whole, half = (pricer.candidate(space.reference(name)).params for name in ("sd-vae", "snapfusion-half"))
    assert whole / half == pytest.approx(4.0, rel=0.01)


def test_names_are_diffusers(space: SearchSpace) -> None:
    with torch.device("meta"):
        kl = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, up_block_types=("UpDecoderBlock2D",) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
        ).decoder.state_dict()  # fmt: skip
        tiny = AutoencoderTiny().decoder.state_dict()
    ours = build(network(space.reference("sd-vae")), "meta").state_dict()
    assert {k.removeprefix("head."): v.shape for k, v in ours.items()} == {k: v.shape for k, v in kl.items()}
    taesd = build(network(space.reference("taesd")), "meta").state_dict()
    assert {k: v.shape for k, v in taesd.items()} == {k: v.shape for k, v in tiny.items()}


def test_the_tables_of_a_position_stay_small(space: SearchSpace) -> None:
    for position in families.positions(space):
        assert int(np.prod([len(space.choice(name).values) for name in position.depends])) < 20_000


def test_each_block_takes_what_the_one_before_it_gives(space: SearchSpace) -> None:
    for row in space.sample(8, seed=1):
        shape: tuple[int, ...] = (4, 128, 128)
        for block in network(space.from_row(row)).blocks:
            assert block.input("x") == shape
            shape = block_trace(block).ops[-1].shape[1:]
            if block.kind == "pixel_attention":
                shape = block.input("x")  # its last operator need not be the one that has the image's shape
        assert shape == (3, 1024, 1024)


def test_the_picture_is_eight_times_the_latent(space: SearchSpace) -> None:
    for reference in space.references:
        spec = network(space.at_resolution(64).reference(reference.name))
        with torch.device("meta"):
            image = build(spec, "meta")(torch.empty(1, 4, 8, 8))
        assert image.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("style", "first", "last"),
    [("vae", "conv_in", "head"), ("taesd", "layers.0", "layers.7"), ("separable", "conv_in", "head")],
)
def test_wiring(style: str, first: str, last: str) -> None:
    found = names(style)
    assert (found[0], found[-1]) == (first, last)
    assert ("mid_block.resnets.1" in found) == (style != "taesd")
    assert ("up_blocks.0.upsamplers.0" in found) == (style != "taesd")
    assert "up_blocks.1.upsamplers.0" not in found


def test_the_middle_and_the_1x1_convolution_are_there_when_asked_for() -> None:
    assert "mid_block.attentions.0" in names("vae", mid="attention")
    assert not any(name.startswith("mid_block") for name in names("separable", mid="none"))
    assert names("vae", post_quant_conv=True)[0] == "post_quant_conv"


def test_taesds_latent_is_pressed_and_its_image_is_from_minus_one() -> None:
    settings = BASE | {"style": "taesd", "width_1": 8}
    made = build(network_of("decoder", settings, SHAPE, name="x"), seed=0)
    far, further = (torch.full((1, 4, 8, 8), value) for value in (1e3, 1e6))
    with torch.no_grad():
        torch.testing.assert_close(made(far), made(further))
        for parameter in made.parameters():
            parameter.zero_()
        assert float(made(far).max()) == -1.0


def test_what_is_not_allowed_is_one_sentence(space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="style must be one of vae, taesd, separable, got 'gan'"):
        names("gan")
    with pytest.raises(UsageError, match="mid must be one of attention, residual, none, got 'dense'"):
        names("vae", mid="dense")
    with pytest.raises(UsageError, match="the family needs 'width_1'"):
        network_of("decoder", {k: v for k, v in BASE.items() if k != "width_1"} | {"style": "vae"}, SHAPE, name="x")
    scale = Scale(
        width_divisor=2, head_width=4, norm_groups=4, latent_channels=4, height=8, width=8, text_tokens=0, text_width=0
    )
    with pytest.raises(NasError, match="no small copy"):
        scaled(space.reference("taesd"), scale)
    assert decoder.NO_PROXY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_channel": 4}, "unknown setting 'out_channel' .* did you mean 'out_channels'"),
        ({"resnets_1": 1.5}, "resnets_1 must be a whole number of 1 or more, got 1.5"),
        ({"width_0": "16"}, "width_0 must be a whole number of 1 or more, got '16'"),
        ({"expansion": 0}, "expansion must be a whole number of 1 or more, got 0"),
        ({"post_quant_conv": "no"}, "post_quant_conv must be true or false"),
    ],
)
def test_a_setting_that_no_decoder_has_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        network_of("decoder", BASE | {"style": "separable", "expansion": 2} | change, SHAPE, name="x")


def test_a_network_survives_json(space: SearchSpace) -> None:
    spec = network(space.reference("snapgen-tiny"))
    again = type(spec).from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec


def test_the_attention_charges_every_pixel_for_every_other(space: SearchSpace) -> None:
    spec = network(space.reference("sd-vae"))
    attention = next(b for b in spec.blocks if b.kind == "pixel_attention")
    macs = sum(op.macs for op in block_trace(attention).ops)
    tokens, width = 128 * 128, 512
    assert macs == 2 * tokens**2 * width + 4 * tokens * width**2
