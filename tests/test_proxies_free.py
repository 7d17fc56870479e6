"""Training-free scores and baselines: closed forms of known networks, and what they say of candidates."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_lesson import candidate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas import families, targets
from nas.batches import Batch, Outputs
from nas.bench import Bench, ProxySettings
from nas.blocks.transformer import GEGLU
from nas.build import build, example_inputs
from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.proxies import grad_norm, macs, naswot, params, proxy, synflow
from nas.proxies._free import Replaced, awake, score_of

TINY: dict[str, Any] = {"width_divisor": 32, "norm_groups": 2, "steps": 1, "batch": 4, "held_rows": 4}
FREE = ("synflow", "naswot", "grad_norm")
WIDER = {"width_0": 256}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        targets._load.cache_clear()
        yield
    targets._load.cache_clear()


def bench(teacher: str, name: str, **changes: Any) -> Bench:
    return Bench(teacher, ProxySettings(proxy=name, **{**TINY, **changes}))


# All of them


@pytest.mark.parametrize("name", FREE)
def test_a_score_is_of_candidate_and_bench_alone(teacher: str, name: str) -> None:
    one = bench(teacher, name)
    first = proxy(name).score(candidate(), one)
    torch.manual_seed(12)
    again = proxy(name).score(*pickle.loads(pickle.dumps((candidate(), one))))
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)
    assert first.params == sum(p.numel() for p in one.student(one.spec(candidate()), 0).parameters())
    assert first.text is None


@pytest.mark.parametrize("name", FREE)
def test_seeds_are_of_the_initialisation(teacher: str, name: str) -> None:
    both = proxy(name).score(candidate(), bench(teacher, name, seeds=(0, 1)))
    other = proxy(name).score(candidate(), bench(teacher, name, seeds=(1,)))
    assert both.seeds[0] != both.seeds[1] == other.value
    assert both.value == pytest.approx(sum(both.seeds) / 2)
    assert both.value_sd > 0


@pytest.mark.parametrize("name", FREE)
def test_what_cannot_be_scored_is_said(teacher: str, name: str) -> None:
    one = bench(teacher, name)
    with pytest.raises(NasError, match=r"naswot of snapgen_unet#\w+ is nan: it cannot be scored so"):
        score_of(candidate(), one, "naswot", lambda fresh: math.nan)
    with pytest.raises(NasError, match="head width 64 cannot be divided"):
        proxy(name).score(candidate(), bench(teacher, name, width_divisor=48))


def test_sleeping_ends_are_woken_for_the_scored_copy_only(teacher: str) -> None:
    one = bench(teacher, "grad_norm")
    fresh = one.student(one.spec(candidate()), 0)
    before = {name: each.clone() for name, each in fresh.named_parameters()}
    awake(fresh, seed=0)
    assert all(torch.equal(each, before[name]) for name, each in fresh.named_parameters())  # these UNets are awake
    end = fresh.get_parameter("network.head.conv_out.weight")
    with torch.no_grad():
        end.zero_()
    asleep = grad_norm.gradient_norm(fresh, one)
    stem = fresh.get_parameter("network.conv_in.weight")
    assert stem.grad is not None
    assert not stem.grad.any()
    awake(fresh, seed=0)
    # torch's own initialisation of a layer of this fan-in is uniform within 1 / sqrt(fan-in).
    assert 0.9 < float(end.detach().abs().max()) * math.sqrt(end[0].numel()) <= 1
    assert grad_norm.gradient_norm(fresh, one) > asleep
    assert stem.grad is not None
    assert stem.grad.any()


# synflow


def test_synflow_is_its_closed_form() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 2))
    first, second = network[0].weight.detach().abs().double(), network[3].weight.detach().abs().double()
    bias = network[0].bias.detach().abs().double()
    through = first.sum(1)  # what an input of ones gives behind the first layer, without its bias
    expected = float((second @ through).sum() + (second @ (through + bias)).sum())
    assert synflow.synaptic_flow(network, {"input": torch.ones(1, 3).double()}) == pytest.approx(math.log10(expected))


def test_synflow_opens_gates_and_attends_evenly() -> None:
    torch.manual_seed(0)
    gate = GEGLU(3, 4)
    hidden = gate.proj.weight.detach()[:4].abs().double()
    given = {"input": torch.ones(1, 2, 3).double()}
    assert synflow.synaptic_flow(nn.Sequential(gate), given) == pytest.approx(math.log10(2 * float(hidden.sum())))

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)

        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            query, value = self.q(x), self.v(text)
            return nn.functional.scaled_dot_product_attention(query, value, value)

    reader = Reader()
    values = float(reader.v.weight.detach().abs().double().sum())
    given = {"x": torch.ones(1, 4, 3).double(), "text": torch.ones(1, 7, 3).double()}
    assert synflow.synaptic_flow(reader, given) == pytest.approx(math.log10(4 * values))


def test_synflow_grows_with_depth_and_width(teacher: str) -> None:
    one = bench(teacher, "synflow")
    plain = synflow.score(candidate(), one).value
    assert synflow.score(candidate(**WIDER), one).value > plain
    assert synflow.score(candidate(resnets_0=2), one).value > plain + 1  # exponential in depth


# naswot


def test_naswot_of_two_samples_is_its_closed_form(teacher: str) -> None:
    codes = torch.zeros(2, 10, dtype=torch.bool)
    codes[0, :3] = True
    # K = [[10, 7], [7, 10]]
    assert naswot.log_determinant(codes) == pytest.approx(math.log(100 - 49))
    assert naswot.log_determinant(codes[:1].expand(2, -1)) == -math.inf

    class Network(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(sample) + nn.functional.gelu(-sample[:, :1])

    one = bench(teacher, "naswot", batch=2)
    denoiser = FlowDenoiser(Network(), one.embedded.preconditioner, patch=4)
    found = naswot.codes_of(denoiser, one)
    batch = one.data.batch(0)
    seen = denoiser.preconditioner.network_input(*batch.point())
    folded = nn.functional.pixel_unshuffle(seen, 4) + (0 if batch.text.layout is None else batch.text.layout)
    wanted = torch.cat([folded.flatten(1) > 0, (folded[:, :1] < 0).flatten(1)], dim=1)
    assert torch.equal(found, wanted)
    units, apart = wanted.shape[1], int((wanted[0] != wanted[1]).sum())
    assert naswot.log_determinant(found) == pytest.approx(math.log(units**2 - (units - apart) ** 2))


def test_naswot_is_higher_for_a_wider_candidate(teacher: str) -> None:
    one = bench(teacher, "naswot")
    assert naswot.score(candidate(**WIDER), one).value > naswot.score(candidate(), one).value


def test_naswot_sees_every_activation(teacher: str) -> None:
    one = bench(teacher, "naswot")
    spec = one.spec(candidate())
    resnets = [b for b in spec.blocks if b.kind == "resnet"]
    pixels = {b.name: b.input("x")[1] * b.input("x")[2] for b in spec.blocks if b.kind != "time_embedding"}
    units = sum(
        pixels[b.name] * (int(b.setting("in_channels")) + int(b.setting("out_channels"))) + int(b.setting("time_width"))
        for b in resnets
    )
    units += sum(
        pixels[b.name] * int(b.setting("channels")) * int(b.setting("ffn_ratio")) * int(b.setting("depth"))
        for b in spec.blocks
        if b.kind == "transformer"
    )
    head, time = spec.blocks[-1], next(b for b in spec.blocks if b.kind == "time_embedding")
    units += pixels["head"] * int(head.setting("in_channels")) + int(time.setting("time_width"))
    assert naswot.codes_of(one.student(spec, 0), one).shape == (4, units)


def test_replaced_functions_come_back() -> None:
    x = torch.tensor([-1.0, 2.0])
    with Replaced({nn.functional.silu: lambda function, arguments, keywords: arguments[0] * 3}):
        assert torch.equal(nn.functional.silu(x), x * 3)
        assert torch.equal(nn.SiLU()(x), x * 3)
    assert torch.equal(nn.functional.silu(x), x * x.sigmoid())


# grad_norm


def test_gradient_norm_is_its_closed_form(teacher: str) -> None:
    """Of a network that outputs one number everywhere, and of one that adds none."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.5))
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(sample) + self.level

    one = bench(teacher, "grad_norm", text_weight=0.0, null_every=0)
    denoiser = FlowDenoiser(Network(), one.embedded.preconditioner, patch=4)
    batch = one.data.batch(0)
    scale = denoiser.preconditioner.output_scale(*batch.point())
    assert batch.teacher is not None
    error = denoiser.preconditioner.skip(*batch.point()) + 0.5 * scale - batch.teacher.velocity
    # d/da mean((skip + s a - v)^2) = mean(2 s (skip + s a - v))
    assert grad_norm.gradient_norm(denoiser, one) == pytest.approx(abs(float((2 * scale * error).mean())), rel=1e-4)


