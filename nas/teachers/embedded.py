"""The embedded teacher: a small text transformer and a rectified-flow UNet of this project's own blocks.

Legend: B batch, C channels, H W height and width in pixels, T text tokens, D text width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nas.build import build
from nas.diffusion import FLOW, Conditioning, FlowDenoiser, Preconditioner, Schedule
from nas.errors import NasError
from nas.network import BlockSpec, InputShape, NetworkSpec, block
from nas.paths import atomic_write

_HINT = "train one with: python benchmarks/train_teacher.py --out FOLDER"
FORMAT = "nas-teacher-2"
# Files of the first format hold the layout inside the denoiser.
_FIRST = "nas-teacher-1"
_RENAMED = {
    "denoiser.network.network.": "denoiser.network.",
    "denoiser.network.field": "layout.field",
    "denoiser.network.said.": "layout.said.",
}


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Everything but the weights.

    Attributes:
        vocabulary: number of token ids.
        null_tokens: token ids [T] of no caption.
        text_width: D.
        text_layers: layers of the text transformer.
        text_heads: its attention heads.
        image_channels: C of an image.
        image_size: its H and W in pixels.
        patch: side of the square of pixels folded into channels before the UNet.
        widths: channels of the UNet's two stages; the second has half the first's height and width.
        head_width: width of an attention head in the UNet.
        norm_groups: groups of its GroupNorms.
        mean: per image channel, the mean that the preconditioner assumes.
        sd: the standard deviation that it assumes.
    """

    vocabulary: int
    null_tokens: tuple[int, ...]
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    image_channels: int = 3
    image_size: int = 32
    patch: int = 4
    widths: tuple[int, int] = (48, 96)
    head_width: int = 16
    norm_groups: int = 8
    mean: tuple[float, ...]
    sd: float = 0.35

    @property
    def folded(self) -> tuple[int, int, int]:
        """(C p^2, H / p, W / p): what the UNet sees of an image."""
        side = self.image_size // self.patch
        return (self.image_channels * self.patch**2, side, side)


