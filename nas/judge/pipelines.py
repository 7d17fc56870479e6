"""What stands around a denoiser: captions become its conditions before it, and what it draws becomes a picture after.

Legend: B batch, C channels, H W height and width of what is denoised, h w of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nas import registry, teachers
from nas.batches import stream
from nas.bench import embedded_lesson, teacher_hash
from nas.diffusion import Conditioning, Denoiser
from nas.errors import NasError, UsageError
from nas.judge.shapes_features import floor, shapes_distance
from nas.students import TrainedStudent
from nas.targets import Lesson
from nas.teachers.decoders import Decoder


class Pipeline(Protocol):
    """What sampling and judging ask for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of what is denoised."""
        ...

    @property
    def teacher(self) -> Denoiser:
        """Whom students are compared with."""
        ...

    @property
    def guidance(self) -> float:
        """The usual scale of classifier-free guidance with its teacher."""
        ...

    def prompts(self, texts: Sequence[str]) -> list[Any]:
        """Prompts as a person typed them, in the form that the others take.

        Raises:
            UsageError: one says nothing here.
        """
        ...

    def random_prompts(self, count: int, seed: int) -> list[Any]:
        """Prompts of its own.

        Raises:
            UsageError: it has none.
        """
        ...

    def conditions(self, prompts: Sequence[Any]) -> tuple[Conditioning, Conditioning]:
        """What the denoiser is told of prompts, and of none."""
        ...

    def pictures(self, drawn: Tensor) -> Tensor:
        """Pictures [B, 3, h, w] in [-1, 1] on the CPU of what was drawn [B, C, H, W]."""
        ...

    def right(self, pictures: Tensor, prompts: Sequence[Any]) -> list[bool] | None:
        """Which pictures show what their prompts say; None where nothing can tell exactly."""
        ...

    def judged(self, pictures: Tensor, prompts: Sequence[Any]) -> dict[str, float]:
        """What can be said of pictures, one per prompt, without any other network."""
        ...

    def real(self, prompts: Sequence[Any], seed: int) -> Tensor | None:
        """Real pictures of prompts, None where there are none."""
        ...


@dataclass(frozen=True, kw_only=True)
class EmbeddedPipeline:
    """The embedded task: captions in code, pictures drawn as they are, an exact checker.

    Attributes:
        lesson: its teacher on the device to draw on.
        split: of random captions, and of the drawings that shapes-FD compares with.
        task_name: the plug-in of nas/tasks/.
    """

    lesson: Lesson
    split: str = "held-out"
    task_name: str = "shapes"

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return self.lesson.task.image_shape

    @property
    def teacher(self) -> Denoiser:
        """The lesson's."""
        return self.lesson.teacher

    @property
    def guidance(self) -> float:
        """With which the embedded teacher was scored."""
        return 2.0

    def prompts(self, texts: Sequence[str]) -> list[Any]:
        """The captions that the texts say."""
        plugin = registry.load("nas.tasks", self.task_name)
        return [plugin.parse(text) for text in texts]

    def random_prompts(self, count: int, seed: int) -> list[Any]:
        """Random captions of the split."""
        return self.lesson.task.sample(count, self.split, stream(seed))

    @torch.no_grad()
    def conditions(self, prompts: Sequence[Any]) -> tuple[Conditioning, Conditioning]:
        """What the teacher's text transformer makes of captions, and of none."""
        return self.lesson.text(prompts), self.lesson.teacher.null_text()

    def pictures(self, drawn: Tensor) -> Tensor:
        """The images themselves, up to what the network overshoots."""
        return drawn.float().cpu()

    def right(self, pictures: Tensor, prompts: Sequence[Any]) -> list[bool]:
        """As the checker sees them."""
        return [bool(flag) for flag in self.lesson.task.check(pictures, prompts).correct]

    def judged(self, pictures: Tensor, prompts: Sequence[Any]) -> dict[str, float]:
        """The checker's shares, shapes-FD to real drawings of the split, and that of as many real drawings.

        "shapes_fd_floor" is of one real drawing per caption: what no generator of so many images is expected to beat.
        """
        shares: dict[str, float] = dict(self.lesson.task.check(pictures, prompts).means())
        reference = f"drawings.{'held-out' if self.split == 'held-out' else 'all'}"  # "train" is nine tenths of all
        distance = shapes_distance(pictures, reference)
        return shares | {"shapes_fd": distance, "shapes_fd_floor": floor(prompts, reference)}

    def real(self, prompts: Sequence[Any], seed: int) -> Tensor:
        """A new drawing per caption."""
        return self.lesson.task.render(prompts, stream(seed, 1))


