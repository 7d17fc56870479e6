"""Decoder distillation: the contract of a game, its parts by hand, and a decoder that learns to paint."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian_world import draws
from tiny_pipelines import seeded
from tiny_pipelines import vae as tiny_vae
from torch import Tensor, nn
from torch.nn import functional

from nas.batches import WHOLE, Batch, Part, stream
from nas.build import build
from nas.diffusion import FLOW, Conditioning
from nas.distill import TrainSettings, train
from nas.errors import NasError, UsageError
from nas.families import network_of
from nas.judge import psnr_db
from nas.network import InputShape
from nas.objectives import Scene, objective
from nas.teachers.decoders import Decoder, Encoded, VaeDecoder
from nas.teachers.vae import Scaling, Vae

ROWS = 4
SIDE = 8  # of the latent; pictures are twice that
FEATURES = {"feature_weight": 0.5, "stages": (0,)}
CRITIC = {"adversarial_weight": 0.1, "critic_width": 8, "critic_layers": 2}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"distance": "mse", "teacher_weight": 0.5, "image_weight": 2.0},
    FEATURES,
    CRITIC,
    {**FEATURES, **CRITIC, "image_weight": 1.0},
)
EACH = pytest.mark.parametrize("settings", VARIANTS, ids=["-".join(each) or "plain" for each in VARIANTS])


def smooth(count: int, generator: torch.Generator) -> Tensor:
    """Random pictures that are worth compressing."""
    coarse = torch.randn((count, 3, 4, 4), generator=generator)
    return functional.interpolate(coarse, size=2 * SIDE, mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def teacher() -> Vae:
    return Vae(tiny_vae(), "tiny", "0").requires_grad_(False).eval()


def student(seed: int = 0, width: int = 6, **choices: Any) -> Decoder:
    """A separable decoder of two stages, narrower than the teacher's."""
    settings = {"style": "separable", "mid": "none", "expansion": 1, "stages": 2, "norm_groups": 2}
    sizes = {f"{name}_{stage}": value for stage in (0, 1) for name, value in (("width", width), ("resnets", 1))}
    shape = InputShape(channels=4, height=SIDE, width=SIDE)
    spec = network_of("decoder", {**settings, **sizes, **choices}, shape, name="tiny", where="test")
    return Decoder(build(spec, seed=seed), Scaling(kind="AutoencoderKL", factor=0.18215))


def data(teacher: Vae, seed: int = 0) -> Encoded:
    return Encoded(vae=teacher, pictures=smooth, size=ROWS, seed=seed)


