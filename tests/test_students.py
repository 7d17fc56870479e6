"""Students on disk: what comes back is what was saved, and it is sampled as it wants to be."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.blocks.time_embedding import guidance_features
from nas.build import build
from nas.checkpoint import save_network
from nas.diffusion import Conditioning, FlowDenoiser, NativeDenoiser, Preconditioner, Schedule, sample, sample_few
from nas.errors import NasError, UsageError
from nas.network import InputShape, NetworkSpec, block
from nas.students import Sampling, TrainedStudent, draw, load_student, save_student, takes_guidance, told

SHAPE = (12, 8, 8)
FEW = Sampling(times=(1.0, 0.75, 0.4), unit_start=False)


def spec() -> NetworkSpec:
    """A stem, a time embedding, one residual block, a head."""
    blocks = (
        block("conv_in", "stem", {"x": SHAPE}, in_channels=12, out_channels=8),
        block("time_embedding", "time_embedding", {"timestep": ()}, writes=("temb",), frequency_width=8, time_width=16),
        block(
            "resnet",
            "resnet",
            {"x": (8, 8, 8), "temb": (16,)},
            in_channels=8,
            out_channels=8,
            time_width=16,
            norm_groups=4,
        ),
        block("head", "head", {"x": (8, 8, 8)}, in_channels=8, out_channels=12, norm_groups=4),
    )
    return NetworkSpec(name="tiny", input=InputShape(channels=12, height=8, width=8), blocks=blocks)


def network(seed: int = 0) -> nn.Module:
    made = build(spec(), seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05)
    return made


def flow() -> FlowDenoiser:
    return FlowDenoiser(network(), Preconditioner(mean=(0.1, -0.2, 0.3), sd=0.4), patch=2).eval()


def native(prediction: Any = "noise") -> NativeDenoiser:
    alpha_bar = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    return NativeDenoiser(network(), Schedule(prediction=prediction, alpha_bar=alpha_bar)).eval()


def text(rows: int = 2) -> Conditioning:
    return Conditioning(tokens=torch.zeros(rows, 1, 1))


def velocity(denoiser: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser.velocity(x, torch.tensor([0.3, 0.9]), text())


class NoText(nn.Module):
    """Our little network takes no text; denoisers hand one over."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        out: Tensor = self.inner(sample, timestep)
        return out


def test_a_flow_student_comes_back(tmp_path: Path) -> None:
    path = save_student(tmp_path / "network.safetensors", flow(), FEW, {"teacher": "embedded", "stage": 2})
    for source in (path, tmp_path):
        found = load_student(source)
        assert isinstance(found.denoiser, FlowDenoiser)
        assert found.denoiser.preconditioner == flow().preconditioner
        assert found.denoiser.patch == 2
        assert found.sampling == FEW
        assert found.about == {"teacher": "embedded", "stage": 2}
        assert found.path == path
        assert not found.denoiser.training
        ours, theirs = flow().network.state_dict(), found.denoiser.network.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "clean"])
def test_a_student_with_a_schedule_answers_the_same(tmp_path: Path, prediction: Any) -> None:
    saved = native(prediction)
    path = save_student(tmp_path / "network.safetensors", saved, Sampling(), {})
    found = load_student(path).denoiser
    assert isinstance(found, NativeDenoiser)
    assert found.schedule.prediction == prediction
    assert found.schedule.alpha_bar is not None
    assert torch.equal(found.schedule.alpha_bar, saved.schedule.alpha_bar)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    saved.network, found.network = NoText(saved.network), NoText(found.network)
    assert torch.equal(velocity(found, x), velocity(saved, x))


def test_a_flow_without_preconditioner_keeps_its_schedule(tmp_path: Path) -> None:
    path = save_student(tmp_path / "network.safetensors", NativeDenoiser(network(), Schedule()), Sampling(), {})
    schedule = load_student(path).denoiser.schedule
    assert schedule.alpha_bar is None
    assert schedule.prediction == "velocity"


def test_choices_of_times_come_back(tmp_path: Path) -> None:
    sampling = replace(FEW, choices=((0.9,), (1.0, 0.5)))
    path = save_student(tmp_path / "network.safetensors", flow(), sampling, {})
    assert load_student(path).sampling == sampling


def test_what_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NasError, match="behind a denoiser, got Linear"):
        save_student(tmp_path / "network.safetensors", nn.Linear(1, 1), Sampling(), {})
    other = save_network(tmp_path / "other.safetensors", build(spec(), seed=0), {})
    with pytest.raises(NasError, match="not a network that nas train wrote"):
        load_student(other)
    with pytest.raises(NasError, match="missing"):
        load_student(tmp_path / "missing.safetensors")