@dataclass(frozen=True, kw_only=True)
class LatentPipeline:
    """A diffusers pipeline whose denoiser is replaced: prompts are encoded and latents decoded by its own networks.

    Attributes:
        published: `nas.teachers.pipeline.load_pipeline`'s.
        teacher: its own denoiser.
        shape: (C, H, W) of the student's latents.
        device: to draw on.
    """

    published: Any
    teacher: Denoiser
    shape: tuple[int, ...]
    device: str = "cpu"

    @property
    def guidance(self) -> float:
        """What diffusers' StableDiffusionPipeline takes by default; the best of others is elsewhere."""
        return 7.5

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The texts."""
        return list(texts)

    def random_prompts(self, count: int, seed: int) -> list[str]:
        """Refused: a pipeline has no prompts of its own."""
        raise UsageError("this network draws whatever it is told, so it must be told prompts", hint="--prompt TEXT")

    def conditions(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """What its text encoders make of prompts, for whole images of the student's size, and of none."""
        from nas.teachers.pipeline import Crop

        side = self.shape[1] * self.published.vae.factor
        text = self.published.encode(list(prompts), [Crop.whole(side)] * len(prompts))
        return text.to(self.device), self.published.null().to(self.device)

    def pictures(self, drawn: Tensor) -> Tensor:
        """Decoded latents, one at a time: a full-size VAE needs gigabytes per image."""
        return torch.cat([self.published.decode(one).float().cpu() for one in drawn.split(1)])

    def right(self, pictures: Tensor, prompts: Sequence[str]) -> None:
        """Nothing here can tell exactly."""
        return

    def judged(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Nothing without another network."""
        return {}

    def real(self, prompts: Sequence[str], seed: int) -> None:
        """There are none."""
        return


def pipeline_of(student: TrainedStudent, device: str = "cpu", split: str = "held-out") -> Pipeline:
    """The pipeline that a trained network was made for.

    Raises:
        UsageError: it is an image decoder.
        NasError: its teacher (whose text it reads) is gone, or is another than it was trained with.
    """
    about = student.about
    if isinstance(student.denoiser, Decoder):
        raise UsageError(f"{student.path} is an image decoder, which draws nothing by itself", hint="nas evaluate it")
    name = about.get("teacher")
    if name is None:
        raise NasError(
            f"{student.path} does not say which teacher's text it reads", hint="train it with nas train, which says so"
        )
    if teachers.teacher_file(name) is not None:
        if teacher_hash(name) != about.get("teacher_digest"):
            raise NasError(
                f"{student.path} was trained with another version of the teacher {name!r}, whose text it reads",
                hint="train it again: nas train STUDY#CANDIDATE",
            )
        task = about.get("task", "shapes")
        loaded, lesson = embedded_lesson(name, task)
        loaded.to(device)
        return EmbeddedPipeline(lesson=lesson, split=split, task_name=task)
    # Imported here: diffusers and transformers take seconds to import.
    from nas.teachers.pipeline import load_pipeline

    teacher: Any = teachers.load_teacher(name, device=device)
    spec: Any = student.denoiser.network.spec
    return LatentPipeline(
        published=load_pipeline(name, device=device),
        teacher=teacher,
        shape=(spec.input.channels, spec.input.height, spec.input.width),
        device=device,
    )
