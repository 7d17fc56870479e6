"""Teachers: the shipped one draws what it is asked for; closed forms; files and folders that cannot teach."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas.diffusion import Conditioning, FlowDenoiser, guided, noised, sample
from nas.errors import NasError
from nas.tasks.shapes import Task
from nas.teachers import (
    EmbeddedTeacher,
    GaussianTeacher,
    TeacherSettings,
    load_teacher,
    save_teacher,
    teacher_digest,
    teacher_file,
)

SHIPPED = teacher_file("embedded")
SIDECAR: dict[str, Any] = json.loads(SHIPPED.with_suffix(".json").read_text()) if SHIPPED else {}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def embedded() -> EmbeddedTeacher:
    teacher = load_teacher()
    assert isinstance(teacher, EmbeddedTeacher)
    return teacher


def small_teacher() -> EmbeddedTeacher:
    torch.manual_seed(0)
    return EmbeddedTeacher(
        TeacherSettings(
            vocabulary=7,
            null_tokens=(1, 2, 0),
            text_width=16,
            text_heads=2,
            widths=(16, 32),
            head_width=8,
            image_size=16,
            mean=(-0.5, 0.0, 0.5),
        )
    )


class TestShipped:
    def test_file_is_the_stated_one(self) -> None:
        assert SHIPPED is not None
        content = SHIPPED.read_bytes()
        assert len(content) == SIDECAR["bytes"] <= 12_000_000
        assert hashlib.sha256(content).hexdigest() == SIDECAR["sha256"] == teacher_digest("embedded")

    def test_is_frozen_and_as_large_as_stated(self, embedded: EmbeddedTeacher) -> None:
        assert not embedded.training
        assert not any(parameter.requires_grad for parameter in embedded.parameters())
        assert sum(parameter.numel() for parameter in embedded.parameters()) == SIDECAR["parameters"]

    def test_fits_the_task(self, embedded: EmbeddedTeacher) -> None:
        task = Task()
        assert embedded.image_shape == task.image_shape
        assert embedded.text_shape[0] == task.text_tokens
        assert embedded.settings.vocabulary == task.vocabulary_size
        null = embedded.encode(task.tokens([None] * 3))
        # Nearly, not bitwise: one row's products are summed in another order than three rows'.
        torch.testing.assert_close(embedded.null_text(3).tokens, null.tokens)
        torch.testing.assert_close(embedded.null_text(3).layout, null.layout)

    def test_stated_scores_meet_the_target(self) -> None:
        scores = SIDECAR["scores"]
        assert scores["held-out"]["prompts"] >= 500
        assert scores["held-out"]["correct"] >= 0.95
        assert scores["all"]["correct"] >= 0.94

    def test_velocity_and_clean_agree(self, embedded: EmbeddedTeacher) -> None:
        task = Task()
        captions = task.captions("held-out")[:4]
        x0, t = task.render(captions, generator()), torch.tensor([0.1, 0.4, 0.7, 1.0])
        x = noised(x0, torch.randn(x0.shape, generator=generator(1)), t)
        text = embedded.encode(task.tokens(captions))
        clean, velocity = embedded.denoise(x, t, text), embedded.velocity(x, t, text)
        assert torch.allclose(clean, x - t.view(-1, 1, 1, 1) * velocity, atol=1e-5)
        assert float((clean[0] - x0[0]).square().mean()) < 0.01

    def test_the_caption_matters_and_helps(self, embedded: EmbeddedTeacher) -> None:
        task = Task()
        captions = list(task.captions("held-out")[:32])
        x0, t = task.render(captions, generator()), torch.full((32,), 0.85)
        x = noised(x0, torch.randn(x0.shape, generator=generator(1)), t)

        def error(text: Conditioning) -> float:
            return float((embedded.denoise(x, t, text) - x0).square().mean())

        own = error(embedded.encode(task.tokens(captions)))
        assert own < 0.9 * error(embedded.null_text(32))
        assert own < 0.9 * error(embedded.encode(task.tokens([*captions[1:], captions[0]])))

    @pytest.mark.slow
    def test_draws_held_out_captions(self, embedded: EmbeddedTeacher) -> None:
        task = Task()
        captions = list(task.captions("held-out"))[:62]
        text = embedded.encode(task.tokens(captions))
        images = sample(embedded, text, embedded.null_text(), shape=task.image_shape, generator=generator(5))
        scores = task.check(images, captions)
        assert scores.means()["correct"] >= 0.9
        # Order must come from the caption: the mirrored captions may not pass as well.
        mirrored = [dataclasses.replace(c, first=c.things[1], second=c.first) for c in captions]
        assert task.check(images, mirrored).means()["correct"] <= 0.1


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        teacher = small_teacher().eval()
        path = save_teacher(tmp_path / "t.safetensors", teacher)
        again = load_teacher(str(path))
        x, t, tokens = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([[1, 3, 2], [1, 4, 2]])
        assert isinstance(again, EmbeddedTeacher)
        assert again.settings == teacher.settings
        # Not bit-equal: without gradients torch runs its fused transformer layer.
        assert torch.allclose(again(x, t, tokens), teacher(x, t, tokens), atol=1e-5)
        half = load_teacher(str(save_teacher(tmp_path / "h.safetensors", teacher, dtype=torch.float16)))
        assert torch.allclose(half.velocity(x, t, teacher.encode(tokens)), teacher(x, t, tokens), atol=1e-2)
        assert (tmp_path / "h.safetensors").stat().st_size < 0.6 * path.stat().st_size

    def test_first_format_is_read(self, tmp_path: Path) -> None:
        teacher = small_teacher().eval()
        path = save_teacher(tmp_path / "t.safetensors", teacher)
        with safe_open(path, framework="pt") as stream:
            state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            metadata = stream.metadata()
        # That format had the layout inside the denoiser's network.
        moved = {"denoiser.network.": "denoiser.network.network.", "layout.": "denoiser.network."}
        old = {
            next((new + name.removeprefix(now) for now, new in moved.items() if name.startswith(now)), name): value
            for name, value in state.items()
        }
        assert old.keys() != state.keys()
        save_file(old, path, {**metadata, "format": "nas-teacher-1"})
        again = load_teacher(str(path))
        assert isinstance(again, EmbeddedTeacher)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

    def test_the_layout_is_added_to_the_denoisers_input(self) -> None:
        """As the first format's network did it, whatever conditions come with: tokens alone, or their layout too."""
        teacher = small_teacher().eval()

        class Placed(torch.nn.Module):
            def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
                field = teacher.layout.field + teacher.layout.said(text).view(-1, *teacher.layout.field.shape)
                return teacher.denoiser.network(sample + field, timestep, text)

        plain = FlowDenoiser(Placed(), teacher.preconditioner, patch=teacher.settings.patch)
        x, t = torch.randn(2, 3, 16, 16, generator=generator()), torch.tensor([0.2, 0.9])
        text = teacher.encode(torch.tensor([[1, 3, 2], [1, 4, 2]]))
        bare = Conditioning(tokens=text.tokens)
        with torch.no_grad():
            wanted = plain.velocity(x, t, bare)
            torch.testing.assert_close(teacher.velocity(x, t, text), wanted)
            torch.testing.assert_close(teacher.velocity(x, t, bare), wanted)
            torch.testing.assert_close(teacher.denoise(x, t, bare), x - t.view(-1, 1, 1, 1) * wanted)

    def test_precision_is_for_larger_teachers(self) -> None:
        with pytest.raises(NasError, match="asked in float32, not bfloat16"):
            load_teacher(dtype=torch.bfloat16)

    def test_missing_file(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "none.safetensors")
        for call in (load_teacher, teacher_digest):
            with pytest.raises(NasError, match=r"none\.safetensors does not exist"):
                call(missing)

    def test_not_a_teacher(self, tmp_path: Path) -> None:
        path = tmp_path / "t.safetensors"
        path.write_bytes(b"no")
        with pytest.raises(NasError, match="not a readable safetensors file"):
            load_teacher(str(path))
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(NasError, match="not a teacher of this project"):
            load_teacher(str(path))

    def test_weights_of_other_settings(self, tmp_path: Path) -> None:
        teacher = small_teacher()
        teacher.settings = dataclasses.replace(teacher.settings, widths=(32, 32))
        with pytest.raises(NasError, match="do not fit its settings"):
            load_teacher(str(save_teacher(tmp_path / "t.safetensors", teacher)))


