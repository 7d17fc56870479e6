"""Image decoders: a VAE as their teacher, their file, their training's data, and how they are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import vae as tiny_vae
from torch import Tensor

from nas.batches import Batch, Part
from nas.build import Network, build
from nas.cli import main
from nas.errors import NasError, UsageError
from nas.judge import decoder_scores, drawings, psnr_db
from nas.objectives import objective
from nas.paths import package_data
from nas.provenance import file_sha
from nas.space import Candidate, load_space
from nas.students import Sampling, load_student, save_student
from nas.tasks.shapes import detect
from nas.teachers.decoders import EMBEDDED, SHAPES_VAE, Decoder, load_decoder
from nas.train import Recipe, Subject, load_recipe
from nas.train.decoding import Decoding, open_decoding, trains_decoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source() -> Decoding:
    """The embedded task's."""
    return open_decoding(Subject(candidate=None, teacher=EMBEDDED), CPU)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("decoder-tiny")


def candidate(**changes: Any) -> Candidate:
    space = load_space("decoder")
    return space.candidate(**{**space.reference("snapgen-tiny").choices, **changes})


def student(source: Decoding, recipe: Recipe) -> Decoder:
    made = source.denoiser(build(source.spec(candidate(), recipe.student), seed=0), recipe.student)
    assert isinstance(made, Decoder)
    return made


def latents(batch: Batch) -> Tensor:
    assert batch.clean is not None
    return batch.clean


# The shipped VAE


