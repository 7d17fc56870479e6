"""Published denoisers as teachers: every class is asked exactly as diffusers asks it, and strangers are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.checkpoint import hub
from nas.diffusion import Conditioning
from nas.errors import NasError
from nas.teachers import DiffusersTeacher, load_teacher, teacher_digest

SHAPE = (2, 4, 8, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(text_width: int = tiny.TEXT_WIDTH, **more: int) -> tuple[Tensor, Tensor, Conditioning]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator(1))

    text = Conditioning(tokens=normal(5, text_width), **{name: normal(width) for name, width in more.items()})
    return torch.randn(SHAPE, generator=generator()), torch.tensor([0.3, 0.6]), text


def teacher_of(folder: Path, **options: Any) -> DiffusersTeacher:
    teacher = load_teacher(str(folder), **options)
    assert isinstance(teacher, DiffusersTeacher)
    return teacher


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pixart(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("sd3"))


def on_grid(teacher: DiffusersTeacher, level: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schedule's a and s at a level, and the rectified-flow point at which x is asked there."""
    assert teacher.schedule.alpha_bar is not None
    alpha_bar = teacher.schedule.alpha_bar[level].double()
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return a, s, (x / (a + s)).float(), (s / (a + s)).float().expand(len(x))


class TestCalls:
    """The network's own answer, called by hand as its pipeline does, turned into x0 by hand."""

    def test_stable_diffusion(self, pipeline: Path) -> None:
        teacher, (x, _, text) = teacher_of(pipeline), points()
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not teacher.training
        assert teacher.image_shape == (4, 8, 8)
        assert teacher.conditions == {"tokens": tiny.TEXT_WIDTH}
        a, s, at, t = on_grid(teacher, 500, x)
        noise = teacher.network(x, 500, encoder_hidden_states=text.tokens).sample
        torch.testing.assert_close(teacher.denoise(at, t, text), ((x - s * noise) / a).float(), rtol=0, atol=2e-3)

    @pytest.mark.parametrize(
        ("kind", "clean"),
        [
            ("v_prediction", lambda x, said, a, s: a * x - s * said),
            ("sample", lambda x, said, a, s: said),
        ],
    )
    def test_other_predictions(
        self, pipeline: Path, tmp_path: Path, kind: str, clean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        with_schedule(tmp_path, pipeline, prediction_type=kind)
        teacher, (x, _, text) = teacher_of(tmp_path), points()
        a, s, at, t = on_grid(teacher, 300, x)
        said = teacher.network(x, 300, encoder_hidden_states=text.tokens).sample
        torch.testing.assert_close(teacher.denoise(at, t, text), clean(x, said, a, s).float(), rtol=0, atol=2e-3)

    def test_velocity(self, pipeline: Path) -> None:
        teacher, (x, t, text) = teacher_of(pipeline), points()
        clean = teacher.denoise(x, t, text)
        torch.testing.assert_close(teacher.velocity(x, t, text), (x - clean) / t.view(-1, 1, 1, 1), rtol=0, atol=1e-4)

    def test_flow_matching(self, pipeline: Path, tmp_path: Path) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        (tmp_path / "unet").symlink_to(pipeline / "unet")
        FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
        teacher, (x, t, text) = teacher_of(tmp_path), points()
        expected = teacher.network(x, 1000 * t, encoder_hidden_states=text.tokens).sample
        torch.testing.assert_close(teacher.velocity(x, t, text), expected)

    def test_sdxl_is_told_pooled_text_and_sizes(self, sdxl: Path) -> None:
        teacher = teacher_of(sdxl)
        assert teacher.conditions == {"tokens": 40, "pooled": 24, "size_ids": 6}
        x, _, text = points(40, pooled=24, size_ids=6)
        a, s, at, t = on_grid(teacher, 400, x)
        added = {"text_embeds": text.pooled, "time_ids": text.size_ids}
        noise = teacher.network(x, 400, encoder_hidden_states=text.tokens, added_cond_kwargs=added).sample
        torch.testing.assert_close(teacher.denoise(at, t, text), ((x - s * noise) / a).float(), rtol=0, atol=2e-3)
        other = Conditioning(tokens=text.tokens, pooled=text.pooled, size_ids=2 + text.size_ids)
        assert not torch.allclose(teacher.denoise(at, t, other), teacher.denoise(at, t, text), atol=1e-3)

    def test_pixart_leaves_padding_and_variance_out(self, pixart: Path) -> None:
        teacher, (x, _, text) = teacher_of(pixart), points()
        text.tokens[:, 3:] = 0
        a, s, at, t = on_grid(teacher, 400, x)
        said = teacher.network(
            x,
            encoder_hidden_states=text.tokens,
            encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]] * 2),
            timestep=torch.full((2,), 400),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        assert said.shape[1] == 8
        clean = teacher.denoise(at, t, text)
        torch.testing.assert_close(clean, ((x - s * said[:, :4]) / a).float(), rtol=0, atol=2e-3)
        shorter = Conditioning(tokens=text.tokens[:, :3])
        torch.testing.assert_close(teacher.denoise(at, t, shorter), clean, rtol=0, atol=1e-4)

    def test_pixart_of_1024_px_is_told_sizes(self, pixart: Path, tmp_path: Path) -> None:
        network = tiny.pixart_transformer(use_additional_conditions=True)
        network.save_pretrained(tmp_path / "transformer")
        (tmp_path / "scheduler").symlink_to(pixart / "scheduler")
        teacher = teacher_of(tmp_path)
        assert teacher.conditions == {"tokens": tiny.TEXT_WIDTH, "size_ids": 3}
        x, _, text = points(size_ids=3)
        assert text.size_ids is not None
        a, s, at, t = on_grid(teacher, 400, x)
        added = {"resolution": text.size_ids[:, :2], "aspect_ratio": text.size_ids[:, 2:]}
        options = {"timestep": torch.full((2,), 400), "added_cond_kwargs": added}
        said = network(x, encoder_hidden_states=text.tokens, **options).sample[:, :4]
        torch.testing.assert_close(teacher.denoise(at, t, text), ((x - s * said) / a).float(), rtol=0, atol=2e-3)

    def test_stable_diffusion_3(self, sd3: Path) -> None:
        teacher = teacher_of(sd3)
        assert teacher.conditions == {"tokens": 40, "pooled": 40}
        assert teacher.schedule.alpha_bar is None
        x, t, text = points(40, pooled=40)
        expected = teacher.network(
            x, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=1000 * t
        ).sample
        torch.testing.assert_close(teacher.velocity(x, t, text), expected)
        torch.testing.assert_close(teacher.denoise(x, t, text), x - t.view(-1, 1, 1, 1) * expected)

    def test_dreamlite(self, pipeline: Path, tmp_path: Path) -> None:
        from diffusers import DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler

        network = tiny.seeded(
            lambda: DreamLiteUNetModel(
                sample_size=8,
                block_out_channels=(8, 16, 16),
                norm_num_groups=4,
                cross_attention_dim=tiny.TEXT_WIDTH,
                attention_head_dim=8,
                layers_per_block=1,
                ff_mult=2,
                addition_embed_type="time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=24,
            )
        )
        network.save_pretrained(tmp_path)
        FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
        teacher = teacher_of(tmp_path)
        x, t, text = points(size_ids=6)
        assert teacher.conditions == {"tokens": tiny.TEXT_WIDTH, "size_ids": 6}
        expected = network(x, 1000 * t, text.tokens, added_cond_kwargs={"time_ids": text.size_ids}).sample
        torch.testing.assert_close(teacher.velocity(x, t, text), expected)

    def test_a_consistency_models_guidance_is_passed_on(self, pipeline: Path, tmp_path: Path) -> None:
        tiny.unet(time_cond_proj_dim=6).save_pretrained(tmp_path / "unet")
        (tmp_path / "scheduler").symlink_to(pipeline / "scheduler")
        teacher, (x, _, text) = teacher_of(tmp_path), points(guidance=6)
        a, s, at, t = on_grid(teacher, 500, x)
        noise = teacher.network(x, 500, text.tokens, timestep_cond=text.guidance).sample
        torch.testing.assert_close(teacher.denoise(at, t, text), ((x - s * noise) / a).float(), rtol=0, atol=2e-3)

    def test_half_precision_answers_in_the_datas(self, pipeline: Path) -> None:
        teacher, (x, t, text) = teacher_of(pipeline, dtype=torch.bfloat16), points()
        assert next(teacher.network.parameters()).dtype == torch.bfloat16
        said = teacher.velocity(x, t, text)
        assert said.dtype == torch.float32
        torch.testing.assert_close(said, teacher_of(pipeline).velocity(x, t, text), rtol=0.1, atol=0.1)

    def test_steps_are_interpolated_and_end_at_the_schedule(self, pipeline: Path) -> None:
        schedule = teacher_of(pipeline).schedule
        alpha_bar = schedule.alpha_bar
        assert alpha_bar is not None
        between = (alpha_bar[10] * alpha_bar[11]).sqrt()
        step, value = schedule.nearest(torch.stack([alpha_bar[0], between, alpha_bar[999], torch.tensor(0.0)]))
        assert step.tolist() == pytest.approx([0, 10.5, 999, 999], abs=1e-2)
        assert value[-1].item() == pytest.approx(alpha_bar[999].item())


