"""A space of 32 small candidates with everything that slicing must respect: skips, heads, units, layers, two kinds."""

from __future__ import annotations

from pathlib import Path

from nas.space import SearchSpace, load_space

_CHOICES = {
    "width_0": [128],
    "width_1": [256, 384],
    "width_2": [512],
    "resnets_0": [1],
    "resnets_1": [1, 2],
    "resnets_2": [1],
    "conv_0": ["full"],
    "conv_1": ["full", "separable-2"],
    "conv_2": ["full"],
    "depth_0": [0],
    "up_depth_0": [0],
    "depth_1": [0],
    "depth_2": [1, 2],
    "self_attention_1": [False],
    "self_attention_2": [False],
    "attention": ["mqa", "mha"],
    "qk_norm": ["none"],
    "positions": ["none"],
    "ffn_ratio": [2],
}


def write_space(folder: Path, **changes: list[int | str | bool]) -> SearchSpace:
    """The space, from a file in `folder`, with other values of some choices."""
    lines = ['family = "unet"', 'summary = "a small one"', 'sources = ["made for tests"]', "[input]"]
    shape = {"latent_channels": 4, "latent_height": 16, "latent_width": 16, "pixels_per_latent": 8}
    lines += [f"{key} = {value}" for key, value in {**shape, "text_tokens": 4, "text_width": 8}.items()]
    lines += ["[fixed]", "stages = 3", "downscale = 4", "head_width = 64", "norm_groups = 32"]
    lines.append("self_attention_0 = false")
    chosen = {**_CHOICES, **changes}
    lines += [
        f"{key} = {str(values[0]).lower() if isinstance(values[0], bool) else repr(values[0])}"
        for key, values in chosen.items()
        if len(values) == 1
    ]
    several = {key: values for key, values in chosen.items() if len(values) > 1}
    lines += ["[choices]", *(f"{key} = {values!r}" for key, values in several.items())]
    lines += ["[meanings]", *(f'{key} = "{key}"' for key in several)]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return load_space(path)