def test_the_shipped_vae_is_the_one_on_record() -> None:
    folder = package_data("teachers", SHAPES_VAE)
    record = json.loads((folder / "record.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert file_sha(weights) == record["sha256"]
    assert weights.stat().st_size == record["bytes"] < 1_000_000
    assert record["command"].startswith("python benchmarks/train_tiny_vae.py")


def test_the_shipped_vae_keeps_what_is_drawn(source: Decoding) -> None:
    pictures = torch.cat(list(drawings(64, "held-out", 3)))
    coded = source.vae.encode(pictures)
    assert coded.shape == (64, 16, 4, 4)
    assert 0.7 < float(coded.std()) < 1.4  # what the scaling factor is for
    record = json.loads((package_data("teachers", SHAPES_VAE) / "record.json").read_text())
    assert psnr_db(source.vae.decode(coded), pictures) == pytest.approx(record["held_out_psnr_db"], abs=1.0)


# Its decoder as a teacher


def test_a_pipelines_vae_and_a_vae_alone_are_teachers(tmp_path: Path) -> None:
    made = tiny_vae(scaling_factor=0.5)
    made.save_pretrained(tmp_path / "alone")
    made.save_pretrained(tmp_path / "pipeline" / "vae")
    coded = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = made.decode(coded / 0.5).sample
    for name in ("alone", "pipeline"):
        teacher, vae = load_decoder(str(tmp_path / name))
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert vae.scaling.factor == 0.5
        torch.testing.assert_close(teacher(coded), wanted)
    with pytest.raises(NasError, match="cannot be read"):
        load_decoder(str(tmp_path / "none"))


# Its file


def test_a_decoder_comes_back_from_its_file(source: Decoding, recipe: Recipe, tmp_path: Path) -> None:
    own = student(source, recipe).eval()
    save_student(tmp_path / "network.safetensors", own, Sampling(), {"teacher": EMBEDDED})
    found = load_student(tmp_path)
    assert isinstance(found.denoiser, Decoder)
    assert found.denoiser.scaling == own.scaling
    assert found.about == {"teacher": EMBEDDED}
    coded = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(found.denoiser(coded), own(coded))


# Its training's source


def test_recipes_of_decoders_are_known_by_their_objective(recipe: Recipe) -> None:
    assert trains_decoder(recipe)
    assert trains_decoder(load_recipe("decoder"))
    assert not trains_decoder(load_recipe("shapes"))
    assert all(goal.objective == objective(goal.name, **goal.settings) for s in recipe.stages for goal in s.goals)


def test_batches_are_scenes_and_their_latents(source: Decoding, recipe: Recipe) -> None:
    batches = source.batches(recipe.stages[0], source.first, 3)
    whole, again = batches.batch(2), batches.batch(2, Part(index=1, count=2))
    assert whole.images is not None
    assert again.images is not None
    assert len(whole) == batches.size == recipe.stages[0].train.batch
    torch.testing.assert_close(again.images, whole.images[len(whole) // 2 :])
    torch.testing.assert_close(latents(whole), source.vae.encode(whole.images))
    # Real scenes: whatever has one or two objects for the checker.
    assert {len(found) for found in detect(whole.images)} <= {1, 2}


def test_the_teachers_network_is_one_of_ours(source: Decoding) -> None:
    network = source.network()
    assert isinstance(network, Network)
    coded = latents(source.batches(load_recipe("decoder-tiny").stages[0], source.first, 0).batch(0))
    with torch.no_grad():
        ours = Decoder(network.eval(), source.vae.scaling)(coded)
        torch.testing.assert_close(ours, source.first(coded), rtol=1e-4, atol=1e-4)


def test_a_candidate_is_made_for_the_vaes_latents(source: Decoding, recipe: Recipe) -> None:
    spec = source.spec(candidate(), recipe.student)
    assert (spec.input.channels, spec.input.height, spec.input.width) == (16, 4, 4)
    own = student(source, recipe)
    assert own(torch.zeros(1, 16, 4, 4)).shape == (1, 3, 32, 32)
    assert sum(p.numel() for p in own.parameters()) < 150_000
    with pytest.raises(UsageError, match="holds unet networks, and this recipe trains image decoders"):
        source.spec(load_space("snapgen_unet").reference("snapgen"), recipe.student)
    with pytest.raises(NasError, match="width_0 = 320 cannot be divided by 7"):
        source.spec(candidate(), replace(recipe.student, width_divisor=7))


def test_another_vae_must_scale_alike(source: Decoding, tmp_path: Path) -> None:
    assert source.teacher(EMBEDDED) is source.first
    assert source.teacher(source.vae.name) is source.first
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path)
    with pytest.raises(NasError, match="cannot take over"):
        source.teacher(str(tmp_path))


def test_data_that_does_not_go_with_the_vae_is_refused(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UsageError, match="needs pictures to teach on"):
        open_decoding(Subject(candidate=None, teacher=str(tmp_path / "vae")), CPU)
    with pytest.raises(NasError):
        open_decoding(Subject(candidate=None, teacher=EMBEDDED, data=str(tmp_path / "none")), CPU)
    small = open_decoding(Subject(candidate=None, teacher=str(tmp_path / "vae"), data="shapes"), CPU)
    with pytest.raises(NasError, match="2x2"):
        small.spec(candidate(), load_recipe("decoder").student)


def test_a_grid_shows_scenes_teacher_and_student(source: Decoding, recipe: Recipe) -> None:
    own = student(source, recipe)
    pixels = source.grid(own, Sampling())
    assert pixels is not None
    assert pixels.shape == (3 * 128 + 2 * 4, 8 * 128 + 7 * 4, 3)
    assert own.training  # as it was


# How they are judged


def test_a_decoder_that_is_its_teacher_has_full_marks(source: Decoding) -> None:
    pictures = torch.cat(list(drawings(12, "held-out", 3)))
    found = decoder_scores(source.first, source.first, source.vae, pictures, batch=8)
    assert found.teacher_db == float("inf")
    assert found.real_db == found.teachers_real_db
    assert found.batch == 8
    assert found.images_per_second > 0
    assert found.pictures.shape == (3 * 8, 3, 32, 32)
    assert torch.equal(found.pictures[:8], pictures[:8])
    assert found.teachers_params == sum(p.numel() for p in source.network().parameters())


def test_a_decoder_is_evaluated_beside_its_teacher(
    source: Decoding, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = student(source, recipe)
    save_student(tmp_path / "network.safetensors", own, Sampling(), {"teacher": EMBEDDED})
    assert main(["evaluate", str(tmp_path), "--prompts", "10"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "10 pictures, encoded by embedded and painted again" in out[0]
    assert [line.split()[0] for line in out[3:5]] == ["student", "teacher"]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["params"] == sum(p.numel() for p in own.parameters())
    assert record["real_db"] < record["teachers_real_db"]
    assert (tmp_path / "evaluation.png").is_file()
    assert main(["evaluate", str(tmp_path), "--steps", "2", "--clip", "x"]) != 0
    assert main(["evaluate", str(tmp_path), "--steps", "2"]) == 2
    assert "no use for --steps" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--prompts", "file.txt"]) == 2
    assert main(["sample", str(tmp_path)]) == 2
    assert "is an image decoder, which draws nothing by itself" in capsys.readouterr().err


def test_a_decoder_of_another_vae_needs_pictures(
    source: Decoding, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = package_data("teachers", SHAPES_VAE)
    save_student(tmp_path / "network.safetensors", student(source, recipe), Sampling(), {"teacher": str(vae)})
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "a decoder is judged on pictures" in capsys.readouterr().err
    (tmp_path / "real").mkdir()
    for name in "ab":
        Image.new("RGB", (50, 40), "red").save(tmp_path / "real" / f"{name}.png")
    assert main(["evaluate", str(tmp_path), "--real", str(tmp_path / "real"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