def with_schedule(folder: Path, pipeline: Path, **changes: Any) -> None:
    """A pipeline of the same UNet with another schedule."""
    (folder / "unet").symlink_to(pipeline / "unet")
    config = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **changes}))


class TestScaling:
    def test_is_that_of_the_vae_beside_it(self, sd3: Path, pipeline: Path, tmp_path: Path) -> None:
        found = teacher_of(sd3).scaling
        assert found is not None
        assert (found.kind, found.factor, found.shift) == ("AutoencoderKL", 1.5305, 0.0609)
        (tmp_path / "unet").symlink_to(pipeline / "unet")
        (tmp_path / "scheduler").symlink_to(pipeline / "scheduler")
        assert teacher_of(tmp_path).scaling is None


class TestDigest:
    def test_is_of_the_content(self, pipeline: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(pipeline, copy)
        before = teacher_digest(str(pipeline))
        assert teacher_digest(str(copy)) == before
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        state["conv_in.bias"][0] += 1e-3
        save_file(state, weights)
        changed = teacher_digest(str(copy))
        assert changed != before
        (copy / "vae" / "config.json").unlink()  # no part of the denoiser
        assert teacher_digest(str(copy)) == changed
        schedule = copy / "scheduler" / "scheduler_config.json"
        schedule.write_text(schedule.read_text().replace("0.012", "0.013"))
        assert teacher_digest(str(copy)) != changed

    def test_a_file_is_read_again_only_when_it_changed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from nas.teachers import files

        read: list[Path] = []
        plain = files.file_sha
        monkeypatch.setattr(files, "file_sha", lambda path: read.append(path) or plain(path))
        path = tmp_path / "weights.safetensors"
        path.write_bytes(b"one")
        first = files.cached_sha(path)
        assert files.cached_sha(path) == first
        assert len(read) == 1
        path.write_bytes(b"other")
        assert files.cached_sha(path) != first
        assert len(read) == 2


class TestRefusals:
    def test_brings_no_text(self, pipeline: Path) -> None:
        with pytest.raises(NasError, match="no text encoder"):
            load_teacher(str(pipeline)).null_text()

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (Conditioning(tokens=torch.zeros(2, 5, 40)), "needs size_ids of width 6, and the data brings none"),
            (
                Conditioning(tokens=torch.zeros(2, 5, 16), pooled=torch.zeros(2, 24), size_ids=torch.zeros(2, 6)),
                "needs tokens of width 40, and the data brings 16",
            ),
        ],
    )
    def test_conditions_that_do_not_fit(self, sdxl: Path, text: Conditioning, sentence: str) -> None:
        x, t, _ = points()
        with pytest.raises(NasError, match=sentence):
            teacher_of(sdxl).velocity(x, t, text)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(NasError, match=r"no folder .*nothing"):
            load_teacher(str(tmp_path / "nothing"))

    def test_folder_without_schedule(self, pipeline: Path, tmp_path: Path) -> None:
        (tmp_path / "unet").symlink_to(pipeline / "unet")
        with pytest.raises(NasError, match="has no schedule"):
            load_teacher(str(tmp_path))

    def test_another_class(self, pipeline: Path, tmp_path: Path) -> None:
        (tmp_path / "scheduler").symlink_to(pipeline / "scheduler")
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        with pytest.raises(NasError, match=r"is a AutoencoderKL; denoisers that can teach are UNet2D.*SD3Transformer"):
            load_teacher(str(tmp_path))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"in_channels": 9}, "turns 9 channels into 4; only denoisers of plain latents"),
            ({"class_embed_type": "timestep"}, "wants class labels"),
        ],
    )
    def test_other_conditions(self, pipeline: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
        tiny.unet(**options).save_pretrained(tmp_path / "unet")
        (tmp_path / "scheduler").symlink_to(pipeline / "scheduler")
        with pytest.raises(NasError, match=sentence):
            load_teacher(str(tmp_path))

    def test_unknown_prediction_type(self, pipeline: Path, tmp_path: Path) -> None:
        with_schedule(tmp_path, pipeline, prediction_type="score")
        with pytest.raises(NasError, match="prediction_type 'score'"):
            load_teacher(str(tmp_path))

    def test_pickled_weights_are_not_read(self, pipeline: Path, tmp_path: Path) -> None:
        shutil.copytree(pipeline, tmp_path / "p")
        weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(NasError, match=r"has no \.safetensors weights"):
            load_teacher(str(tmp_path / "p"))

    def test_unreachable_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*names: object, **options: object) -> None:
            raise NasError("'someone/unet' is no folder here and cannot be fetched from the hub: no route")

        monkeypatch.setattr(hub, "_snapshot", unreachable)
        with pytest.raises(NasError, match=r"the teacher someone/unet cannot be fetched: .*no route"):
            load_teacher("someone/unet")
