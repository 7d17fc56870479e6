"""Known mistakes, planted one at a time: each must be caught by the oracle that it concerns.

The list is the one that every suite of such methods should kill. An oracle is a test of
another file, called here once as it is (it passes) and once with the mistake planted (it must fail).

| mistake | caught by |
|---|---|
| eps where x0 is expected (SiD, DMD) | reference gradients of SiD and DMD |
| a teacher's v output used as eps in the DDIM step | `TestSolver.test_the_prediction_of_the_teacher_does_not_matter` |
| s_init forgotten: unit noise into SiD's generator | `test_the_generators_input_is_a_zero_image_noised` |
| the reverse: DMD's first input scaled by s | `test_it_starts_from_unit_noise_on_stable_diffusions_schedule_too` |
| w taken for k, off by one | `TestGuidance.test_w_is_one_less_than_the_usual_scale` |
| x_t detached in SiD | reference gradients of SiD |
| scores not detached in DMD | reference gradients of DMD |
| t_min or t_max off by one | `test_levels_are_uniform_from_t_min_to_below_t_max`, `test_levels_of_the_two_turns` |
| target network left in training mode | `TestTarget.test_it_is_an_average_of_the_student_in_eval_mode` |
| guidance on the generator | `TestGuidance.test_effective_guidance` |
| boundary at alpha_bar = 1 | `TestFixedPoint.test_the_loss_and_its_gradient_vanish_there_and_nowhere_near` |
| boundary at level -1 | `TestGrid.test_points` |
| sigma_data on one side only | `TestFixedPoint.test_the_loss_and_its_gradient_vanish_there_and_nowhere_near` |
| sigma_data on both sides, unlike diffusers | `TestBoundary.test_scales_are_diffusers` |
| x in the wrong scale in the boundary | `test_any_network_is_the_identity_at_level_zero_in_its_own_scale` |
| a "real" path without data | `TestWhatIsShown.test_real_is_data_and_never_zeros` |
| the caption dropped for the teacher alone | `TestContract.test_everybody_is_told_the_same_caption` |
| the caption dropped for the fake score alone | `test_captions_are_dropped_before_the_generator_...` |
| the generator moves before its fake score has learnt | `partners_move_first` here |
| the projected term of SiD forgotten | `test_naive_fisher_does_not` (tests/test_games_toys.py plants it itself) |
| real and generated swapped in the discriminator's loss | `TestOptima.test_softplus_at_the_optimal_logit` |
| the frozen teacher detached under the student | `TestGradient.test_it_flows_through_the_frozen_teacher` |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import game_cases
import pytest
import test_adversarial
import test_consistency
import test_dmd
import test_games
import test_sid_lsg
import torch
from gaussian_world import double
from torch import Tensor

from nas import batches
from nas.diffusion import Conditioning, denoisers, guided, to_variance_preserving
from nas.distill import TrainSettings, run, train, turns
from nas.objectives import _asking, adversarial, consistency, dmd, objective, sid_lsg

Patch = pytest.MonkeyPatch


# ------------------------------------------------------------------------------------------------------- oracles


def sid_gradients(patch: Patch) -> None:
    patch.setattr(sid_lsg, "normaliser", lambda images, real: torch.ones(()))
    test_sid_lsg.TestGradient().test_reference_numbers(1.0, 0.200665, 0.074822)


def dmd_gradients(patch: Patch) -> None:
    patch.setattr(dmd, "normaliser", lambda images, real: torch.ones(()))
    test_dmd.TestGradient().test_reference_numbers()


def plain(test: Callable[..., None], *arguments: Any) -> Callable[[Patch], None]:
    return lambda patch: test(*arguments)


def partners_move_first(patch: Patch) -> None:
    order: list[str] = []
    game = objective("sid_lsg")
    for name in ("partner_loss", "student_loss"):
        whole = getattr(sid_lsg.Objective, name)

        def noted(self: Any, *asked: Any, whole: Any = whole, name: str = name) -> Any:
            order.append(name)
            return whole(self, *asked)

        patch.setattr(sid_lsg.Objective, name, noted)
    teacher = game_cases.player(2, learns=False)
    settings = TrainSettings(steps=2, batch=game_cases.ROWS, lr=1e-3, warmup=1)
    train(game_cases.player(1), game_cases.Data(), [game], settings, teacher=teacher)
    assert order == ["partner_loss", "student_loss"] * 2


same_captions = plain(test_games.TestContract().test_everybody_is_told_the_same_caption, "dmd", {"guidance": 2.0})
vanishes = plain(test_consistency.TestFixedPoint().test_the_loss_and_its_gradient_vanish_there_and_nowhere_near)
off_by_one = plain(test_consistency.TestGuidance().test_w_is_one_less_than_the_usual_scale, 1.5)
scales_are_diffusers = plain(test_consistency.TestBoundary().test_scales_are_diffusers)
dropped_captions = plain(
    test_sid_lsg.TestGuidance().test_captions_are_dropped_before_the_generator_and_only_under_guidance, 2.0, True
)


# ------------------------------------------------------------------------------------------------------ mistakes


def noise_for_clean(module: Any) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        def answers(ask: Any, x: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            wide = t.view(-1, 1, 1, 1)
            return tuple((x - (1 - wide) * clean) / wide for clean in _asking.guided_answers(ask, x, t, *rest))

        patch.setattr(module, "guided_answers", answers)

    return plant


def velocity_for_noise(patch: Patch) -> None:
    honest = denoisers.clean_and_noise

    def confused(prediction: Tensor, kind: Any, x: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        return honest(prediction, "noise" if kind == "velocity" else kind, x, at)

    patch.setattr(denoisers, "clean_and_noise", confused)


def start(module: Any, unit_instead: bool) -> Callable[[Patch], None]:
    honest = module.start_noise
    return lambda patch: patch.setattr(module, "start_noise", lambda noise, t, unit: honest(noise, t, unit_instead))


def w_for_k(by: float) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        def answers(*asked: Any) -> tuple[Tensor, ...]:
            return _asking.guided_answers(*asked[:-1], asked[-1] + by)

        patch.setattr(consistency, "guided_answers", answers)

    return plant


def detached_point(patch: Patch) -> None:
    patch.setattr(sid_lsg, "renoised", lambda images, *rest: _asking.renoised(images.detach(), *rest))


def scores_with_gradient(patch: Patch) -> None:
    patch.setattr(torch, "no_grad", contextlib.nullcontext)


def level_range(module: Any, low: int, high: int) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        honest = batches.Draws.integers
        patch.setattr(batches.Draws, "integers", lambda self, a, b: honest(self, a + low, b + high))

    return plant


def target_in_training_mode(patch: Patch) -> None:
    honest = run._add_partner

    def added(state: Any, name: str, partner: Any) -> None:
        honest(state, name, partner)
        state.partners[name].module.train()

    patch.setattr(run, "_add_partner", added)


def guided_generator(patch: Patch) -> None:
    honest = sid_lsg.generate

    def generate(student: Any, text: Conditioning, *rest: Any) -> Tensor:
        without = Conditioning(tokens=torch.zeros_like(text.tokens))
        return guided(honest(student, text, *rest), honest(student, without, *rest), 2.0)

    patch.setattr(sid_lsg, "generate", generate)


def ends_without_noise(patch: Patch) -> None:
    honest = consistency.level_times

    def times(schedule: Any, level: Tensor, like: Tensor) -> Tensor:
        return torch.where(level == 0, 0.0, honest(schedule, level, like))

    patch.setattr(consistency, "level_times", times)


def ends_at_minus_one(patch: Patch) -> None:
    def levels(number: Tensor, points: int) -> tuple[Tensor, Tensor]:
        return number * (1000 // points) - 1, (number - 1) * (1000 // points) - 1

    patch.setattr(consistency, "solver_levels", levels)


def sigma_data_in_the_loss_alone(patch: Patch) -> None:
    honest = consistency.boundary_scales
    calls: list[None] = []

    def scales(level: Tensor) -> tuple[Tensor, Tensor]:
        skip, out = honest(level)
        calls.append(None)  # the target's turn comes first, the student's second
        return skip, out * (consistency.SIGMA_DATA if len(calls) % 2 else 1.0)

    def student_loss(self: Any, scene: Any, whole: Any = consistency.Objective.student_loss) -> Any:
        calls.clear()
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(consistency, "boundary_scales", scales)
            return whole(self, scene)

    patch.setattr(consistency.Objective, "student_loss", student_loss)


def sigma_data_everywhere(patch: Patch) -> None:
    honest = consistency.boundary_scales

    def scales(level: Tensor) -> tuple[Tensor, Tensor]:
        skip, out = honest(level)
        return skip, consistency.SIGMA_DATA * out

    patch.setattr(consistency, "boundary_scales", scales)


def boundary_in_flow_scale(patch: Patch) -> None:
    patch.setattr(consistency, "to_variance_preserving", lambda x, t: (x, to_variance_preserving(x, t)[1]))


def real_is_zeros(patch: Patch) -> None:
    honest = batches.Batch.images_needed
    patch.setattr(batches.Batch, "images_needed", lambda self: torch.zeros_like(honest(self)))


def teacher_without_a_caption(patch: Patch) -> None:
    def answers(ask: Any, x: Tensor, t: Tensor, text: Conditioning, null: Conditioning, *scales: Any) -> Any:
        first = torch.arange(len(x)) == 0
        return _asking.guided_answers(ask, x, t, text.where(first, null), null, *scales)

    patch.setattr(dmd, "guided_answers", answers)


def dropped_after_the_generator(patch: Patch) -> None:
    honest = sid_lsg.Objective._generated

    def generated(self: Any, scene: Any, text: Conditioning) -> Tensor:
        return honest(self, scene, scene.batch.text)

    patch.setattr(sid_lsg.Objective, "_generated", generated)


def student_first(patch: Patch) -> None:
    honest = turns._turn
    kept: list[Any] = []

    def turn(state: Any, who: str) -> Any:
        if who == "student":
            return kept.pop()
        kept.append(honest(state, "student"))
        return honest(state, who)

    patch.setattr(turns, "_turn", turn)


def swapped_sides(patch: Patch) -> None:
    honest = test_adversarial.discriminator_loss
    patch.setattr(test_adversarial, "discriminator_loss", lambda real, fake, kind: honest(fake, real, kind))


def detached_features(patch: Patch) -> None:
    honest = adversarial.Discriminator._features

    def detached(self: Any, *asked: Any) -> Any:
        return {name: feature.detach() for name, feature in honest(self, *asked).items()}

    patch.setattr(adversarial.Discriminator, "_features", detached)


@dataclass(frozen=True)
class Case:
    """A mistake and the oracle that must fail with it; `errors` where it may stop otherwise than by an assert."""

    name: str
    plant: Callable[[Patch], None]
    oracle: Callable[[Patch], None]
    errors: tuple[type[Exception], ...] = (AssertionError,)
    double: bool = True


CASES = (
    Case("eps for x0 in sid", noise_for_clean(sid_lsg), sid_gradients),
    Case("eps for x0 in dmd", noise_for_clean(dmd), dmd_gradients),
    Case(
        "v for eps in the solver",
        velocity_for_noise,
        plain(test_consistency.TestSolver().test_the_prediction_of_the_teacher_does_not_matter),
    ),
    Case(
        "s_init forgotten",
        start(sid_lsg, unit_instead=True),
        plain(test_sid_lsg.test_the_generators_input_is_a_zero_image_noised),
    ),
    Case("s_init forgotten, by gradients", start(sid_lsg, unit_instead=True), sid_gradients),
    Case(
        "dmd's start scaled",
        start(dmd, unit_instead=False),
        plain(test_dmd.TestSteps().test_it_starts_from_unit_noise_on_stable_diffusions_schedule_too),
    ),
    *(
        Case(
            f"w for k {by:+}",
            w_for_k(by),
            plain(test_consistency.TestGuidance().test_w_is_one_less_than_the_usual_scale, 1.5),
        )
        for by in (-1.0, 1.0)
    ),
    Case("x_t detached in sid", detached_point, sid_gradients),
    Case("scores not detached in dmd", scores_with_gradient, dmd_gradients),
    *(
        Case(f"{name} levels {low:+} {high:+}", level_range(module, low, high), plain(oracle))
        for name, module, oracle in (
            ("sid", sid_lsg, test_sid_lsg.test_levels_are_uniform_from_t_min_to_below_t_max),
            ("dmd", dmd, test_dmd.test_levels_of_the_two_turns),
        )
        for low, high in ((1, 0), (0, -1))
    ),
    Case(
        "target in training mode",
        target_in_training_mode,
        plain(test_consistency.TestTarget().test_it_is_an_average_of_the_student_in_eval_mode),
    ),
    Case("guided generator", guided_generator, plain(test_sid_lsg.TestGuidance().test_effective_guidance, 2, 2, 2, 2)),
    Case("boundary at alpha_bar 1", ends_without_noise, vanishes),
    Case("boundary at level -1", ends_at_minus_one, plain(test_consistency.TestGrid().test_points)),
    Case("sigma_data on one side", sigma_data_in_the_loss_alone, vanishes),
    Case(
        "sigma_data unlike diffusers",
        sigma_data_everywhere,
        plain(test_consistency.TestBoundary().test_scales_are_diffusers),
    ),
    Case(
        "boundary in flow scale",
        boundary_in_flow_scale,
        plain(test_consistency.TestBoundary().test_any_network_is_the_identity_at_level_zero_in_its_own_scale),
    ),
    Case(
        "real is zeros",
        real_is_zeros,
        plain(test_adversarial.TestWhatIsShown().test_real_is_data_and_never_zeros),
        double=False,
    ),
    Case("teacher told another caption", teacher_without_a_caption, same_captions, double=False),
    Case("caption dropped after the generator", dropped_after_the_generator, dropped_captions),
    Case("student first", student_first, partners_move_first, double=False),
    Case(
        "real and generated swapped",
        swapped_sides,
        plain(test_adversarial.TestOptima().test_softplus_at_the_optimal_logit),
        double=False,
    ),
    Case(
        "teacher detached",
        detached_features,
        plain(test_adversarial.TestGradient().test_it_flows_through_the_frozen_teacher),
        errors=(AssertionError, RuntimeError),  # a loss without gradient cannot be differentiated
        double=False,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_planted_mistake_is_caught(case: Case) -> None:
    precision = double if case.double else contextlib.nullcontext
    with precision(), pytest.MonkeyPatch.context() as patch:
        case.oracle(patch)  # as it is, the oracle holds
    with precision(), pytest.MonkeyPatch.context() as patch:
        case.plant(patch)
        with pytest.raises(case.errors):
            case.oracle(patch)
