"""Text encoders with random weights: transformers' own classes, configured here, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder.

    Attributes:
        class_name, config: the class of transformers and the settings of its configuration.
        width: D of the tokens that it puts out.
        tokens: T that it is always called with, or None where the pipeline decides.
        most_tokens: what a pipeline that says nothing gives it, and the longest it was made for.
        source: where the configuration is from.
    """

    class_name: str
    config: Mapping[str, Any]
    width: int
    tokens: int | None
    most_tokens: int
    source: str

    def length(self, asked: int | None) -> int:
        """T of one run in a pipeline whose denoiser reads `asked` tokens."""
        return self.tokens or asked or self.most_tokens


_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_COUNTS = "https://github.com/Nota-NetsPresso/BK-SDM/issues/53"

# The configurations are those of the published checkpoints; tests hold their parameter counts.
TEXT: dict[str, TextEncoder] = {
    "clip-l": TextEncoder(
        class_name="CLIPTextModel",
        config=_CLIP
        | {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        width=768,
        tokens=77,
        most_tokens=77,
        source=f"CLIP ViT-L/14's text model, as in Stable Diffusion 1.x and SDXL ({_COUNTS})",
    ),
    "openclip-bigg": TextEncoder(
        class_name="CLIPTextModelWithProjection",
        config=_CLIP
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        width=1280,
        tokens=77,
        most_tokens=77,
        source="OpenCLIP ViT-bigG/14's text model, as in SDXL",
    ),
    "openclip-h": TextEncoder(
        class_name="CLIPTextModel",
        config=_CLIP
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        width=1024,
        tokens=77,
        most_tokens=77,
        source=f"the first 23 layers of OpenCLIP ViT-H/14's text model, as in Stable Diffusion 2.x ({_COUNTS})",
    ),
    "t5-xxl": TextEncoder(
        class_name="T5EncoderModel",
        config={
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        width=4096,
        tokens=None,
        most_tokens=300,
        source="the encoder of google/t5-v1_1-xxl, as in PixArt (300 tokens in PixArt-Sigma)",
    ),
}


class _Call(nn.Module):
    """A model whose answer is a record, as a module of one named input and one output tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=tokens).last_hidden_state
        return output


def build_text_encoder(name: str, tokens: int, batch: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """A text encoder with random weights on the current default device, and inputs to call it with.

    Returns:
        The module (tokens [B, T] -> [B, T, D]), and {"tokens": [B, T]}.
    """
    import transformers

    encoder = TEXT[name]
    kind = getattr(transformers, encoder.class_name)
    model = kind(kind.config_class(**encoder.config))
    return _Call(model), {"tokens": torch.arange(tokens).expand(batch, tokens).contiguous()}
