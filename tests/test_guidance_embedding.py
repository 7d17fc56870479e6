"""The guidance embedding of consistency models: its features, its place in a network, a student that learns in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_world import scene, sd_schedule
from torch import Tensor, nn

from nas import families, formats
from nas.batches import WHOLE, Batch, Part, stream
from nas.blocks.time_embedding import guidance_features
from nas.build import Network, build, example_inputs, with_guidance
from nas.checkpoint import load_network, save_network
from nas.diffusion import Conditioning, FlowDenoiser, NativeDenoiser, Preconditioner
from nas.distill import TrainSettings, train
from nas.errors import NasError
from nas.formats import unet2d_condition
from nas.inherit import inherit
from nas.network import NetworkSpec
from nas.objectives import consistency, objective
from nas.space import load_space
from nas.students import Sampling, draw, told

WIDTH = 8
CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None,
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}


def spec(**changes: Any) -> NetworkSpec:
    return formats.network({**CONFIG, **changes}, "config.json", text_tokens=5)


def network(seed: int = 0, **changes: Any) -> Network:
    return build(spec(**changes), seed=seed).eval()


class TestFeatures:
    def test_published_width(self) -> None:
        found = guidance_features(torch.tensor([7.5]), 256)[0].double()
        frequencies = [math.exp(-math.log(10_000) * j / 127) for j in range(128)]
        expected = [*(math.sin(7500 * f) for f in frequencies), *(math.cos(7500 * f) for f in frequencies)]
        # float32 holds 7500 to half a thousandth, as the published code does.
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-3)

    def test_by_hand(self) -> None:
        found = guidance_features(torch.tensor([0.003]), 4)
        # Two frequencies, 1 and 1 / 10000, of 1000 w = 3; sine first.
        assert found[0].tolist() == pytest.approx([math.sin(3), math.sin(3e-4), math.cos(3), math.cos(3e-4)], rel=1e-5)
        assert found.dtype == torch.float32


class TestNetwork:
    def test_it_must_be_given_and_moves_the_answer(self) -> None:
        made = network(time_cond_proj_dim=WIDTH)
        assert made.spec.inputs["guidance"] == (WIDTH,)
        given = example_inputs(made.spec, batch=2, generator=torch.Generator().manual_seed(0))
        assert list(given) == ["sample", "timestep", "text", "guidance"]
        with torch.no_grad():
            before, after = made(**given), made(**{**given, "guidance": given["guidance"] + 1})
        assert float((before - after).abs().max()) > 1e-4
        with pytest.raises(NasError, match="must be given guidance"):
            made(given["sample"], given["timestep"], given["text"])

    def test_files_without_it_are_as_they_were(self) -> None:
        plain = spec()
        assert "guidance_width" not in plain.input.to_json()
        assert all("guidance_width" not in dict(block.settings) for block in plain.blocks)
        assert "guidance" not in plain.inputs

    def test_round_trips(self, tmp_path: Path) -> None:
        made = network(time_cond_proj_dim=WIDTH)
        assert NetworkSpec.from_json(made.spec.to_json()) == made.spec
        assert unet2d_condition.config(made.spec)["time_cond_proj_dim"] == WIDTH
        back = load_network(save_network(tmp_path / "net.safetensors", made))
        given = example_inputs(made.spec, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(back(**given), made(**given))

    def test_other_families_have_no_place_for_it(self) -> None:
        space = load_space("snapgen_unet")
        assert "guidance" not in families.network(space.reference("snapgen")).inputs


class TestGivenToAnExistingNetwork:
    def test_it_starts_as_the_function_that_it_was(self) -> None:
        plain = network()
        made = with_guidance(plain, WIDTH)
        assert made.spec == spec(time_cond_proj_dim=WIDTH)
        given = example_inputs(made.spec, batch=2, generator=torch.Generator().manual_seed(0))
        old = {name: value for name, value in given.items() if name != "guidance"}
        with torch.no_grad():
            torch.testing.assert_close(made(**given), plain(**old))
        new = set(made.state_dict()) - set(plain.state_dict())
        assert new == {"time_embedding.cond_proj.weight"}
        assert made.state_dict()["conv_in.weight"].data_ptr() != plain.state_dict()["conv_in.weight"].data_ptr()
        assert not made.training

    def test_the_new_weights_learn_from_zero(self) -> None:
        made = with_guidance(network(), WIDTH)
        given = example_inputs(made.spec, batch=2, generator=torch.Generator().manual_seed(0))
        answer: Any = made(**given)
        answer.square().mean().backward()
        weight: Any = made.get_submodule("time_embedding").cond_proj.weight
        assert float(weight.abs().max().detach()) == 0
        assert float(weight.grad.abs().max()) > 0

    def test_twice_or_where_there_is_no_place_it_is_refused(self) -> None:
        with pytest.raises(NasError, match="no time embedding that could take a guidance embedding"):
            with_guidance(with_guidance(network(), WIDTH), WIDTH)

    def test_inheritance_copies_it_or_makes_it_new(self) -> None:
        plain, taking = network(1), network(1, time_cond_proj_dim=WIDTH)
        for teacher, expected in ((taking, "copied"), (plain, "new")):
            state, report = inherit(taking.spec, teacher.spec, teacher.state_dict())
            block = next(b for b in report.blocks if b.name == "time_embedding")
            assert block.tensors["new"] == (expected == "new")
            name = "time_embedding.cond_proj.weight"
            assert torch.equal(state[name], taking.state_dict()[name]) == (expected == "copied")


class Data:
    """Random images with captions."""

    size = 4

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        generator = stream(11, step)
        clean = 0.5 * torch.randn((4, 3, 8, 8), generator=generator)
        text = Conditioning(tokens=torch.randn((4, 5, 6), generator=generator))
        return Batch(text=text, null_text=Conditioning(tokens=torch.zeros(1, 5, 6)), clean=clean).rows(part.rows(4))


class TestConsistency:
    def students(self) -> tuple[nn.Module, nn.Module]:
        return (
            FlowDenoiser(with_guidance(network(), WIDTH), Preconditioner(mean=(0.0,), sd=0.5)),
            NativeDenoiser(with_guidance(network(), WIDTH), sd_schedule()),
        )

    def test_student_and_target_are_told_the_same_w_and_the_teacher_none(self) -> None:
        heard: dict[str, list[Any]] = {"student": [], "target": [], "teacher": []}
        for student in self.students():
            teacher: Any = NativeDenoiser(network(2), sd_schedule()).requires_grad_(False)
            game: Any = objective("consistency", w_min=2.0, w_max=14.0)
            target = game.partners(student, teacher, None)["target"].module
            players = {"student": student, "target": target, "teacher": teacher}
            for name, player in players.items():
                asked: Any = player
                whole = asked.network.forward

                def listen(*given: Any, whole: Any = whole, name: str = name, **more: Any) -> Any:
                    heard[name].append(more.get("guidance"))
                    return whole(*given, **more)

                asked.network.forward = listen
            game.student_loss(scene(student, teacher, Data().batch(0), {"target": target}))
        assert len(heard["student"]) == len(heard["target"]) == 2
        assert all(torch.equal(a, b) for a, b in zip(heard["student"], heard["target"], strict=True))
        assert all(guidance is None for guidance in heard["teacher"])
        assert heard["student"][0].shape == (4, WIDTH)

    def test_training_moves_the_embedding_and_sampling_takes_it(self) -> None:
        for student in self.students():
            teacher = NativeDenoiser(network(2), sd_schedule()).requires_grad_(False)
            game: Any = objective("consistency", w_min=2.0, w_max=14.0)
            settings = TrainSettings(steps=3, batch=4, lr=1e-3, warmup=1)
            found: Any = train(student, Data(), [game], settings, teacher=teacher).average
            weight: Tensor = found.network.get_submodule("time_embedding").cond_proj.weight
            assert float(weight.abs().max()) > 1e-4
            times, unit = game.sampling(found.schedule, 2)
            batch = Data().batch(0)
            pictures = [
                draw(
                    found,
                    Sampling(guidance=guidance, times=times, unit_start=unit),
                    batch.text,
                    batch.null_text,
                    shape=(3, 8, 8),
                    generator=torch.Generator().manual_seed(0),
                )
                for guidance in (3.0, 8.0)
            ]
            assert float((pictures[0] - pictures[1]).abs().max()) > 1e-6

    def test_samplers_and_trainer_mean_the_same_w(self) -> None:
        student: Any = self.students()[0]
        assert consistency.guidance_width(student) == WIDTH
        text = Conditioning(tokens=torch.zeros(2, 5, 6))
        # k = w + 1: a student asked for scale 8 is told what training with w = 7 told it.
        ours = consistency.told(student, text, torch.full((2,), 7.0))
        theirs = told(student, text, 8.0)
        assert ours.guidance is not None
        assert torch.equal(ours.guidance, theirs.guidance)
