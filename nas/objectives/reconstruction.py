"""Decoder distillation: a small decoder paints what a VAE's decoder paints of the same latents.

Three parts, each with its weight: pictures against the teacher's and, where the data has them, against the real ones
(SnapFusion, arXiv 2306.00980, section 3.3, trains its half-width decoder by the former alone); the maps at the end of
chosen stages, the student's through a trainable projection (FitNets, Romero et al. 2015); and a critic of patches
(PatchGAN, Isola et al. 2017, with the hinge loss and the late start of latent diffusion's autoencoder, Rombach et al.
2022). Student and teacher are called as decoders: network(latents). Legend: B batch, C latent channels, H W height and
width of the latent, h w of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.batches import Batch
from nas.errors import NasError, UsageError
from nas.features import Projection, body, captured
from nas.objectives import Partner, Scene

Distance = Literal["l1", "mse"]
CRITIC_BETAS = (0.5, 0.9)  # of latent diffusion's autoencoder (Rombach et al. 2022)
_LEAST = 1e-8  # below it a teacher's map is nothing, and a relative error of it too


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms "teacher", "image", "features" and "critic" of the student's turn, those whose weight is above 0.

    Attributes:
        weight: what all of them are multiplied by in the total.
        distance: of pictures: "l1" mean absolute, "mse" mean squared difference, over channels and pixels.
        teacher_weight: of the distance to the teacher's picture.
        image_weight: of the distance to the real picture; the data must have them.
        feature_weight: of the mean squared difference of maps, as a share of the teacher's map's mean square.
        stages: whose last maps are compared: stage s works at 2^s times the latent's side; not the last, whose map is
            the picture.
        feature_lr: learning rate of the projections.
        adversarial_weight: of the critic's verdict, -mean D(picture).
        adversarial_from: the step at which the critic begins to learn and to be listened to.
        critic_width: channels of its first layer.
        critic_layers: its halvings of the picture.
        critic_lr: its learning rate.
    """

    weight: float = 1.0
    distance: Distance = "l1"
    teacher_weight: float = 1.0
    image_weight: float = 0.0
    feature_weight: float = 0.0
    stages: tuple[int, ...] = (0, 1, 2)
    feature_lr: float = 1e-3
    adversarial_weight: float = 0.0
    adversarial_from: int = 0
    critic_width: int = 64
    critic_layers: int = 3
    critic_lr: float = 1e-4
    needs_images: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.distance not in ("l1", "mse"):
            raise UsageError(f"reconstruction: unknown distance {self.distance!r}; known: l1, mse")
        weights = {name: getattr(self, name) for name in ("teacher_weight", "image_weight", "feature_weight")}
        weights["adversarial_weight"] = self.adversarial_weight
        if any(value < 0 for value in weights.values()):
            raise UsageError(f"reconstruction: weights must be 0 or more, got {weights}")
        if not any(value > 0 for name, value in weights.items() if name != "adversarial_weight"):
            raise UsageError("reconstruction: a decoder must be held to something: set teacher_weight or image_weight")
        if self.critic_layers < 1 or self.critic_width < 1:
            raise UsageError(
                "reconstruction: critic_layers and critic_width must be at least 1, got"
                f" {self.critic_layers} and {self.critic_width}"
            )
        if self.feature_weight > 0 and (not self.stages or len(set(self.stages)) < len(self.stages)):
            raise UsageError(f"reconstruction: stages must be some numbers, each once, got {list(self.stages)}")

    def partners(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Partner]:
        """The projections "projection" and the critic "critic", where their weights are above 0.

        Raises:
            NasError: a decoder has no such stage, the pictures differ in size, or they are too small for the critic.
        """
        latents = batch.images_needed()[:1]
        ours, theirs = _maps(student, latents), _maps(teacher, latents)
        if ours.picture.shape != theirs.picture.shape:
            raise NasError(
                f"the student makes pictures of {list(ours.picture.shape[1:])} from latents"
                f" {list(latents.shape[1:])}, and the teacher {list(theirs.picture.shape[1:])}"
            )
        found: dict[str, Partner] = {}
        if self.feature_weight > 0:
            matching = Matching([(ours.stage(s, "student"), theirs.stage(s, "teacher")) for s in self.stages])
            found["projection"] = Partner(module=matching.to(latents.device, latents.dtype), lr=self.feature_lr)
        if self.adversarial_weight > 0:
            channels, height, width = ours.picture.shape[1:]
            if min(height, width) < 3 * 2**self.critic_layers:
                raise NasError(
                    f"pictures of {height}x{width} are too small for a critic that halves them {self.critic_layers}"
                    " times and wants 3x3 then",
                    hint="set critic_layers lower",
                )
            critic = PatchCritic(channels, self.critic_width, self.critic_layers)
            found["critic"] = Partner(
                module=critic.to(latents.device, latents.dtype), lr=self.critic_lr, betas=CRITIC_BETAS
            )
        return found

    def turns(self, step: int) -> Sequence[str]:
        """The projections always, the critic from its step on."""
        matched = ("projection",) if self.feature_weight > 0 else ()
        return (*matched, "critic") if self._critical(step) else matched

    def student_moves(self, step: int) -> bool:
        """Always."""
        return True

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """The projections learn to map the student's maps on the teacher's; the critic to tell its pictures apart.

        The hinge loss mean relu(1 - D(real)) + mean relu(1 + D(student)); real are the data's pictures, or the
        teacher's where the data has none.
        """
        latents = scene.batch.images_needed()
        if name == "projection":
            matching: Matching = scene.partners["projection"]
            with torch.no_grad():
                _, ours = _asked(scene.student, latents, matching.student)
                _, theirs = _asked(scene.teacher, latents, matching.teacher)
            return {"features": matching.error(ours, theirs).mean()}
        critic: nn.Module = scene.partners["critic"]
        with torch.no_grad():
            painted, _ = _asked(scene.student, latents, ())
            real = scene.batch.images if scene.batch.images is not None else _asked(scene.teacher, latents, ())[0]
        verdict, doubt = critic(real.to(painted.dtype)), critic(painted)
        return {"hinge": (functional.relu(1 - _wide(verdict)) + functional.relu(1 + _wide(doubt))).mean()}

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """The student's terms, each times its own weight.

        Raises:
            NasError: it is to be held to real pictures, and the data has none.
        """
        latents = scene.batch.images_needed()
        matching: Matching | None = scene.partners["projection"] if self.feature_weight > 0 else None
        picture, ours = _asked(scene.student, latents, matching.student if matching else ())
        with torch.no_grad():
            wanted, theirs = _asked(scene.teacher, latents, matching.teacher if matching else ())
        terms: dict[str, Tensor] = {}
        if self.teacher_weight > 0:
            terms["teacher"] = self.teacher_weight * self._apart(picture, wanted)
        if self.image_weight > 0:
            if scene.batch.images is None:
                raise NasError(
                    "reconstruction: image_weight is above 0, and the data has latents without their pictures",
                    hint="set image_weight=0, or give data with images",
                )
            terms["image"] = self.image_weight * self._apart(picture, scene.batch.images)
        if matching is not None:
            terms["features"] = self.feature_weight * matching.error(ours, theirs).mean()
        if self._critical(scene.step):
            terms["critic"] = -self.adversarial_weight * _wide(scene.partners["critic"](picture)).mean()
        return terms

    def _critical(self, step: int) -> bool:
        return self.adversarial_weight > 0 and step >= self.adversarial_from

    def _apart(self, picture: Tensor, wanted: Tensor) -> Tensor:
        difference = _wide(picture) - _wide(wanted.detach())
        return difference.abs().mean() if self.distance == "l1" else difference.square().mean()


