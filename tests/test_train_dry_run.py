"""`--dry-run`: parameters, memory and speed from real steps, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_lesson import candidate
from torch import nn
from train_cases import small, two_stages

from nas.build import build
from nas.checkpoint import load_network
from nas.errors import NasError, UsageError
from nas.features import body
from nas.teachers import load_teacher
from nas.train import DryRun, Machine, Subject, dry_run, load_recipe, train_recipe
from nas.train.rehearsal import _counted


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.train.rehearsal._STEPS", 2)


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def said(teacher: str, tmp_path: Path) -> DryRun:
    return dry_run(two_stages(tmp_path), Subject(candidate=None, teacher=teacher))


def test_every_stage_is_forecast(said: DryRun, teacher: str) -> None:
    first, second = said.stages
    own = params(body(load_teacher(teacher)))
    assert (first.name, first.steps, first.params) == ("distil", 4, own)
    assert second.params < first.params
    assert first.teacher_params == params(load_teacher(teacher))
    assert first.steps_per_second > 0
    assert said.seconds == pytest.approx(sum(stage.steps / stage.steps_per_second for stage in said.stages))
    assert "training times are uniform over all that the teacher knows" in first.data
    assert second.data == "prompts of the task shapes, drawn at every step"
    assert first.loss is not None
    assert said.inherited == 1.0


def test_memory_is_the_stated_sum(said: DryRun, teacher: str) -> None:
    first, second = said.stages
    learning = first.params
    memory = first.memory
    assert (memory.weights, memory.gradients, memory.optimiser) == (4 * learning, 4 * learning, 8 * learning)
    assert memory.averages == 4 * learning
    assert memory.teacher == 4 * first.teacher_params
    assert memory.total == sum(
        (memory.weights, memory.gradients, memory.optimiser, memory.averages, memory.teacher, memory.activations)
    )
    assert memory.measured is None  # a CPU
    # In the second stage a copy of the teacher plays too, whose denoiser alone learns.
    assert second.memory.weights == 4 * (second.params + first.teacher_params)
    assert second.memory.gradients == 4 * (second.params + first.params)
    assert second.memory.averages == 4 * second.params


def test_activations_are_what_autograd_keeps() -> None:
    class Run:
        def __init__(self, network: nn.Module) -> None:
            player = type("Player", (), {"module": network})()
            self.players, self.teacher = {"student": player}, None

    network = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 1))
    x = torch.randn(7, 10)
    with _counted(Run(network)) as kept:  # type: ignore[arg-type]
        for _ in range(3):  # freed by each backward pass, so not added up
            network(x).sum().backward()
    hidden, given = 4 * 7 * 100, 4 * 7 * 10
    # The input, and the hidden values after the ReLU, whose backward pass and the next layer's share them.
    assert kept.peak == given + hidden


def test_checkpointed_blocks_keep_less(teacher: str) -> None:
    whom = Subject(candidate=candidate(), teacher=teacher)
    plain = dry_run(small(), whom).stages[0].memory
    spared = dry_run(small(), whom, machine=Machine(gradient_checkpointing=True)).stages[0].memory
    assert spared.activations < 0.6 * plain.activations
    assert spared.weights == plain.weights


def test_nothing_is_left_behind(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    whom = Subject(candidate=candidate(), teacher=teacher)
    dry_run(small(), whom)
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    # And the run itself is not another one for having been rehearsed.
    one = train_recipe(small(steps=2), whom, tmp_path / "after")
    again = train_recipe(small(steps=2), whom, tmp_path / "again")
    ours, theirs = (load_network(found.weights).state_dict() for found in (one, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_run_would_refuse_is_refused(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a network to train"):
        dry_run(small(), Subject(candidate=None, teacher=teacher))
    with pytest.raises(NasError, match="a batch of 5 cannot be cut into 2 equal parts"):
        dry_run(small("batch=5", "accumulate=2"), Subject(candidate=candidate(), teacher=teacher))


# The same gradients, with activations computed again


def test_checkpointed_blocks_give_the_same_gradients(teacher: str) -> None:
    spec = body(load_teacher(teacher)).spec
    inputs = torch.randn(2, 48, 8, 8), torch.tensor([10.0, 700.0]), torch.randn(2, 12, 8)
    found = []
    for checkpointed in (False, True):
        network = build(spec, seed=0)
        network.checkpoint_blocks = checkpointed
        features = network(*inputs, return_features=["mid_block.resnets.0"])
        (features[0].square().mean() + features[1]["mid_block.resnets.0"].square().mean()).backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(grad is not None and bool(grad.any()) for grad in found[0].values())
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_checkpointed_blocks_train_to_the_same_weights(teacher: str, tmp_path: Path) -> None:
    whom = Subject(candidate=candidate(), teacher=teacher)
    ours, theirs = (
        load_network(
            train_recipe(
                small(steps=2), whom, tmp_path / str(spare), machine=Machine(gradient_checkpointing=spare)
            ).weights
        ).state_dict()
        for spare in (False, True)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is compiled


def test_networks_are_compiled_where_no_hook_looks_into_them(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    machine = Machine(compiled=True)
    whom = Subject(candidate=candidate(), teacher=teacher)
    assert dry_run(small(), whom, machine=machine).stages[0].compiled
    assert len(compiled) == 2  # student and teacher
    compiled.clear()
    # A loss that compares layers, then a game, which may look into its teacher.
    looking = load_recipe("koala-tiny", ["batch=4"], steps=2)
    assert not dry_run(looking, Subject(candidate=None, teacher=teacher), machine=machine).stages[0].compiled
    assert not compiled
    first, second = dry_run(two_stages(tmp_path), Subject(candidate=None, teacher=teacher), machine=machine).stages
    assert first.compiled
    assert second.compiled
    assert len(compiled) == 3
    assert not dry_run(small(), whom).stages[0].compiled