class Table:
    """The game set up: its players and one turn."""

    def __init__(self, teacher: Vae, settings: dict[str, Any], *, own: Decoder | None = None) -> None:
        self.game: Any = objective("reconstruction", **settings)
        self.student = own or student()
        self.teacher = Decoder(VaeDecoder(teacher.network), teacher.scaling)
        self.batches = data(teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.game.partners(self.student, self.teacher, self.batches.batch(0))
        self.partners: dict[str, Any] = {name: partner.module for name, partner in made.items()}
        self.made = made

    def scene(self, *, part: Part = WHOLE, batch: Batch | None = None, step: int = 0) -> Scene:
        students: Any = self.student
        teachers: Any = self.teacher
        return Scene(
            student=students,
            teacher=teachers,
            partners=self.partners,
            batch=batch or self.batches.batch(1, part),
            draws=draws(ROWS, 5, part),
            schedule=FLOW,
            step=step,
        )

    @property
    def losing(self) -> tuple[str, ...]:
        return (*self.game.turns(0), "")

    def terms(self, who: str, **scene: Any) -> dict[str, Tensor]:
        for name, partner in self.partners.items():
            partner.requires_grad_(name == who)
        self.student.requires_grad_(not who)
        turn = self.scene(**scene)
        return self.game.partner_loss(who, turn) if who else self.game.student_loss(turn)

    def loss(self, who: str, **scene: Any) -> Tensor:
        return torch.stack(list(self.terms(who, **scene).values())).sum()


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


# The contract


@EACH
def test_every_turn_is_finite_and_moves_its_own_player_only(teacher: Vae, settings: dict[str, Any]) -> None:
    table = Table(teacher, settings)
    for who in table.losing:
        for module in (table.student, table.teacher, *table.partners.values()):
            module.zero_grad(set_to_none=True)
        terms = table.terms(who)
        assert all(term.shape == () and bool(term.isfinite()) for term in terms.values())
        torch.stack(list(terms.values())).sum().backward()
        player = table.partners[who] if who else table.student
        others = [m for m in (table.student, table.teacher, *table.partners.values()) if m is not player]
        assert any(bool(g.any()) for g in gradients(player))
        assert not any(gradients(other) for other in others)


@EACH
def test_a_batch_is_the_mean_of_its_parts(teacher: Vae, settings: dict[str, Any]) -> None:
    table = Table(teacher, settings)
    for who in table.losing:
        whole = table.loss(who)
        parts = [table.loss(who, part=Part(index=i, count=ROWS)) for i in range(ROWS)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-6)


@EACH
def test_bfloat16_is_near_and_float64_nearer(teacher: Vae, settings: dict[str, Any]) -> None:
    table = Table(teacher, settings)
    for who in table.losing:
        plain = float(table.loss(who).detach())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = table.terms(who)
        assert all(term.dtype == torch.float32 for term in terms.values())
        assert float(torch.stack(list(terms.values())).sum().detach()) == pytest.approx(plain, rel=0.1, abs=0.02)
        double = copy.deepcopy(table)
        for module in (double.student, double.teacher, *double.partners.values()):
            module.double()
        batch = double.batches.batch(1)
        assert batch.clean is not None
        assert batch.images is not None
        batch = replace(batch, clean=batch.clean.double(), images=batch.images.double())
        exact = double.loss(who, batch=batch)
        assert exact.dtype == torch.float64
        assert float(exact.detach()) == pytest.approx(plain, rel=1e-4, abs=1e-6)


# Its parts


@pytest.mark.parametrize("distance", ["l1", "mse"])
def test_the_pictures_distance_by_hand(teacher: Vae, distance: str) -> None:
    table = Table(teacher, {"distance": distance, "teacher_weight": 0.5, "image_weight": 2.0})
    batch = table.batches.batch(1)
    assert batch.clean is not None
    assert batch.images is not None
    with torch.no_grad():
        painted = table.student(batch.clean)
        wanted = teacher.network.decode(batch.clean / teacher.scaling.factor).sample
    measure = functional.l1_loss if distance == "l1" else functional.mse_loss
    terms = table.terms("")
    assert float(terms["teacher"].detach()) == pytest.approx(0.5 * float(measure(painted, wanted)), rel=1e-5)
    assert float(terms["image"].detach()) == pytest.approx(2.0 * float(measure(painted, batch.images)), rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: Vae) -> None:
    twin = Decoder(VaeDecoder(copy.deepcopy(teacher.network)), teacher.scaling)
    table = Table(teacher, FEATURES, own=twin)
    # Maps of equal width begin unprojected, so equal decoders differ nowhere.
    assert all(float(term.detach()) == pytest.approx(0, abs=1e-10) for term in table.terms("").values())


def test_stages_are_matched_at_their_size(teacher: Vae) -> None:
    matching = Table(teacher, FEATURES).partners["projection"]
    # Of both the residual block that ends stage 0, before the doubling.
    assert matching.student == ("up_blocks.0.resnets.0",)
    assert matching.teacher == ("vae.decoder.up_blocks.0.resnets.1",)
    own = student(style="taesd")
    assert Table(teacher, FEATURES, own=own).partners["projection"].student == ("layers.2",)


def test_a_projection_makes_up_for_another_basis(teacher: Vae) -> None:
    """Turned maps are as good as the teacher's once the projection has learnt the turn."""
    torch.manual_seed(0)
    table = Table(teacher, FEATURES)
    matching = table.partners["projection"]
    optimiser = torch.optim.AdamW(matching.parameters(), lr=0.05, weight_decay=0.0)
    wanted = torch.randn(ROWS, 8, SIDE, SIDE)
    turned = torch.einsum("oc,bchw->bohw", torch.randn(6, 8), wanted)
    before = after = math.nan
    for step in range(150):
        optimiser.zero_grad()
        loss = matching.error({matching.student[0]: turned}, {matching.teacher[0]: wanted}).mean()
        loss.backward()
        optimiser.step()
        before, after = (float(loss.detach()) if step == 0 else before), float(loss.detach())
    # Six channels of eight: a quarter of the variance cannot come back.
    assert after < 0.4 < before


def test_the_critic_waits_for_its_step(teacher: Vae) -> None:
    late = {**CRITIC, "adversarial_from": 10}
    table = Table(teacher, late)
    assert table.game.turns(9) == ()
    assert table.game.turns(10) == ("critic",)
    assert set(table.terms("", step=9)) == {"teacher"}
    assert set(table.terms("", step=10)) == {"teacher", "critic"}


def test_the_hinge_by_hand(teacher: Vae) -> None:
    table = Table(teacher, CRITIC)

    class Mean(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            return pictures.mean((1, 2, 3), keepdim=True) * 5

    table.partners["critic"] = Mean()
    batch = table.batches.batch(1)
    assert batch.clean is not None
    assert batch.images is not None
    with torch.no_grad():
        fake, real = Mean()(table.student(batch.clean)), Mean()(batch.images)
    wanted = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    torch.testing.assert_close(table.terms("critic")["hinge"], wanted)
    assert float(table.terms("")["critic"].detach()) == pytest.approx(-0.1 * float(fake.mean()), rel=1e-4)
    # Without real pictures the teacher's are what the student is told apart from.
    with torch.no_grad():
        real = Mean()(table.teacher(batch.clean))
    wanted = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    torch.testing.assert_close(table.terms("critic", batch=replace(batch, images=None))["hinge"], wanted)


# What cannot be


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"distance": "ssim"}, "unknown distance 'ssim'; known: l1, mse"),
        ({"teacher_weight": 0.0}, "must be held to something"),
        ({"feature_weight": -1.0}, "weights must be 0 or more"),
        ({"feature_weight": 1.0, "stages": ()}, "stages must be some numbers"),
        ({"critic_layers": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        objective("reconstruction", **settings)


def test_networks_that_do_not_fit(teacher: Vae) -> None:
    with pytest.raises(NasError, match="student has no stage 1 whose map could be compared; it has 0"):
        Table(teacher, {"feature_weight": 1.0, "stages": (0, 1)})
    with pytest.raises(NasError, match=r"student makes pictures of \[3, 8, 8\].* and the teacher \[3, 16, 16\]"):
        Table(teacher, {}, own=student(stages=1))
    with pytest.raises(NasError, match="too small for a critic that halves them 3 times"):
        Table(teacher, {"adversarial_weight": 1.0})
    table = Table(teacher, {"image_weight": 1.0})
    with pytest.raises(NasError, match="latents without their pictures"):
        table.terms("", batch=replace(table.batches.batch(0), images=None))
    nothing = Conditioning(tokens=torch.zeros(2, 1, 1))
    with pytest.raises(NasError, match="real images"):
        table.terms("", batch=Batch(text=nothing, null_text=nothing))


# The data, and a training


def test_encoded_pictures_are_a_function_of_the_step(teacher: Vae) -> None:
    batches = data(teacher)
    whole, again, other = batches.batch(3), batches.batch(3), batches.batch(4)
    assert whole.clean is not None
    assert whole.images is not None
    assert torch.equal(whole.clean, again.clean if again.clean is not None else torch.empty(0))
    assert not torch.equal(whole.images, other.images if other.images is not None else torch.empty(0))
    part = batches.batch(3, Part(index=1, count=2))
    torch.testing.assert_close(part.clean, whole.clean[2:])
    torch.testing.assert_close(whole.clean, teacher.encode(whole.images))
    assert len(whole) == ROWS


@pytest.mark.slow
def test_a_decoder_learns_to_paint_as_its_teacher(teacher: Vae) -> None:
    own = student(width=16)
    game = objective("reconstruction", **{**FEATURES, **CRITIC, "adversarial_weight": 0.01, "adversarial_from": 25})
    target = Decoder(VaeDecoder(teacher.network), teacher.scaling).eval()
    held = data(teacher, seed=99).batch(0)
    assert held.clean is not None
    with torch.no_grad():
        wanted, before = target(held.clean), own.eval()(held.clean)
    settings = TrainSettings(steps=50, batch=ROWS, lr=1e-2, warmup=5)
    trained = train(own, data(teacher), [game], settings, teacher=target)
    with torch.no_grad():
        after = trained.average(held.clean)
    assert psnr_db(after, wanted) > psnr_db(before, wanted) + 4
    terms = trained.history[-1].terms
    assert {"reconstruction.teacher", "reconstruction.features", "reconstruction.critic"} <= set(terms)
    assert {"reconstruction.projection.features", "reconstruction.critic.hinge"} <= set(terms)


def test_a_decoder_of_diffusers_passes_gradients(teacher: Vae) -> None:
    z = torch.randn(1, 4, SIDE, SIDE, generator=stream(0), requires_grad=True)
    Decoder(VaeDecoder(teacher.network), teacher.scaling)(z).sum().backward()
    assert z.grad is not None
    assert bool(z.grad.any())


def test_the_tiny_autoencoder_is_a_teacher_too() -> None:
    from diffusers import AutoencoderTiny

    made = seeded(
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    tiny = Vae(made, "tiny", "0").requires_grad_(False).eval()
    table = Table(tiny, FEATURES)
    assert table.partners["projection"].teacher == ("vae.decoder.layers.2",)
    assert bool(table.loss("").isfinite())
