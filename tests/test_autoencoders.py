"""Image decoders against diffusers: the same names, the same weights, the same pixels, either way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from nas import formats
from nas.build import Network, build
from nas.checkpoint import load_diffusers, save_diffusers
from nas.errors import NasError, UsageError
from nas.exporters import onnx as exporter
from nas.families import network_of
from nas.formats import autoencoder_kl, autoencoder_tiny
from nas.network import InputShape

KL = {
    "block_out_channels": [8, 16, 16],
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
TINY = {
    "decoder_block_out_channels": [8, 8, 8],
    "num_decoder_blocks": [2, 3, 1],
    "encoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
}
KLS = {
    "as it is": {},
    "16 channels, no 1x1": {"latent_channels": 16, "use_post_quant_conv": False, "use_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "two layers": {"layers_per_block": 2, "out_channels": 4},
}


def theirs(kind: type, config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The class with random weights and lively norms."""
    torch.manual_seed(seed)
    model = kind(**config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def ours(module: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> Network:
    """Our network of the configuration with the class's weights; every tensor finds its place."""
    network = build(module.network(config, height=8, width=6))
    renamed = {own: tensor for name, tensor in weights.items() if (own := module.own_name(name)) is not None}
    network.load_state_dict(renamed)
    return network.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("change", KLS.values(), ids=KLS)
def test_a_vaes_decoder_paints_what_diffusers_paints(change: dict[str, Any]) -> None:
    config = KL | change
    model = theirs(AutoencoderKL, config)
    mine = ours(autoencoder_kl, config, model.state_dict())
    latent = torch.randn(2, model.config.latent_channels, 8, 6)
    with torch.no_grad():
        assert relative(mine(latent), model.decode(latent).sample) < 1e-5
    back = {autoencoder_kl.their_name(name): tensor for name, tensor in mine.state_dict().items()}
    other = theirs(AutoencoderKL, config, seed=1)
    missing, unexpected = other.load_state_dict(back, strict=False)
    assert not unexpected
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    with torch.no_grad():
        torch.testing.assert_close(other.decode(latent).sample, model.decode(latent).sample)
    assert KL["block_out_channels"] == list(autoencoder_kl.config(mine.spec)["block_out_channels"])
    rebuilt = AutoencoderKL(**autoencoder_kl.config(mine.spec))
    assert {n: t.shape for n, t in rebuilt.decoder.state_dict().items()} == {
        n: t.shape for n, t in model.decoder.state_dict().items()
    }


def test_taesds_decoder_paints_what_diffusers_paints() -> None:
    model = theirs(AutoencoderTiny, TINY)
    mine = ours(autoencoder_tiny, TINY, model.state_dict())
    latent = 3 * torch.randn(2, 4, 8, 6)
    with torch.no_grad():
        assert relative(mine(latent), model.decode(latent).sample) < 1e-5
    back = {autoencoder_tiny.their_name(name): tensor for name, tensor in mine.state_dict().items()}
    other = theirs(AutoencoderTiny, TINY, seed=1)
    missing, unexpected = other.load_state_dict(back, strict=False)
    assert not unexpected
    assert all(name.startswith("encoder.") for name in missing)
    with torch.no_grad():
        torch.testing.assert_close(other.decode(latent).sample, model.decode(latent).sample)
    made = AutoencoderTiny(**autoencoder_tiny.config(mine.spec))
    assert set(made.decoder.state_dict()) == set(model.decoder.state_dict())


def test_old_names_of_the_attention_are_understood() -> None:
    old = "decoder.mid_block.attentions.0."
    new = "mid_block.attentions.0."
    for theirs_, mine in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        assert autoencoder_kl.own_name(f"{old}{theirs_}.weight") == f"{new}{mine}.weight"
        assert autoencoder_kl.own_name(f"{old}{theirs_}.bias") == f"{new}{mine}.bias"
    assert autoencoder_kl.own_name(f"{old}to_q.weight") == f"{new}to_q.weight"
    assert autoencoder_kl.own_name(f"{old}to_out.0.bias") == f"{new}to_out.0.bias"
    assert autoencoder_kl.own_name("encoder.conv_in.weight") is None
    assert autoencoder_kl.own_name("quant_conv.weight") is None


def test_a_saved_folder_loads(tmp_path: Path) -> None:
    model = theirs(AutoencoderKL, KL)
    model.save_pretrained(tmp_path)
    mine = load_diffusers(tmp_path)
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert relative(mine(latent), model.decode(latent).sample) < 1e-5
    assert (mine.spec.input.height, mine.spec.input.width) == (8, 8)  # 32 pixels over 4


def test_a_saved_tiny_folder_loads_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    model = theirs(AutoencoderTiny, TINY)
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", **TINY}))
    mine = load_diffusers(tmp_path, height=8, width=8)
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert relative(mine(latent), model.decode(latent).sample) < 1e-5
    with pytest.raises(UsageError, match=r"config\.json.*height and width of the latent must be given"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("module", "change", "said"),
    [
        (autoencoder_kl, {"act_fn": "relu"}, "act_fn = 'relu' is not supported"),
        (autoencoder_kl, {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
        (autoencoder_kl, {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        (autoencoder_kl, {"block_out_channels": 64}, "block_out_channels = 64"),
        (autoencoder_kl, {"mid_block_add_attention": 1}, "mid_block_add_attention = 1"),
        (autoencoder_kl, {"blocks_out_channels": [64]}, "did you mean 'block_out_channels'"),
        (autoencoder_tiny, {"act_fn": "gelu"}, "act_fn = 'gelu'"),
        (autoencoder_tiny, {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor = 4"),
        (autoencoder_tiny, {"num_decoder_blocks": [2, 2]}, "num_decoder_blocks"),
        (autoencoder_tiny, {"decoder_block_out_channels": [8, 16, 8]}, "equal whole numbers"),
        (autoencoder_tiny, {"upsampel_fn": "nearest"}, "did you mean 'upsample_fn'"),
    ],
)
def test_what_our_blocks_do_not_have_is_refused_by_key_and_file(module: Any, change: dict[str, Any], said: str) -> None:
    config = (KL if module is autoencoder_kl else TINY) | change
    with pytest.raises(UsageError, match=said) as caught:
        module.network(config, height=8, width=8, where="here/config.json")
    assert "here/config.json" in caught.value.message


def test_what_a_class_cannot_hold_is_refused_by_block() -> None:
    shape = InputShape(channels=4, height=8, width=8)
    base = {"stages": 2, "norm_groups": 4, "width_0": 8, "width_1": 8, "resnets_0": 2, "resnets_1": 2}
    separable = network_of("decoder", base | {"style": "separable", "mid": "none", "expansion": 1}, shape, name="s")
    uneven = network_of("decoder", base | {"style": "vae", "mid": "residual", "resnets_1": 3}, shape, name="u")
    headless = network_of("decoder", base | {"style": "vae", "mid": "none"}, shape, name="n")
    narrow = network_of("decoder", base | {"style": "taesd", "width_1": 16}, shape, name="t")
    for module, spec, said in (
        (autoencoder_kl, separable, "separable_decoder"),
        (autoencoder_kl, uneven, r"up_blocks\.1\.resnets\.2"),
        (autoencoder_kl, headless, r"mid_block\.resnets\.0"),
        (autoencoder_kl, narrow, "not a VAE's decoder"),
        (autoencoder_tiny, narrow, "decoder_block_out_channels"),
        (autoencoder_tiny, uneven, "not a decoder of TAESD's kind"),
    ):
        with pytest.raises(NasError, match=said):
            module.config(spec)


def test_the_formats_are_found_by_class() -> None:
    assert formats.find("AutoencoderKL", "x") is autoencoder_kl
    assert formats.find("AutoencoderTiny", "x") is autoencoder_tiny


@pytest.mark.parametrize("style", ["vae", "taesd", "separable"])
def test_a_decoder_goes_through_onnx(style: str, tmp_path: Path) -> None:
    shape = InputShape(channels=4, height=4, width=4)
    settings = {"stages": 2, "norm_groups": 4, "style": style, "mid": "attention", "expansion": 2}
    settings |= {"width_0": 8, "width_1": 8, "resnets_0": 1, "resnets_1": 2}
    network = build(network_of("decoder", settings, shape, name=style), seed=0)
    inputs = {"sample": torch.randn(1, 4, 4, 4)}
    path = exporter.export(network, inputs, tmp_path / "decoder.onnx")
    assert exporter.verify(path, network, inputs) < 1e-4


@pytest.mark.parametrize("change", KLS.values(), ids=KLS)
def test_a_decoder_is_saved_with_an_encoder_as_the_class(change: dict[str, Any], tmp_path: Path) -> None:
    first, second = theirs(AutoencoderKL, KL | change), theirs(AutoencoderKL, KL | change, seed=1)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    decoder = load_diffusers(tmp_path / "second", height=8, width=8)
    back = AutoencoderKL.from_pretrained(save_diffusers(tmp_path / "out", decoder, encoder_from=tmp_path / "first"))
    latent, image = torch.randn(2, back.config.latent_channels, 8, 8), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(back.eval().decode(latent).sample, second.decode(latent).sample)
        torch.testing.assert_close(back.encode(image).latent_dist.mean, first.encode(image).latent_dist.mean)
    wider = theirs(AutoencoderKL, KL | change | {"block_out_channels": [2 * w for w in KL["block_out_channels"]]})
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(NasError, match="has another shape than network"):
        save_diffusers(tmp_path / "out", decoder, encoder_from=tmp_path / "wider")
