"""Decoders by a recipe: a VAE teaches, on drawn pictures or on cached latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pipelines as tiny
from image_cases import folder_of_images

from nas.cache import CacheSettings, cache_images
from nas.checkpoint import load_network
from nas.errors import NasError, UsageError
from nas.space import Candidate, load_space
from nas.students import load_student
from nas.teachers.decoders import Decoder
from nas.train import Recipe, Subject, dry_run, load_recipe, train_recipe

RECIPE = """
[[stage]]
name = "paint"
steps = 4
batch = 2
lr = 1e-3
checkpoint_every = 2
[[stage.objective]]
name = "reconstruction"
"""
WIDTHS = {"width_0": 64, "width_1": 64, "width_2": 64, "width_3": 32}
UNITS = {f"resnets_{stage}": 1 for stage in range(4)}


def candidate(space: str = "decoder") -> Candidate:
    return load_space(space).candidate(style="separable", mid="none", expansion=1, **WIDTHS, **UNITS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four stages, as Stable Diffusion's: a latent place is 8x8 pixels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    stages = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    tiny.seeded(lambda: AutoencoderKL(down_block_types=down, up_block_types=up, **stages)).save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, *changes: str) -> Recipe:
    path = folder / "paint.toml"
    path.write_text(RECIPE)
    return load_recipe(str(path), changes)


def test_a_decoder_learns_from_a_vae_on_drawn_pictures(vae: str, tmp_path: Path) -> None:
    whom = Subject(candidate=candidate(), teacher=vae, data="shapes")
    found = train_recipe(recipe(tmp_path), whom, tmp_path / "run")
    student = load_student(found.folder)
    assert isinstance(student.denoiser, Decoder)
    assert student.about["teacher"] == vae
    assert load_network(found.weights).spec.input.height == 4  # 32 px
    assert found.scores is None
    stage = found.folder / "stages" / "1-paint"
    assert [path.name for path in sorted((stage / "samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    assert (stage / "losses.csv").read_text().startswith("step,loss,reconstruction.teacher,lr,seconds\n2,")
    again = train_recipe(recipe(tmp_path), whom, tmp_path / "run")
    assert again.resumed_from == 4


def test_a_dry_run_says_what_is_painted(vae: str, tmp_path: Path) -> None:
    (stage,) = dry_run(recipe(tmp_path), Subject(candidate=candidate(), teacher=vae, data="shapes")).stages
    assert "scenes of the task shapes, drawn at every step and encoded" in stage.data
    assert stage.memory.activations > 0


def test_a_decoder_learns_on_cached_latents_with_their_pictures(vae: str, tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images")
    pipeline = str(tiny.stable_diffusion(tmp_path / "sd"))
    cache_images(images, CacheSettings(pipeline=pipeline, vae=vae, size=16, keep_images=True), tmp_path / "data")
    whom = Subject(candidate=candidate(), teacher=vae, data=str(tmp_path / "data"))
    both = recipe(tmp_path, "steps=1", "paint.reconstruction.image_weight=1.0")
    found = train_recipe(both, whom, tmp_path / "run")
    header = (found.folder / "stages" / "1-paint" / "losses.csv").read_text().splitlines()[0]
    assert header == "step,loss,reconstruction.teacher,reconstruction.image,lr,seconds"


def test_a_small_copy_has_divided_widths(vae: str, tmp_path: Path) -> None:
    small = recipe(tmp_path, "steps=1", "student.width_divisor=8", "student.norm_groups=4")
    found = train_recipe(small, Subject(candidate=candidate(), teacher=vae, data="shapes"), tmp_path / "run")
    whole = train_recipe(
        recipe(tmp_path, "steps=1"), Subject(candidate=candidate(), teacher=vae, data="shapes"), tmp_path / "whole"
    )
    assert found.params < whole.params / 20
    bad = recipe(tmp_path, "student.width_divisor=7")
    with pytest.raises(NasError, match="width_0 = 64 cannot be divided by 7"):
        train_recipe(bad, Subject(candidate=candidate(), teacher=vae, data="shapes"), tmp_path / "bad")


def test_what_does_not_go_together_is_refused(vae: str, tmp_path: Path) -> None:
    wide = load_space("snapgen_unet").published("snapgen")
    with pytest.raises(UsageError, match="holds unet networks, and this recipe trains image decoders"):
        train_recipe(recipe(tmp_path), Subject(candidate=wide, teacher=vae, data="shapes"), tmp_path / "run")
    with pytest.raises(UsageError, match="needs pictures to teach on"):
        train_recipe(recipe(tmp_path), Subject(candidate=candidate(), teacher=vae), tmp_path / "run")
    tiny.vae().save_pretrained(tmp_path / "halves")
    other = Subject(candidate=candidate(), teacher=str(tmp_path / "halves"), data="shapes")
    with pytest.raises(NasError, match="makes 8x8 pixels of a place"):
        train_recipe(recipe(tmp_path), other, tmp_path / "run")
    assert not (tmp_path / "run").exists()
