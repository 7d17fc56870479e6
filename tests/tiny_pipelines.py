"""Diffusers pipelines of random weights and a few kilobytes, made without the network, for tests of teachers and data.

Every part has the classes and configuration of its published relative, in the smallest widths that they accept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_WIDTH = 16  # of the first CLIP and of T5
WIDER = 24  # of the second CLIP
TOKENS = 8
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` gives, with reproducible random weights that are not nearly zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide a tensor in the wrong place
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return made


def clip_tokenizer() -> Any:
    """Letters, each also as the end of a word."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def clip(width: int = TEXT_WIDTH, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
    )
    return seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), width)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return seeded(lambda: T5EncoderModel(config))


def vae(channels: int = 4, **options: Any) -> Any:
    """Two stages: a latent place is 2x2 pixels."""
    from diffusers import AutoencoderKL

    return seeded(
        lambda: AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            **options,
        )
    )


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    }
    return seeded(lambda: UNet2DConditionModel(**settings | options))


def sdxl_unet() -> Any:
    each = 8
    return unet(
        cross_attention_dim=TEXT_WIDTH + WIDER,
        addition_embed_type="text_time",
        addition_time_embed_dim=each,
        projection_class_embeddings_input_dim=WIDER + 6 * each,
        use_linear_projection=True,
    )


def pixart_transformer(**options: Any) -> Any:
    from diffusers import PixArtTransformer2DModel

    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "caption_channels": TEXT_WIDTH,
    }
    return seeded(lambda: PixArtTransformer2DModel(**settings | options))


def sd3_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH + WIDER,
            caption_projection_dim=16,
            pooled_projection_dim=TEXT_WIDTH + WIDER,
            pos_embed_max_size=8,
        )
    )


def stable_diffusion(folder: Path, scheduler: Any = None, **options: Any) -> Path:
    """A pipeline of Stable Diffusion 1's classes; `options` are the UNet's."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(**options),
        scheduler=scheduler or DDPMScheduler(clip_sample=False, steps_offset=1, **SCALED_LINEAR),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(WIDER, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(**SCALED_LINEAR),
    )
    pipe.save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(scaling_factor=0.13025),
        transformer=pixart_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Without its T5, which many leave out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(WIDER, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.save_pretrained(folder)
    return folder
