"""The whole way with a published pipeline: its data cached, its denoiser shortened and distilled, given back to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from image_cases import folder_of_images

from nas.build import Network, build
from nas.cache import CacheSettings, TargetSettings, cache_images, cache_targets
from nas.checkpoint import load, save_diffusers
from nas.diffusion import Conditioning, NativeDenoiser
from nas.distill import Trained, TrainSettings, predict, train
from nas.edit import RemoveMiddle, edited
from nas.inherit import inherit
from nas.objectives import objective
from nas.tasks.latents import LatentBatches, Task, check_fit
from nas.teachers import DiffusersTeacher, load_pipeline, load_teacher, teacher_digest
from nas.times import Times

IMAGES, STEPS, BATCH = 16, 20, 8


@dataclass(frozen=True)
class World:
    """A pipeline, its images in latents, its denoiser as a teacher, and a student without the middle block."""

    pipeline: str
    data: Path
    teacher: DiffusersTeacher
    student: NativeDenoiser

    def batches(self, **options: Any) -> LatentBatches:
        return Task(self.data).batches(BATCH, times=Times(kind="uniform", schedule=self.teacher.schedule), **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    pipeline = str(tiny.stable_diffusion(folder / "sd"))
    images = folder_of_images(folder / "images", IMAGES)
    cache_images(images, CacheSettings(pipeline=pipeline, shard_rows=6), folder / "data")
    teacher = load_teacher(pipeline)
    assert isinstance(teacher, DiffusersTeacher)
    return World(pipeline=pipeline, data=folder / "data", teacher=teacher, student=shortened(pipeline, teacher))


def shortened(pipeline: str, teacher: DiffusersTeacher) -> NativeDenoiser:
    """The denoiser without its middle block, with the weights of the rest, on the teacher's schedule."""
    whole = load(pipeline)
    made = edited(whole.spec, [RemoveMiddle()])
    state, report = inherit(made.spec, whole.spec, whole.state_dict(), origin=made.origin)
    assert not report.new_blocks
    network = build(made.spec)
    network.load_state_dict(state)
    return NativeDenoiser(network, teacher.schedule)


def distilled(world: World, data: LatentBatches, teacher: DiffusersTeacher | None) -> Trained[NativeDenoiser]:
    settings = TrainSettings(steps=STEPS, batch=BATCH, lr=3e-4, warmup=2, ema_decay=0.5)
    student = shortened(world.pipeline, world.teacher)
    return train(student, data, [objective("output", space="noise")], settings, teacher=teacher, report_every=5)


@pytest.fixture(scope="module")
def trained(world: World) -> Trained[NativeDenoiser]:
    return distilled(world, world.batches(), world.teacher)


def distance(world: World, student: NativeDenoiser) -> float:
    """Mean square between the student's and the teacher's noise prediction, on other noise than it was trained with."""
    with torch.no_grad():
        batch = world.batches(seed=99).batch(0)
        ours, theirs = predict(student, batch, with_null=False), predict(world.teacher, batch, with_null=False)
        t = batch.point()[1].view(-1, 1, 1, 1)
        return float(((1 - t) * (ours.velocity - theirs.velocity)).square().mean())


def test_the_data_fits_its_pipeline(world: World) -> None:
    check_fit(Task(world.data).store.manifest, world.teacher)


def test_the_student_learns(world: World, trained: Trained[NativeDenoiser]) -> None:
    losses = [line.loss for line in trained.history]
    assert losses[-1] < losses[0]
    assert distance(world, trained.average) < 0.75 * distance(world, world.student)


def test_cached_answers_teach_as_well(world: World) -> None:
    cache_targets(world.data, TargetSettings(teacher=world.pipeline))
    data = world.batches(teacher_digest=teacher_digest(world.pipeline))
    assert data.targets is not None
    found = distilled(world, data, None)  # nobody is there to be asked
    assert distance(world, found.average) < 0.85 * distance(world, world.student)


def test_diffusers_loads_what_was_trained_and_samples_it(
    world: World, trained: Trained[NativeDenoiser], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    network = trained.average.network
    assert isinstance(network, Network)
    save_diffusers(tmp_path / "unet", network)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert loaded.mid_block is None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, tiny.TOKENS, tiny.TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        ours, theirs = network(x, 321, text), loaded(x, 321, text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pipe = StableDiffusionPipeline.from_pretrained(
        world.pipeline, unet=loaded, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def drawn(guidance: float) -> torch.Tensor:
        return pipe(
            "a cat",
            num_inference_steps=2,
            guidance_scale=guidance,
            height=16,
            width=16,
            latents=x[:1].clone(),
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images

    # The same two steps by hand with our own network: the pipeline really draws with what was trained.
    parts = load_pipeline(world.pipeline, vae=False)
    told, latent = parts.encode(["a cat"]), x[:1].clone()
    pipe.scheduler.set_timesteps(2)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            said = network(latent, float(timestep), told.tokens)
            latent = pipe.scheduler.step(said, timestep, latent, generator=noise).prev_sample
    torch.testing.assert_close(drawn(1.0), latent, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn(5.0), latent, atol=1e-3)  # guidance does something


def test_our_network_of_the_same_weights_is_the_teacher(world: World) -> None:
    """A student that starts as the whole teacher answers as diffusers' own class does, at any time."""
    ours = NativeDenoiser(load(world.pipeline), world.teacher.schedule)
    batch = world.batches().batch(0)
    x, t = batch.point()
    with torch.no_grad():
        torch.testing.assert_close(
            ours.velocity(x, t, batch.text), world.teacher.velocity(x, t, batch.text), rtol=1e-3, atol=1e-3
        )


def test_our_sdxl_network_is_the_teacher(tmp_path: Path) -> None:
    folder = str(tiny.sdxl(tmp_path / "xl"))
    teacher, parts = load_teacher(folder), load_pipeline(folder, vae=False)
    ours = NativeDenoiser(load(folder), teacher.schedule)
    text = parts.encode(["a cat", "the sea"])
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        torch.testing.assert_close(ours.velocity(x, t, text), teacher.velocity(x, t, text), rtol=1e-3, atol=1e-3)
        null = parts.null().like(text)
        torch.testing.assert_close(ours.velocity(x, t, null), teacher.velocity(x, t, null), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(ours.velocity(x, t, null), ours.velocity(x, t, text), atol=1e-3)


def test_our_pixart_network_is_the_teacher_where_nothing_is_padding(tmp_path: Path) -> None:
    folder = str(tiny.pixart(tmp_path / "pixart"))
    teacher, network = load_teacher(folder), load(folder)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.2, 0.8])
    text = Conditioning(tokens=torch.randn(2, 300, tiny.TEXT_WIDTH, generator=generator))

    def first_half(network: Any, sample: torch.Tensor, timestep: torch.Tensor, text: Conditioning) -> torch.Tensor:
        return network(sample, timestep, text.tokens)[:, :4]

    ours = NativeDenoiser(network, teacher.schedule, first_half)
    with torch.no_grad():
        torch.testing.assert_close(ours.velocity(x, t, text), teacher.velocity(x, t, text), rtol=1e-3, atol=1e-3)