def test_a_few_step_student_knows_its_numbers_of_steps() -> None:
    assert FEW.calls == 3
    assert FEW.at(3) == FEW
    assert FEW.at(2).times == (1.0, 0.75)
    assert FEW.at(1).unit_start is False
    with pytest.raises(UsageError, match=r"cannot be sampled in 4; possible are 1, 2, 3"):
        FEW.at(4)
    more = replace(FEW, choices=((0.9,), (1.0, 0.8, 0.6, 0.4, 0.2)))
    assert more.at(1).times == (0.9,)
    assert more.at(5).times == (1.0, 0.8, 0.6, 0.4, 0.2)
    assert more.at(2).times == (1.0, 0.75)
    with pytest.raises(UsageError, match=r"possible are 1, 2, 3, 5"):
        more.at(4)


def test_any_number_of_euler_steps_will_do() -> None:
    assert Sampling(steps=20).calls == 20
    assert asdict(Sampling(guidance=3.0).at(7)) == asdict(Sampling(guidance=3.0, steps=7))
    with pytest.raises(UsageError, match="at least 1 step, got 0"):
        Sampling().at(0)


class Echo:
    """Answers half of what it sees, less where a caption is given, and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        self.asked.append((len(x), float(t[0])))
        return x * (0.5 - 0.2 * text.tokens.mean((1, 2)).view(-1, 1, 1, 1))


def drawn(sampling: Sampling) -> tuple[Tensor, Echo]:
    echo = Echo()
    caption = Conditioning(tokens=torch.ones(2, 1, 1))
    generator = torch.Generator().manual_seed(4)
    return draw(echo, sampling, caption, text(1), shape=(3, 4, 4), generator=generator), echo


def test_a_few_step_student_is_drawn_at_its_times() -> None:
    images, echo = drawn(FEW)
    assert echo.asked == [(2, pytest.approx(t)) for t in FEW.times]
    caption = Conditioning(tokens=torch.ones(2, 1, 1))
    generator = torch.Generator().manual_seed(4)
    wanted = sample_few(Echo(), caption, times=FEW.times, shape=(3, 4, 4), generator=generator, unit_start=False)
    assert torch.equal(images, wanted)
    # Where it starts is its own business: noise of variance one, or a zero image noised.
    assert not torch.equal(drawn(replace(FEW, times=(0.75, 0.4)))[0], drawn(Sampling(times=(0.75, 0.4)))[0])


def test_any_other_is_drawn_by_euler_steps_with_guidance() -> None:
    images, echo = drawn(Sampling(steps=3, guidance=2.0))
    assert [rows for rows, _ in echo.asked] == [4, 4, 4]
    caption = Conditioning(tokens=torch.ones(2, 1, 1))
    generator = torch.Generator().manual_seed(4)
    wanted = sample(Echo(), caption, text(1), shape=(3, 4, 4), generator=generator, steps=3, guidance=2.0)
    assert torch.equal(images, wanted)
    assert [rows for rows, _ in drawn(Sampling(steps=3, guidance=1.0))[1].asked] == [2, 2, 2]


def test_both_kinds_start_from_the_same_noise() -> None:
    class Noise(Echo):
        def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            self.first = getattr(self, "first", x[:2].clone())
            return x

    starts = []
    for sampling in (Sampling(steps=2), Sampling(times=(1.0, 0.5))):
        noise = Noise()
        draw(noise, sampling, text(), text(1), shape=(3, 4, 4), generator=torch.Generator().manual_seed(9))
        starts.append(noise.first)
    assert torch.equal(*starts)


def test_loading_gives_a_record(tmp_path: Path) -> None:
    found = load_student(save_student(tmp_path / "a.safetensors", flow(), Sampling(), {}))
    assert isinstance(found, TrainedStudent)
    assert isinstance(found.denoiser, nn.Module)


def test_a_network_that_takes_guidance_is_told_it() -> None:
    plain = flow()
    assert takes_guidance(plain) == 0
    assert told(plain, text(), 3.0).guidance is None

    plain.network.spec = SimpleNamespace(inputs={"guidance": (8,)})  # type: ignore[assignment]
    assert takes_guidance(plain) == 8
    embedded = told(plain, text(), 3.0).guidance
    assert embedded is not None
    # LCM counts from 0: w = k - 1.
    assert torch.equal(embedded, guidance_features(torch.tensor([2.0, 2.0]), 8))
    # Sampled by Euler steps, guidance is applied outside: inside there is none, with a caption and without.
    seen: list[Tensor] = []

    class Spy(FlowDenoiser):
        def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            assert text.guidance is not None
            seen.append(text.guidance)
            return x

    spy = Spy(plain.network, plain.preconditioner)
    draw(spy, Sampling(steps=1), text(), text(1), shape=(3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], guidance_features(torch.zeros(4), 8))
    draw(
        spy, replace(FEW, guidance=4.0), text(), text(1), shape=(3, 16, 16), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(seen[-1], guidance_features(torch.full((2,), 3.0), 8))
    already = Conditioning(tokens=torch.zeros(2, 1, 1), guidance=torch.ones(2, 8))
    assert told(plain, already, 3.0) is already
