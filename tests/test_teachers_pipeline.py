"""The fixed parts of a pipeline give what diffusers' own pipeline gives."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

from nas.errors import NasError
from nas.teachers import Crop, Pipeline, Scaling, load_pipeline, load_vae

PROMPTS = ["a cat", "two small dogs on a boat"]  # the second is longer than the encoders' window


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = getattr(tiny, kind)(tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def theirs(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    options = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in folder.name else {}
    return DiffusionPipeline.from_pretrained(folder, **options)


def images(count: int = 2, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestText:
    def test_stable_diffusion(self, folders: Callable[[str], Path]) -> None:
        pipe = load_pipeline(str(folders("stable_diffusion")), vae=False)
        wanted, null = theirs(folders("stable_diffusion")).encode_prompt(PROMPTS, "cpu", 1, True)
        found = pipe.encode(PROMPTS)
        torch.testing.assert_close(found.tokens, wanted)
        assert dict(found.parts()).keys() == {"tokens"}
        torch.testing.assert_close(pipe.null().tokens, null[:1])
        torch.testing.assert_close(pipe.null().tokens, pipe.encode([""]).tokens)
        assert pipe.text_encoders == ("CLIPTextModel",)

    def test_sdxl(self, folders: Callable[[str], Path]) -> None:
        pipe = load_pipeline(str(folders("sdxl")), vae=False)
        wanted, null, pooled, null_pooled = theirs(folders("sdxl")).encode_prompt(PROMPTS)
        crops = [
            Crop(original=(30, 40), corner=(0, 3), size=(16, 16)),
            Crop(original=(16, 16), corner=(0, 0), size=(16, 16)),
        ]
        found = pipe.encode(PROMPTS, crops)
        torch.testing.assert_close(found.tokens, wanted)
        torch.testing.assert_close(found.pooled, pooled)
        assert found.size_ids is not None
        assert found.size_ids.tolist() == [[30, 40, 0, 3, 16, 16], [16, 16, 0, 0, 16, 16]]
        plain = pipe.encode(PROMPTS).size_ids
        assert plain is not None
        assert plain.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
        # SDXL's own rule: no prompt is zeros, not the embedding of the empty one.
        torch.testing.assert_close(pipe.null().tokens, null[:1])
        torch.testing.assert_close(pipe.null().pooled, null_pooled[:1])
        assert not bool(pipe.null().tokens.any())
        assert pipe.null().size_ids is None

    def test_pixart_marks_padding_with_zeros(self, folders: Callable[[str], Path]) -> None:
        pipe = load_pipeline(str(folders("pixart")), vae=False)
        wanted, mask, null, null_mask = theirs(folders("pixart")).encode_prompt(PROMPTS)
        found = pipe.encode(PROMPTS)
        torch.testing.assert_close(found.tokens, wanted * mask[..., None])
        assert torch.equal(found.tokens.abs().amax(-1) > 0, mask.bool())
        assert found.size_ids is None
        torch.testing.assert_close(pipe.null().tokens, (null * null_mask[..., None])[:1])
        assert int((pipe.null().tokens.abs().amax(-1) > 0).sum()) == 1  # the end of the text

    def test_stable_diffusion_3_without_its_t5(self, folders: Callable[[str], Path]) -> None:
        pipe = load_pipeline(str(folders("sd3")), vae=False)
        wanted, null, pooled, null_pooled = theirs(folders("sd3")).encode_prompt(PROMPTS, None, None)
        found = pipe.encode(PROMPTS)
        torch.testing.assert_close(found.tokens, wanted)
        torch.testing.assert_close(found.pooled, pooled)
        torch.testing.assert_close(pipe.null().tokens, null[:1])
        torch.testing.assert_close(pipe.null().pooled, null_pooled[:1])

    def test_long_captions_are_cut_silently(
        self, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        pipe = load_pipeline(str(folders("stable_diffusion")), vae=False)
        with caplog.at_level(logging.WARNING):
            long, longer = (pipe.encode([text]).tokens for text in ("abcdefgh", "abcdefghxyz"))
        torch.testing.assert_close(long, longer)
        assert "truncated" not in caplog.text

    def test_text_is_frozen(self, folders: Callable[[str], Path]) -> None:
        assert not load_pipeline(str(folders("sdxl")), vae=False).encode(["a"]).tokens.requires_grad

    def test_digest_is_of_the_text_parts(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        copy = tmp_path / "sd"
        shutil.copytree(folders("stable_diffusion"), copy)
        before = load_pipeline(str(folders("stable_diffusion")), vae=False).text_digest
        assert load_pipeline(str(copy), vae=False).text_digest == before
        config = copy / "text_encoder" / "config.json"
        config.write_text(config.read_text() + " ")
        assert load_pipeline(str(copy), vae=False).text_digest != before


class TestVae:
    @pytest.mark.parametrize("kind", ["stable_diffusion", "sd3"])
    def test_latents_are_scaled_as_the_pipeline_does(self, folders: Callable[[str], Path], kind: str) -> None:
        found = load_pipeline(str(folders(kind)), text=False)
        plain = theirs(folders(kind)).vae
        config = plain.config
        z = plain.encode(images()).latent_dist.mode()
        wanted = (z - (config.shift_factor or 0)) * config.scaling_factor
        latents = found.encode_images(images())
        torch.testing.assert_close(latents, wanted)
        assert found.latent_channels == latents.shape[1]
        assert found.scaling_factor == config.scaling_factor
        back = plain.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample.clamp(-1, 1)
        torch.testing.assert_close(found.decode(latents), back)

    def test_channels_may_have_their_own_scale(self) -> None:
        scaling = Scaling(kind="AutoencoderKL", factor=0.5, mean=(1.0, 2.0), sd=(4.0, 8.0))
        z = torch.tensor([[[[3.0]], [[10.0]]]])
        assert scaling.scaled(z).flatten().tolist() == [0.25, 0.5]
        torch.testing.assert_close(scaling.unscaled(scaling.scaled(z)), z)
        assert Scaling.from_json(json.loads(json.dumps(scaling.to_json()))) == scaling

    def test_a_configuration_without_a_factor_means_that_of_its_class(self) -> None:
        assert Scaling.of({"_class_name": "AutoencoderKL"}).factor == 0.18215
        assert Scaling.of({"_class_name": "AutoencoderTiny", "latent_shift": 0.5}).shift == 0.0

    def test_tiny_autoencoder_alone(self, tmp_path: Path) -> None:
        from diffusers import AutoencoderTiny

        plain = tiny.seeded(
            lambda: AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        )
        plain.save_pretrained(tmp_path)
        found = load_vae(str(tmp_path))
        assert (found.channels, found.factor, found.scaling.factor) == (4, 2, 1.0)
        assert found.latent_shape(16) == (4, 8, 8)
        torch.testing.assert_close(found.encode(images()), plain.encode(images()).latents)

    def test_odd_images_are_refused(self, folders: Callable[[str], Path]) -> None:
        vae = load_vae(str(folders("sdxl")))
        with pytest.raises(NasError, match=r"15x15 px do not fit the VAE .* multiples of 2"):
            vae.encode(images(side=15))

    def test_digest_tells_vaes_apart(self, folders: Callable[[str], Path]) -> None:
        digests = {load_vae(str(folders(kind))).digest for kind in ("stable_diffusion", "sdxl")}
        assert len(digests) == 2  # equal weights, another scaling factor


class TestRefusals:
    def test_parts_that_were_left_out(self, folders: Callable[[str], Path]) -> None:
        folder = str(folders("stable_diffusion"))
        without_vae: Pipeline = load_pipeline(folder, vae=False)
        with pytest.raises(NasError, match="without its VAE"):
            without_vae.decode(torch.zeros(1, 4, 8, 8))
        with pytest.raises(NasError, match="without its text encoders"):
            load_pipeline(folder, text=False).encode(["a"])

    def test_no_pipeline(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        with pytest.raises(NasError, match=r"is no pipeline: it has no model_index\.json"):
            load_pipeline(str(tmp_path))
        (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        with pytest.raises(NasError, match=r"is a FluxPipeline; pipelines .* are StableDiffusionPipeline, "):
            load_pipeline(str(tmp_path))

    def test_no_vae(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        with pytest.raises(NasError, match=r"the VAE .* is a UNet2DConditionModel; known are AutoencoderKL"):
            load_vae(str(folders("stable_diffusion") / "unet"))
        with pytest.raises(NasError, match=r"the VAE .*none cannot be read"):
            load_vae(str(tmp_path / "none"))
        shutil.copytree(folders("stable_diffusion") / "vae", tmp_path / "vae")
        (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
        with pytest.raises(NasError, match="cannot be read"):
            load_vae(str(tmp_path))

    def test_text_encoders_that_are_not_there(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        shutil.copytree(folders("stable_diffusion"), tmp_path / "sd")
        shutil.rmtree(tmp_path / "sd" / "text_encoder")
        with pytest.raises(NasError, match=r"the pipeline .*sd cannot be read"):
            load_pipeline(str(tmp_path / "sd"))
