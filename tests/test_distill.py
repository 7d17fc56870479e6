"""The training loop on a tiny network: schedule, average, determinism, and resume that changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.batches import WHOLE, Batch, Outputs, Part
from nas.diffusion import Conditioning, FlowDenoiser, Preconditioner, noised, sample_times
from nas.distill import Checkpoints, Progress, TrainSettings, checkpoint_files, predict, train
from nas.errors import NasError
from nas.objectives import Objective, objective

SETTINGS = TrainSettings(steps=30, batch=8, lr=1e-2, warmup=4)
OUTPUT: tuple[Objective, ...] = (objective("output"),)


class Tiny(nn.Module):
    """A convolution, dropout (something random to resume) and a text bias."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.text = nn.Linear(2, 3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(self.dropout(sample)) + self.text(text.mean(1))[:, :, None, None]


class Data:
    """Batches from a fixed linear teacher; counts what was asked of it."""

    def __init__(self, *, spoil_at: int | None = None, die_at: int | None = None) -> None:
        self.spoil_at, self.die_at = spoil_at, die_at
        self.asked: list[int] = []

    size = 8

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        if step == self.die_at:
            raise KeyboardInterrupt
        self.asked.append(step)
        generator = torch.Generator().manual_seed(1000 + step)
        clean, noise = (torch.randn(8, 3, 4, 4, generator=generator) for _ in range(2))
        t = sample_times(8, generator)
        text = torch.randn(8, 5, 2, generator=generator)
        x = noised(clean, noise, t)
        null_velocity = x * 0.5 + (float("nan") if step == self.spoil_at else 0.0)
        velocity = null_velocity + text.mean(1).sum(1).view(-1, 1, 1, 1)
        teacher = Outputs(velocity=velocity, null_velocity=null_velocity)
        null_text = Conditioning(tokens=torch.zeros(1, 5, 2))
        batch = Batch(x=x, t=t, text=Conditioning(tokens=text), teacher=teacher, null_text=null_text)
        return batch.rows(part.rows(8))


def student(*, dropout: float = 0.0, seed: int = 0) -> FlowDenoiser:
    torch.manual_seed(seed)
    return FlowDenoiser(Tiny(dropout=dropout), Preconditioner(mean=(0.0,), sd=0.35))


def weights(denoiser: FlowDenoiser) -> Tensor:
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()])


def test_schedule_rises_holds_and_falls() -> None:
    settings = TrainSettings(steps=100, batch=1, lr=1.0, warmup=10)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[60] == pytest.approx(1.0)
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)
    # A short run warms up over at most a fifth of itself.
    assert TrainSettings(steps=10, batch=1, lr=1.0, warmup=20).learning_rate(1) == 1.0


def test_average_has_no_start_bias_and_a_relative_length() -> None:
    settings = TrainSettings(steps=1, batch=1)
    assert settings.ema_weight(0) == 0
    for steps in (50, 500):
        # The power-function profile averages steps 1..n to n (gamma + 1) / (gamma + 2), whatever n is.
        average = 0.0
        for step in range(steps):
            kept = settings.ema_weight(step)
            average = kept * average + (1 - kept) * (step + 1)
        assert average / steps == pytest.approx(7.94 / 8.94, abs=0.01)


def test_training_learns_and_average_follows() -> None:
    settings = replace(SETTINGS, steps=300)
    fresh = student()
    start = weights(fresh).clone()
    trained = train(fresh, Data(), OUTPUT, settings)
    assert trained.history[-1].loss < 0.3 * trained.history[0].loss
    assert trained.resumed_from is None
    # The average lags behind the last weights, and is the same tensor as neither.
    assert not torch.equal(weights(trained.average), weights(fresh))
    assert float((weights(trained.average) - weights(fresh)).norm()) < 0.3 * float((start - weights(fresh)).norm())
    assert not trained.average.training
    assert float(trained.average.network.calls) == 300  # buffers follow the student


def test_first_average_is_the_first_weights() -> None:
    one = student()
    trained = train(one, Data(), OUTPUT, replace(SETTINGS, steps=1))
    assert torch.equal(weights(trained.average), weights(one))


def test_equal_settings_give_equal_bits_and_the_callers_randomness_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(one := student(dropout=0.5), Data(), OUTPUT, SETTINGS)
    torch.manual_seed(8)
    second = train(student(dropout=0.5), Data(), OUTPUT, SETTINGS)
    assert torch.equal(weights(first.average), weights(second.average))
    other = train(student(dropout=0.5), Data(), OUTPUT, replace(SETTINGS, seed=1))
    assert not torch.equal(weights(first.average), weights(other.average))
    torch.set_rng_state(before)
    state = torch.get_rng_state()
    train(one, Data(), OUTPUT, replace(SETTINGS, steps=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("die_at", [11, 20, 29])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, die_at: int) -> None:
    whole = train(student(dropout=0.5), Data(), OUTPUT, SETTINGS, report_every=5)
    checkpoints = Checkpoints(folder=tmp_path, every=5)
    with pytest.raises(KeyboardInterrupt):
        train(student(dropout=0.5), Data(die_at=die_at), OUTPUT, SETTINGS, checkpoints=checkpoints, report_every=5)
    data = Data()
    # Another initialisation: everything must come from the checkpoint.
    resumed = train(student(dropout=0.5, seed=9), data, OUTPUT, SETTINGS, checkpoints=checkpoints, report_every=5)
    assert resumed.resumed_from == die_at // 5 * 5
    assert data.asked[0] == resumed.resumed_from
    assert torch.equal(weights(resumed.average), weights(whole.average))
    assert [(p.step, p.loss) for p in resumed.history] == [(p.step, p.loss) for p in whole.history]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, every=100)
    first = train(student(), Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)
    data = Data()
    again = train(student(seed=1), data, OUTPUT, SETTINGS, checkpoints=checkpoints)
    assert data.asked == []
    assert again.resumed_from == 30
    assert torch.equal(weights(first.average), weights(again.average))


