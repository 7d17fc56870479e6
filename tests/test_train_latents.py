"""Recipes on cached latents, with tiny diffusers pipelines as teachers and the student back in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from image_cases import folder_of_images
from train_cases import weights

from nas.cache import CacheSettings, TargetSettings, cache_images, cache_prompts, cache_targets
from nas.checkpoint import load_network, save_diffusers
from nas.diffusion import FLOW, NativeDenoiser
from nas.distill import answer
from nas.errors import NasError, UsageError
from nas.space import Candidate, load_space
from nas.students import load_student
from nas.tasks.latents import Store
from nas.teachers import load_teacher
from nas.train import Recipe, Subject, TrainResult, dry_run, load_recipe, train_recipe

RECIPE = """
[student]
from_teacher = true
remove = ["mid_block.attentions.0", "mid_block.resnets.1"]
[sampling]
steps = 2
[[stage]]
name = "distil"
steps = 20
batch = 4
lr = 1e-3
checkpoint_every = 10
[[stage.objective]]
name = "task"
space = "noise"
[[stage.objective]]
name = "output"
space = "noise"
[[stage.objective]]
name = "layers"
weight = 0.1
"""
PROMPTS = """
[student]
from_teacher = true
[[stage]]
name = "generator"
steps = 2
batch = 2
lr = 1e-4
data = "prompts"
[[stage.objective]]
name = "sid_lsg"
"""


def recipe(folder: Path, text: str = RECIPE, *changes: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(text)
    return load_recipe(str(path), changes)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.stable_diffusion(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images"))


def cached(images: Path, pipeline: str, out: Path, **options: Any) -> str:
    cache_images(images, CacheSettings(pipeline=pipeline, batch=4, **options), out)
    return str(out)


@pytest.fixture(scope="module")
def data(images: Path, sd: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return cached(images, sd, tmp_path_factory.mktemp("data") / "sd")


@pytest.fixture(scope="module")
def trained(sd: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("trained")
    changes = ('sampling.prompts=["a b", "c d"]',)
    return train_recipe(
        recipe(folder, RECIPE, *changes), Subject(candidate=None, teacher=sd, data=data), folder / "run"
    )


def test_a_student_is_trained_on_latents_and_its_prompts_are_drawn(trained: TrainResult, sd: str, data: str) -> None:
    stage = trained.folder / "stages" / "1-distil"
    assert [path.name for path in sorted((stage / "samples").iterdir())] == ["step-00000010.png", "step-00000020.png"]
    losses = (stage / "losses.csv").read_text().splitlines()
    assert losses[0] == "step,loss,task,output,layers,lr,seconds"
    assert float(losses[2].split(",")[1]) < float(losses[1].split(",")[1])
    found = load_student(trained.folder)
    assert isinstance(found.denoiser, NativeDenoiser)
    assert found.denoiser.schedule.prediction == "noise"
    assert torch.equal(found.denoiser.schedule.alpha_bar, load_teacher(sd).schedule.alpha_bar)  # type: ignore[arg-type]
    assert found.about["teacher"] == sd
    assert found.about["data"] == Store.open(data).digest
    assert trained.scores is None  # nothing here can check its images


def test_the_student_runs_in_a_pipeline_of_diffusers(trained: TrainResult, sd: str, tmp_path: Path) -> None:
    """What diffusers draws with the student's folder is what we draw with its file."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    network = load_network(trained.weights)
    save_diffusers(tmp_path / "unet", network)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([7, 600]), torch.randn(2, tiny.TOKENS, tiny.TEXT_WIDTH)
    with torch.no_grad():
        theirs = unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
        assert torch.allclose(theirs, network(x, t, text), atol=1e-5)
    pipe = StableDiffusionPipeline.from_pretrained(sd, unet=unet, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe("a b", num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert pictures.shape == (1, 16, 16, 3)
    assert pictures.std() > 0


def test_resume_with_other_data_is_refused_and_nothing_is_lost(
    trained: TrainResult, images: Path, sd: str, tmp_path: Path
) -> None:
    other = cached(images, sd, tmp_path / "other", size=16, keep_images=True)
    before = trained.weights.read_bytes()
    again = recipe(tmp_path, RECIPE, 'sampling.prompts=["a b", "c d"]')
    with pytest.raises(NasError, match=r"the run in .* is another one: data data was [0-9a-f]+ and is now"):
        train_recipe(again, Subject(candidate=None, teacher=sd, data=other), trained.folder)
    assert trained.weights.read_bytes() == before


def test_a_rectified_flow_student_of_a_teacher_with_another_schedule(sd: str, data: str, tmp_path: Path) -> None:
    flow = recipe(tmp_path, RECIPE, "student.keep_schedule=false", 'times="logit_normal"')
    whom = Subject(candidate=None, teacher=sd, data=data)
    found = train_recipe(recipe(tmp_path, RECIPE, "student.keep_schedule=false", "steps=1"), whom, tmp_path / "run")
    student = load_student(found.folder)
    assert isinstance(student.denoiser, NativeDenoiser)
    assert student.denoiser.schedule.prediction == FLOW.prediction
    assert student.denoiser.schedule.alpha_bar is None
    (stage,) = dry_run(load_recipe(str(tmp_path / "mine.toml"), ["steps=1", 'times="logit_normal"']), whom).stages
    assert "outside are moved to its ends" in stage.data  # said so
    assert "no samples are drawn" in stage.data
    assert flow.stages[0].times == "logit_normal"


def test_cached_answers_are_taken_where_they_are_enough(
    images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached(images, sd, tmp_path / "data")
    cache_targets(Path(folder), TargetSettings(teacher=sd, batch=4))
    asked: list[int] = []
    monkeypatch.setattr("nas.distill.turns.answer", lambda *a, **k: (asked.append(1), answer(*a, **k))[1])
    plain = RECIPE.replace('[[stage.objective]]\nname = "layers"\nweight = 0.1\n', "")
    whom = Subject(candidate=None, teacher=sd, data=folder)
    train_recipe(recipe(tmp_path, plain, "steps=2"), whom, tmp_path / "run")
    assert not asked
    train_recipe(recipe(tmp_path, RECIPE, "steps=2"), whom, tmp_path / "layers")
    assert asked  # layers are not cached


def test_prompts_alone_do_for_a_data_free_method(sd: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb c\nd\n")
    cache_prompts(tmp_path / "prompts.txt", CacheSettings(pipeline=sd), tmp_path / "data")
    whom = Subject(candidate=None, teacher=sd, data=str(tmp_path / "data"))
    found = train_recipe(recipe(tmp_path, PROMPTS), whom, tmp_path / "run")
    assert load_student(found.folder).sampling.times == pytest.approx((0.7144,), abs=1e-4)
    with pytest.raises(NasError, match="has prompts only, and images are needed"):
        train_recipe(recipe(tmp_path), whom, tmp_path / "other")


def test_sdxl_with_its_pooled_text_and_sizes(images: Path, sdxl: str, tmp_path: Path) -> None:
    folder = cached(images, sdxl, tmp_path / "data")
    found = train_recipe(
        recipe(tmp_path, RECIPE, "steps=2"), Subject(candidate=None, teacher=sdxl, data=folder), tmp_path / "run"
    )
    assert load_network(found.weights).spec.inputs.keys() >= {"pooled", "size_ids"}
    assert bool(weights(found).isfinite().all())


# What is refused


def candidate() -> Candidate:
    return load_space("sd_unet").published("bk-sdm-tiny")


def test_data_of_another_vae_or_text_is_refused(images: Path, sd: str, sdxl: str, tmp_path: Path) -> None:
    tiny.vae(channels=8).save_pretrained(tmp_path / "vae")
    wider = cached(images, sd, tmp_path / "wider", vae=str(tmp_path / "vae"))
    with pytest.raises(NasError, match=r"latents of 8 channels .* takes 4"):
        train_recipe(recipe(tmp_path), Subject(candidate=None, teacher=sd, data=wider), tmp_path / "run")
    scaled = cached(images, sdxl, tmp_path / "sdxl")
    with pytest.raises(NasError, match=r"scaling factor 0\.13025 .* 0\.18215"):
        train_recipe(recipe(tmp_path), Subject(candidate=None, teacher=sd, data=scaled), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_candidate_of_another_size_is_refused_with_the_option_that_helps(sd: str, data: str, tmp_path: Path) -> None:
    plain = RECIPE.replace("from_teacher = true", "").replace(
        'remove = ["mid_block.attentions.0", "mid_block.resnets.1"]', ""
    )
    with pytest.raises(NasError, match="has latent height 64 where the data has 8") as caught:
        train_recipe(recipe(tmp_path, plain), Subject(candidate=candidate(), teacher=sd, data=data), tmp_path / "run")
    assert "--resolution 16" in str(caught.value.hint)


def test_a_diffusers_teacher_without_data_is_refused(sd: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs data of its own"):
        train_recipe(recipe(tmp_path), Subject(candidate=None, teacher=sd), tmp_path / "run")
    with pytest.raises(NasError, match="cannot teach the task shapes"):
        train_recipe(recipe(tmp_path), Subject(candidate=None, teacher=sd, data="shapes"), tmp_path / "run")
    with pytest.raises(NasError, match=r"and .* has latents"):
        train_recipe(recipe(tmp_path), Subject(candidate=None, teacher="embedded", data=data), tmp_path / "run")


def test_a_later_teacher_of_another_schedule_is_refused_where_the_student_keeps_its_own(
    sd: str, data: str, tmp_path: Path
) -> None:
    from diffusers import DDPMScheduler

    velocity = DDPMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1, **tiny.SCALED_LINEAR)
    other = str(tiny.stable_diffusion(tmp_path / "v", scheduler=velocity))
    whom = Subject(candidate=None, teacher=sd, data=data)
    with pytest.raises(
        NasError, match=r"stage 'distil': its teacher .* another noise schedule or prediction"
    ) as caught:
        train_recipe(recipe(tmp_path, RECIPE, f'distil.teacher="{other}"'), whom, tmp_path / "run")
    assert "keep_schedule=false" in str(caught.value.hint)
    both = recipe(tmp_path, RECIPE, f'distil.teacher="{other}"', "student.keep_schedule=false", "steps=1")
    found = train_recipe(both, whom, tmp_path / "run")
    assert json.loads((found.folder / "result.json").read_text())["stages"][0]["steps"] == 1