def network_spec(settings: TeacherSettings) -> NetworkSpec:
    """The teacher's UNet: two stages, cross-attention in both, self-attention at the lower."""
    channels, side, _ = settings.folded
    shape = InputShape(
        channels=channels,
        height=side,
        width=side,
        text_tokens=len(settings.null_tokens),
        text_width=settings.text_width,
    )
    wide, deep = settings.widths
    high, low = (side, side), (side // 2, side // 2)
    blocks = (
        block("conv_in", "stem", {"x": (channels, *high)}, in_channels=channels, out_channels=wide),
        block(
            "time_embedding",
            "time_embedding",
            {"timestep": ()},
            writes=("temb",),
            frequency_width=wide,
            time_width=4 * wide,
        ),
        _resnet(settings, "down_blocks.0.resnets.0", wide, wide, high),
        _transformer(settings, "down_blocks.0.attentions.0", wide, high),
        block("down_blocks.0.downsamplers.0", "downsample", {"x": (wide, *high)}, channels=wide),
        _resnet(settings, "down_blocks.1.resnets.0", wide, deep, low),
        _transformer(settings, "down_blocks.1.attentions.0", deep, low),
        _resnet(settings, "mid_block.resnets.0", deep, deep, low),
        _resnet(settings, "up_blocks.0.resnets.0", deep, deep, low, skip="down_blocks.1.attentions.0"),
        _transformer(settings, "up_blocks.0.attentions.0", deep, low),
        block("up_blocks.0.upsamplers.0", "upsample", {"x": (deep, *low)}, channels=deep),
        _resnet(settings, "up_blocks.1.resnets.0", deep, wide, high, skip="down_blocks.0.attentions.0"),
        _transformer(settings, "up_blocks.1.attentions.0", wide, high),
        block(
            "head",
            "head",
            {"x": (wide, *high)},
            in_channels=wide,
            out_channels=channels,
            norm_groups=settings.norm_groups,
        ),
    )
    return NetworkSpec(name="teacher-shapes", input=shape, blocks=blocks)


def _resnet(
    settings: TeacherSettings, name: str, channels: int, out: int, size: tuple[int, int], skip: str | None = None
) -> BlockSpec:
    inputs: dict[str, tuple[int, ...]] = {"x": (channels, *size)}
    if skip is not None:
        inputs["skip"] = (out, *size)
    inputs["temb"] = (4 * settings.widths[0],)
    return block(
        name,
        "resnet",
        inputs,
        skip=skip,
        in_channels=channels + (out if skip is not None else 0),
        out_channels=out,
        time_width=4 * settings.widths[0],
        norm_groups=settings.norm_groups,
    )


def _transformer(settings: TeacherSettings, name: str, channels: int, size: tuple[int, int]) -> BlockSpec:
    return block(
        name,
        "transformer",
        {"x": (channels, *size), "text": (len(settings.null_tokens), settings.text_width)},
        channels=channels,
        depth=1,
        head_width=settings.head_width,
        kv_heads=channels // settings.head_width,
        text_width=settings.text_width,
        self_attention=channels == settings.widths[1],
        cross_attention=True,
        qk_norm="none",
        ffn_ratio=2,
        norm_groups=settings.norm_groups,
    )


class TextEncoder(nn.Module):
    """Token ids [B, T] to text [B, T, D]: embeddings, learnt positions, pre-norm transformer layers, LayerNorm."""

    def __init__(self, settings: TeacherSettings) -> None:
        super().__init__()
        width = settings.text_width
        self.words = nn.Embedding(settings.vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(len(settings.null_tokens), width))
        layer = nn.TransformerEncoderLayer(
            width, settings.text_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Text [B, T, D] of token ids [B, T]."""
        return self.norm(self.layers(self.words(tokens) + self.positions))


class Layout(nn.Module):
    """What the text says of each place: a field [B, C p^2, H / p, W / p] that is added to a denoiser's folded input.

    A learnt field that tells places apart, and one that an MLP draws from all text tokens at once. Without it the order
    of two objects, and with it their colours, is learnt several times more slowly. It depends on the caption alone, is
    computed once per image, and belongs to the pipeline's fixed text part, as the text encoder does.
    """

    def __init__(self, shape: tuple[int, int, int], text_shape: tuple[int, int]) -> None:
        super().__init__()
        self.field = nn.Parameter(0.02 * torch.randn(shape))
        tokens, width = text_shape
        self.said = nn.Sequential(
            nn.Flatten(), nn.Linear(tokens * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, self.field.numel())
        )

    def forward(self, text: Tensor) -> Tensor:
        """The field of text [B, T, D]."""
        said: Tensor = self.said(text)
        return self.field + said.view(-1, *self.field.shape)


class EmbeddedTeacher(nn.Module):
    """A text encoder and a denoiser that were trained together."""

    def __init__(self, settings: TeacherSettings) -> None:
        super().__init__()
        self.settings = settings
        self.preconditioner = Preconditioner(mean=settings.mean, sd=settings.sd)
        self.encoder = TextEncoder(settings)
        text_shape = (len(settings.null_tokens), settings.text_width)
        self.layout = Layout(settings.folded, text_shape)
        self.denoiser = FlowDenoiser(build(network_spec(settings)), self.preconditioner, patch=settings.patch)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.settings.image_channels, self.settings.image_size, self.settings.image_size)

    @property
    def text_shape(self) -> tuple[int, int]:
        """(T, D)."""
        return (len(self.settings.null_tokens), self.settings.text_width)

    @property
    def conditions(self) -> dict[str, int]:
        """The parts of `Conditioning` that it cannot make itself, and each one's width."""
        return {"tokens": self.settings.text_width}

    @property
    def schedule(self) -> Schedule:
        """Rectified flow."""
        return FLOW

    def encode(self, tokens: Tensor) -> Conditioning:
        """The conditions of a task's token ids [B, T]."""
        text = self.encoder(tokens.to(self.encoder.positions.device))
        return Conditioning(tokens=text, layout=self.layout(text))

    def null_text(self, count: int = 1) -> Conditioning:
        """The conditions of `count` images without a caption."""
        return self.encode(torch.tensor([self.settings.null_tokens])).expand(count)

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity eps - x0 [B, C, H, W] expected at x [B, C, H, W], t [B] in [0, 1]."""
        return self.denoiser.velocity(x, t, self.placed(text))

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The clean image x0 [B, C, H, W] expected at x [B, C, H, W], t [B] in [0, 1]."""
        return self.denoiser.denoise(x, t, self.placed(text))

    def placed(self, text: Conditioning) -> Conditioning:
        """The conditions with their layout, which cached text comes without."""
        return text if text.layout is not None else replace(text, layout=self.layout(text.tokens))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The velocity from token ids [B, T]: what training fits, through the text encoder too."""
        return self.velocity(x, t, self.encode(tokens))


def save_teacher(path: Path, teacher: EmbeddedTeacher, *, dtype: torch.dtype = torch.float32) -> Path:
    """Writes weights (as `dtype`) and settings into one safetensors file."""
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in teacher.state_dict().items()}
    metadata = {"format": FORMAT, "settings": json.dumps(asdict(teacher.settings), sort_keys=True)}
    return atomic_write(path, save(state, metadata))


def load_embedded(path: Path) -> EmbeddedTeacher:
    """The teacher in `path`, float32, frozen and in eval mode.

    Raises:
        NasError: the file is missing, is no safetensors file, or holds no teacher of this format.
    """
    settings, state = read_teacher(path)
    teacher = EmbeddedTeacher(settings)
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise NasError(f"the weights in {path} do not fit its settings: {error}", hint=_HINT) from error
    return teacher.requires_grad_(False).eval()


def read_teacher(path: Path) -> tuple[TeacherSettings, dict[str, Tensor]]:
    """The settings and the float32 weights in `path`, under their present names whatever format it has.

    Raises:
        NasError: the file is missing, is no safetensors file, or is of another format.
    """
    if not path.is_file():
        raise NasError(f"the teacher file {path} does not exist", hint=_HINT)
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            state = {name: stream.get_tensor(name).float() for name in stream.keys()}  # noqa: SIM118 (not iterable)
    except (SafetensorError, OSError) as error:
        raise NasError(f"the teacher file {path} is not a readable safetensors file: {error}", hint=_HINT) from error
    if metadata.get("format") == _FIRST:
        state = {_renamed(name): value for name, value in state.items()}
    elif metadata.get("format") != FORMAT:
        raise NasError(
            f"{path} is not a teacher of this project: its metadata has format {metadata.get('format')!r},"
            f" {FORMAT!r} is needed",
            hint=_HINT,
        )
    plain = json.loads(metadata["settings"])
    lists = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    return TeacherSettings(**plain | lists), state


def _renamed(name: str) -> str:
    """A parameter's present name, given that in a file of the first format."""
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