class TestGaussian:
    """distillation.md O1, O5: closed forms, in float64."""

    teacher = GaussianTeacher(
        mean=torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 2, 2),
        sd=torch.linspace(0.2, 1.5, 12, dtype=torch.float64).view(3, 2, 2),
        pull=0.7,
        text_shape=(3, 5),
    )

    def points(self, count: int = 6) -> tuple[Tensor, Tensor, Conditioning]:
        x = torch.randn((count, 3, 2, 2), generator=generator(), dtype=torch.float64)
        tokens = torch.randint(0, 4, (count, 3), generator=generator())
        return x, torch.linspace(0.05, 1, count, dtype=torch.float64), self.teacher.encode(tokens)

    def test_is_the_regression_of_clean_on_noisy(self) -> None:
        text = self.teacher.encode(torch.tensor([[1, 2, 3]])).expand(200_000)
        shape = (200_000, 3, 2, 2)
        x0 = self.teacher.mean_given(text) + self.teacher.sd * torch.randn(shape, generator=generator(1))
        t = torch.full((200_000,), 0.4, dtype=torch.float64)
        x = noised(x0, torch.randn(shape, generator=generator(2), dtype=torch.float64), t)
        residual = x0 - self.teacher.denoise(x, t, text)
        assert residual.mean(0).abs().max() < 0.01
        assert (residual * (x - x.mean(0))).mean(0).abs().max() < 0.02

    def test_velocity_is_that_of_the_clean_image(self) -> None:
        x, t, text = self.points()
        velocity = self.teacher.velocity(x, t, text)
        expected = (x - self.teacher.denoise(x, t, text)) / t.view(-1, 1, 1, 1)
        assert torch.allclose(velocity, expected, atol=1e-12)
        assert torch.isfinite(self.teacher.velocity(x, torch.zeros_like(t), text)).all()

    def test_ends_of_time(self) -> None:
        x, t, text = self.points()
        assert torch.allclose(self.teacher.denoise(x, torch.zeros_like(t), text), x)
        assert torch.allclose(self.teacher.denoise(x, torch.ones_like(t), text), self.teacher.mean_given(text))

    def test_guidance_moves_the_mean(self) -> None:
        x, t, text = self.points()
        null = self.teacher.null_text(len(x))
        both = guided(self.teacher.denoise(x, t, text), self.teacher.denoise(x, t, null), 2.5)
        assert torch.allclose(both, self.teacher.denoise(x, t, text.map(lambda part: 2.5 * part)), atol=1e-12)