def test_the_loss_is_the_benchs(teacher: str) -> None:
    plain, texted = (bench(teacher, "grad_norm", text_weight=weight, null_every=0) for weight in (0.0, 2.0))
    fresh = plain.student(plain.spec(candidate()), 0)
    batch: Batch = plain.data.batch(0)
    said = Outputs(velocity=fresh.velocity(*batch.point(), batch.text))
    assert batch.teacher is not None
    mse = float((said.velocity - batch.teacher.velocity).detach().square().mean())
    plainly, with_text = (float(grad_norm.loss(fresh, batch, each).detach()) for each in (plain, texted))
    assert plainly == pytest.approx(mse, rel=1e-4)
    assert with_text != pytest.approx(mse, rel=1e-3)


# Baselines


def test_baselines_are_of_the_full_size(teacher: str) -> None:
    network = build(families.network(candidate()), "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**example_inputs(network.spec, device="meta"))
    exact = {params: sum(p.numel() for p in network.parameters()), macs: counter.get_total_flops() / 2}
    for plugin, count in exact.items():
        one = bench(teacher, plugin.__name__.rpartition(".")[2])
        found = plugin.score(candidate(), one)
        assert found.value == pytest.approx(math.log10(count), abs=1e-4)
        assert found.seeds == (found.value,)
        assert replace(plugin.score(*pickle.loads(pickle.dumps((candidate(), one)))), seconds=found.seconds) == found