def test_two_checkpoints_are_kept_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, every=5)
    whole = train(student(), Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)
    files = checkpoint_files(tmp_path)
    assert [f.name for f in files] == ["step-00000030.pt", "step-00000025.pt"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    files[0].write_bytes(files[0].read_bytes()[:100])
    again = train(student(seed=1), Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)
    assert again.resumed_from == 25
    assert torch.equal(weights(again.average), weights(whole.average))
    for path in checkpoint_files(tmp_path):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(NasError, match="none of the checkpoints"):
        train(student(), Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)


def test_resume_refuses_other_settings_and_other_networks(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, every=5)
    train(student(), Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)
    with pytest.raises(NasError, match=r"lr was 0.01 and is now 0.02"):
        train(student(), Data(), OUTPUT, replace(SETTINGS, lr=0.02), checkpoints=checkpoints)
    wide = FlowDenoiser(nn.Conv2d(3, 3, 1), Preconditioner(mean=(0.0,), sd=0.35))
    with pytest.raises(NasError, match="another network"):
        train(wide, Data(), OUTPUT, SETTINGS, checkpoints=checkpoints)
    fresh = train(student(seed=3), Data(), OUTPUT, SETTINGS, checkpoints=replace(checkpoints, resume=False))
    assert fresh.resumed_from is None


def test_progress_lines_are_means_since_the_line_before() -> None:
    each: list[float] = []
    seen: list[int] = []

    def every(history: Sequence[Progress]) -> None:
        each.append(history[-1].loss)

    def sparse(history: Sequence[Progress]) -> None:
        seen.append(history[-1].step)

    train(student(), Data(), OUTPUT, SETTINGS, on_progress=every, report_every=1)
    lines = train(student(), Data(), OUTPUT, SETTINGS, on_progress=sparse, report_every=12).history
    assert seen == [12, 24, 30]
    assert lines[1].loss == pytest.approx(sum(each[12:24]) / 12)
    assert lines[2].loss == pytest.approx(sum(each[24:]) / 6)
    assert lines[1].terms == {"output": pytest.approx(lines[1].loss)}
    assert lines[1].lr == SETTINGS.learning_rate(23)


def test_a_loss_that_is_not_finite_is_an_error_and_never_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NasError, match="the loss output is not finite at step 8 of 30") as error:
        train(student(), Data(spoil_at=7), OUTPUT, SETTINGS, checkpoints=Checkpoints(folder=tmp_path, every=10))
    assert error.value.hint is not None
    assert checkpoint_files(tmp_path) == []


def test_both_texts_go_through_in_one_pass() -> None:
    denoiser, batch = student(), Data().batch(0)
    assert batch.null_text is not None
    both = predict(denoiser, batch, with_null=True)
    assert float(denoiser.network.calls) == 1
    assert both.null_velocity is not None
    torch.testing.assert_close(both.velocity, denoiser.velocity(batch.x, batch.t, batch.text))
    null_text = batch.null_text.like(batch.text)
    torch.testing.assert_close(both.null_velocity, denoiser.velocity(batch.x, batch.t, null_text))
    assert predict(denoiser, batch, with_null=False).null_velocity is None


def test_text_objective_trains_the_text_path() -> None:
    objectives = (objective("output"), objective("text"))
    trained = train(student(), Data(), objectives, replace(SETTINGS, steps=300))
    assert set(trained.history[0].terms) == {"output", "text"}
    assert trained.history[-1].terms["text"] < 0.2 * trained.history[0].terms["text"]


def test_clipping_bounds_the_first_step() -> None:
    # AdamW's first step does not depend on the gradient's size, so clipping is seen from the second on.
    free = train(student(), Data(), OUTPUT, replace(SETTINGS, steps=3, clip=1e9))
    tight = train(student(), Data(), OUTPUT, replace(SETTINGS, steps=3, clip=1e-12))
    assert not torch.equal(weights(free.average), weights(tight.average))


def test_bfloat16_trains_nearly_alike() -> None:
    exact = train(student(), Data(), OUTPUT, SETTINGS)
    half = train(student(), Data(), OUTPUT, replace(SETTINGS, precision="bf16"))
    assert half.history[-1].loss == pytest.approx(exact.history[-1].loss, rel=0.05)
    assert not torch.equal(weights(exact.average), weights(half.average))


@pytest.mark.parametrize(("steps", "batch"), [(0, 8), (10, 0)])
def test_settings_are_checked(steps: int, batch: int) -> None:
    with pytest.raises(NasError, match="steps >= 1, batch >= 1"):
        TrainSettings(steps=steps, batch=batch)


def test_no_objective_is_an_error() -> None:
    with pytest.raises(NasError, match="at least one objective"):
        train(student(), Data(), (), SETTINGS)