class Matching(nn.Module):
    """Projections of a student's maps on a teacher's, stage by stage.

    Args:
        pairs: of each stage the student's layer and map, and the teacher's.
    """

    def __init__(self, pairs: Sequence[tuple[tuple[str, Tensor], tuple[str, Tensor]]]) -> None:
        super().__init__()
        self.student = tuple(ours for (ours, _), _ in pairs)
        self.teacher = tuple(theirs for _, (theirs, _) in pairs)
        self.maps = nn.ModuleList(Projection(ours.shape, theirs.shape) for (_, ours), (_, theirs) in pairs)
        for each, ((_, ours), (_, theirs)) in zip(self.maps, pairs, strict=True):
            if ours.shape[1] == theirs.shape[1]:  # where a map may fit as it is, that is where to start
                projection: Any = each
                nn.init.dirac_(projection.map.weight)
                nn.init.zeros_(projection.map.bias)

    def error(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Each example's squared error over the teacher's mean square [B], mean of the stages."""
        errors = []
        for projection, student, teacher in zip(self.maps, self.student, self.teacher, strict=True):
            wanted = _wide(theirs[teacher].detach())
            apart = (_wide(projection(ours[student])) - wanted).square().flatten(1).mean(1)
            errors.append(apart / wanted.square().flatten(1).mean(1).clamp_min(_LEAST))
        return torch.stack(errors).mean(0)


class PatchCritic(nn.Module):
    """Pictures [B, 3, h, w] to a verdict per patch [B, 1, h', w']: 4x4 convolutions, each but the last two halving.

    As pix2pix's with group norms: a batch norm would make one picture's verdict depend on the others.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        now = width
        for layer in range(1, layers + 1):
            wider, stride = width * min(2**layer, 8), 2 if layer < layers else 1
            convolution = nn.Conv2d(now, wider, 4, stride=stride, padding=1, bias=False)
            groups = max(1, min(32, wider // 4))
            while wider % groups:
                groups -= 1
            body += [convolution, nn.GroupNorm(groups, wider), nn.LeakyReLU(0.2)]
            now = wider
        self.body = nn.Sequential(*body, nn.Conv2d(now, 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """A number per patch: above 0 for real."""
        verdict: Tensor = self.body(pictures)
        return verdict


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """What a decoder makes of one latent: the last map of each size, with its layer, and the picture."""

    last: dict[int, tuple[str, Tensor]]
    picture: Tensor

    def stage(self, number: int, who: str) -> tuple[str, Tensor]:
        """Layer and map of a stage.

        Raises:
            NasError: there is none of that size, or it is the picture's.
        """
        if number not in self.last:
            known = ", ".join(map(str, sorted(self.last))) or "none"
            raise NasError(f"the {who} has no stage {number} whose map could be compared; it has {known}")
        return self.last[number]


@torch.no_grad()
def _maps(decoder: nn.Module, latents: Tensor) -> _Maps:
    """Looks at every layer once: a stage's last map is that of the layer that ends last at its size."""
    inner, sizes = body(decoder), dict[int, tuple[str, Tensor]]()
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                times = output.shape[2] // latents.shape[2]
                if output.shape[2] == times * latents.shape[2] and times & (times - 1) == 0:
                    sizes[times.bit_length() - 1] = (name, output)

        return hook

    try:
        for name, module in inner.named_modules():
            if name:
                handles.append(module.register_forward_hook(keep(name)))
        picture: Tensor = decoder(latents)
    finally:
        for handle in handles:
            handle.remove()
    side = picture.shape[2] // latents.shape[2]
    return _Maps(last={s: found for s, found in sizes.items() if 2**s < side}, picture=picture)


def _asked(decoder: Any, latents: Tensor, layers: Sequence[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A decoder's pictures, and the outputs of some of its layers."""
    with captured(decoder, layers) as features:
        picture: Tensor = decoder(latents)
    return picture, features


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: differences of bfloat16 numbers lose what they are about."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
