"""The contract of every game that makes a denoiser of few steps, found by listing the folder."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from game_cases import ROWS, Data, Table, gradients, player, weights
from gaussian_world import sd_schedule
from torch import nn

from nas import registry
from nas.batches import Batch, Part
from nas.diffusion import FLOW, FlowDenoiser, NativeDenoiser
from nas.distill import TrainSettings, train
from nas.errors import NasError, UsageError
from nas.features import body
from nas.objectives import is_game, objective

GAMES = tuple(name for name in registry.plugins("nas.objectives") if is_game(objective(name)))
NAMES = tuple(name for name in GAMES if hasattr(objective(name), "sampling"))
# Settings that change who plays or how: each is held to the same contract.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in NAMES),
    ("consistency", {"boundary": "lcm", "distance": "squared", "w_min": 1.0, "w_max": 1.0}),
    ("sid_lsg", {"kappa1": 1.0, "kappa2": 1.0, "kappa3": 1.0, "kappa4": 4.5}),
    ("sid_lsg", {"steps": 2, "kappa2": 0.0, "kappa3": 1.0}),
    ("dmd", {"levels": (999, 749, 499, 249), "student_every": 1}),
    ("dmd", {"gan_weight": 1e-3, "gan_loss": "hinge", "student_every": 2}),
    ("adversarial", {"backbone": "critic", "gan_loss": "softplus", "renoise": "uniform"}),
    ("adversarial", {"renoise": "previous", "roughness_weight": 1.0, "student_every": 2, "shared_noise": True}),
)
DATA_FREE = ("dmd", "sid_lsg")  # in their default settings
EACH = pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=["-".join([n, *map(str, s)]) for n, s in VARIANTS])


def test_the_folder_holds_games() -> None:
    assert set(NAMES) == {"adversarial", "consistency", "dmd", "sid_lsg"}


@EACH
class TestContract:
    def test_finite_scalars(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        for who in table.losing:
            for value in table.terms(who).values():
                assert value.shape == ()
                assert bool(value.isfinite())

    def test_gradient_to_the_player_alone(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        for who in table.losing:
            everybody = {"": table.student, "teacher": table.teacher, **table.partners}
            table.loss(who).backward()
            for each, module in everybody.items():
                found = gradients(module)
                if each == who:
                    assert max(float(g.abs().max()) for g in found) > 0
                    assert all(bool(g.isfinite().all()) for g in found)
                else:
                    assert found == [], each
                module.zero_grad(set_to_none=True)

    def test_the_student_keeps_no_gradient_in_a_partners_turn_even_unfrozen(
        self, name: str, settings: dict[str, Any]
    ) -> None:
        table = Table(name, settings)
        assert all(p.requires_grad for p in table.student.parameters())
        for who in table.game.turns(0):
            table.loss(who).backward()
        assert gradients(table.student) == []

    def test_everybody_is_told_the_same_caption(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        table.loss("")
        null = table.scene().batch.null_text.tokens.expand(ROWS, -1, -1)
        (said, *more) = table.student.network.told
        assert all(torch.equal(said, other) for other in more)
        for module in (table.teacher, *table.partners.values()):
            for told in body(module).told if hasattr(body(module), "told") else ():
                assert torch.equal(told[:ROWS], said)
                assert len(told) == ROWS or torch.equal(told[ROWS:], null)

    def test_batch_mean_and_pieces_see_the_same_draws(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        for who in table.losing:
            whole = table.loss(who)
            for count in (2, ROWS):
                pieces = [table.loss(who, part=Part(index=i, count=count)) for i in range(count)]
                torch.testing.assert_close(torch.stack(pieces).mean(), whole, rtol=2e-5, atol=1e-6)

    def test_a_seed_decides_the_bits(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        for who in table.losing:
            assert torch.equal(table.loss(who), table.loss(who))
            assert not torch.equal(table.loss(who), table.loss(who, seed=6))

    def test_bfloat16_is_near_float32(self, name: str, settings: dict[str, Any]) -> None:
        table = Table(name, settings)
        for who in table.losing:
            exact = float(table.loss(who).detach())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = table.loss(who)
            assert half.dtype == torch.float32
            assert float(half.detach()) == pytest.approx(exact, rel=0.05, abs=0.02)

    def test_the_loop_plays_it(self, name: str, settings: dict[str, Any]) -> None:
        game = objective(name, **settings)
        assert is_game(game)
        how = TrainSettings(steps=6, batch=ROWS, lr=1e-3, warmup=1, clip=0.0)
        teacher = player(2, learns=False)
        before = weights(teacher).clone()
        ends = []
        for accumulate in (1, 1, 2):
            student = player(1, width=6)
            start = weights(student).clone()
            train(student, Data(), [game], replace(how, accumulate=accumulate), teacher=teacher)  # type: ignore[list-item]
            ends.append(weights(student))
            moves = sum(game.student_moves(step) for step in range(6))
            assert torch.equal(start, ends[-1]) == (moves == 0)
        assert torch.equal(ends[0], ends[1])
        # Adam turns the last bit of a gradient near 0 into a step, so pieces agree as a whole, not weight by weight.
        assert float((ends[2] - ends[0]).norm()) <= 0.01 * float((ends[0] - start).norm())
        assert torch.equal(weights(teacher), before)
        assert gradients(teacher) == []

    def test_alternation(self, name: str, settings: dict[str, Any]) -> None:
        game = objective(name, **settings)
        assert is_game(game)
        every = getattr(game, "student_every", 1)
        moves = [game.student_moves(step) for step in range(4 * every)]
        assert sum(moves) == 4
        assert moves[every - 1]
        assert not any(moves[: every - 1])
        trained = {name for name, p in Table(name, settings).game.partners(*_example()).items() if p.lr is not None}
        for step in range(3):
            assert set(game.turns(step)) == trained

    def test_sampling_times(self, name: str, settings: dict[str, Any]) -> None:
        game: Any = objective(name, **settings)
        for schedule in (FLOW, sd_schedule()):
            times, unit = game.sampling(schedule)
            assert list(times) == sorted(set(times), reverse=True)
            assert all(0 < t <= schedule.most + 1e-6 for t in times)
            assert unit == (name != "sid_lsg")
            assert len(game.sampling(schedule, 1)[0]) == 1
            assert game.sampling(schedule, 1)[0][0] == times[0]


def _example() -> tuple[nn.Module, nn.Module, Batch]:
    return player(1, width=6), player(2, learns=False), Data().batch(0)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_alone_do_or_are_refused_in_one_sentence(name: str) -> None:
    table = Table(name, {})
    batch = Data(prompts_only=True).batch(0)
    for who in table.losing:
        if name in DATA_FREE:
            assert bool(table.loss(who, batch=batch).isfinite())
        else:
            with pytest.raises(NasError, match="needs real images"):
                table.loss(who, batch=batch)


def test_a_gan_needs_images_where_the_rest_of_dmd_does_not() -> None:
    table = Table("dmd", {"gan_weight": 1e-3})
    with pytest.raises(NasError, match="needs real images"):
        table.loss("fake", batch=Data(prompts_only=True).batch(0))


@pytest.mark.parametrize("name", DATA_FREE)
def test_data_free_games_never_look_at_images(name: str) -> None:
    table = Table(name, {})
    batch = Data().batch(0)
    spoilt = replace(batch, clean=torch.full_like(batch.images_needed(), torch.nan))
    for who in table.losing:
        assert torch.equal(table.loss(who, batch=spoilt), table.loss(who, batch=batch))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_alone_need_a_teacher_that_knows_its_images(name: str) -> None:
    if name not in DATA_FREE:
        return
    table = Table(name, {})
    table.teacher = FlowDenoiser(table.teacher.network, table.teacher.preconditioner)
    with pytest.raises(NasError, match="what shape its images have"):
        table.loss("", batch=Data(prompts_only=True).batch(0))


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_levels_is_refused(name: str) -> None:
    table = Table(name, {})
    short = replace(sd_schedule(), alpha_bar=torch.linspace(0.99, 0.01, 500))
    with pytest.raises(NasError, match="levels of 1000, and the student's schedule has 500"):
        table.game.student_loss(replace(table.scene(), schedule=short))


@pytest.mark.parametrize("name", NAMES)
def test_a_variance_preserving_student_plays_too(name: str) -> None:
    settings = {"gan_weight": 1e-3} if name == "dmd" else {}
    students = []
    for prediction in ("noise", "velocity", "clean"):
        student = NativeDenoiser(player(1).network, sd_schedule(prediction))
        table = Table(name, settings, student=student)
        turn = replace(table.scene(), schedule=student.schedule)
        for partner in table.partners.values():
            partner.requires_grad_(False)
        loss = torch.stack(list(table.game.student_loss(turn).values())).sum()
        loss.backward()
        assert bool(loss.isfinite())
        assert all(bool(g.isfinite().all()) for g in gradients(student))
        students.append(float(loss.detach()))
    assert len(set(students)) == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("consistency", {"points": 30}, "points must divide 1000"),
        ("consistency", {"w_min": 3.0, "w_max": 2.0}, "w_max must be at least w_min"),
        ("consistency", {"ema": 1.5}, "ema must be from 0 to 1"),
        ("consistency", {"boundary": "edm"}, "unknown boundary 'edm'"),
        ("consistency", {"distance": "l1"}, "unknown distance 'l1'"),
        ("consistency", {"huber_c": 0.0}, "huber_c must be above 0"),
        ("sid_lsg", {"t_min": 980}, "t_max must be above t_min"),
        ("sid_lsg", {"t_init": 1200}, "t_init must be a level from 0 to 1000"),
        ("sid_lsg", {"caption_dropout": 1.0}, "caption_dropout must be from 0"),
        ("sid_lsg", {"fake_lr": 0.0}, "fake_lr must be above 0"),
        ("dmd", {"levels": (249, 999)}, "levels must fall"),
        ("dmd", {"levels": (1000,)}, "levels must fall and be from 0 to 999"),
        ("dmd", {"gan_loss": "wgan"}, "unknown gan_loss 'wgan'"),
        ("dmd", {"student_every": 0}, "student_every must be above 0"),
        ("adversarial", {"renoise": "normal"}, "unknown renoise 'normal'"),
        ("adversarial", {"backbone": "student"}, "unknown backbone 'student'"),
        ("adversarial", {"levels": ()}, "levels must fall"),
        ("adversarial", {"renois": "uniform"}, "unknown setting 'renois'"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective(name, **settings)


@pytest.mark.parametrize(
    ("name", "steps"), [("consistency", 51), ("consistency", 0), ("dmd", 2), ("adversarial", 5), ("sid_lsg", 700)]
)
def test_steps_beyond_what_was_trained_are_refused(name: str, steps: int) -> None:
    game: Any = objective(name)
    with pytest.raises(UsageError, match="steps"):
        game.sampling(FLOW, steps)


def test_copies_of_the_teacher_are_its_own() -> None:
    teacher = player(2, learns=False)
    before = copy.deepcopy(teacher.state_dict())
    game: Any = objective("sid_lsg")
    fake = game.partners(player(1), teacher, Data().batch(0))["fake"].module
    assert torch.equal(weights(fake), weights(teacher))
    assert all(p.requires_grad for p in fake.parameters())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
