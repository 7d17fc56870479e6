"""Small UNets with the structure of the published ones, and weights for them."""

from __future__ import annotations

import math

import torch

from nas.build import build, example_inputs
from nas.formats import unet2d_condition
from nas.network import NetworkSpec

SD = {
    "sample_size": 16,
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
BASE = {**SD, "layers_per_block": 1}
SMALL = {**BASE, "mid_block_type": None}
TINY = {
    **SMALL,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}
XL = {
    "sample_size": 16,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 6],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
KOALA = {**XL, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 3]}
SSD = {
    **XL,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 6], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {
    **SSD,
    "transformer_layers_per_block": [1, 1, 2],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}


def unet(config: dict, name: str = "net") -> NetworkSpec:
    return unet2d_condition.network(config, text_tokens=5, name=name, where="here")


def weights(spec: NetworkSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor random, biases and norms too, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=generator) / math.sqrt(max(t[0].numel(), 1))
        for name, t in build(spec, "meta").state_dict().items()
    }


def network(spec: NetworkSpec, state: dict[str, torch.Tensor]):
    made = build(spec, "meta")
    made.load_state_dict(state, assign=True)
    return made.eval()


def outputs(spec: NetworkSpec, state: dict[str, torch.Tensor]) -> torch.Tensor:
    given = example_inputs(spec, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(spec, state)(**given)
