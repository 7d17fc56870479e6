"""Small configurations of the UNet classes of diffusers."""

from __future__ import annotations

UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
DREAMLITE = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"],
    "up_block_types": ["DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": [4, 8],
    "use_linear_projection": True,
}
