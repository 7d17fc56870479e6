"""Training times: their distributions, and those that a teacher never saw."""

from __future__ import annotations

import math

import pytest
import torch

from nas.batches import stream
from nas.diffusion import FLOW, Schedule, sample_times
from nas.errors import UsageError
from nas.times import Times

SD = Schedule.of(
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "the test",
)
MANY = 40_000


def normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def test_the_teachers_range_is_that_of_its_schedule() -> None:
    # distillation notes, section 0: RF time 0.0283 at level 0 and 0.9360 at level 999.
    assert SD.least == pytest.approx(0.0283, abs=5e-5)
    assert SD.most == pytest.approx(0.9360, abs=5e-5)


def test_uniform_takes_every_level_alike() -> None:
    times = Times(kind="uniform", schedule=SD).draw(MANY, stream(0))
    grid = SD.times(torch.arange(1000))
    place = torch.searchsorted(grid, times).clamp(max=999)
    torch.testing.assert_close(grid[place], times)  # on the grid, all of them
    counts = torch.bincount(place // 100, minlength=10).double() / MANY
    assert float((counts - 0.1).abs().max()) < 0.01
    flow = Times(kind="uniform").draw(MANY, stream(0))
    assert float(flow.min()) > 0
    assert float(flow.max()) == 1.0
    assert float(flow.mean()) == pytest.approx(0.5, abs=0.01)


def test_logit_normal_and_mixed_are_their_distributions() -> None:
    logits = Times(kind="logit_normal").draw(MANY, stream(1)).double().logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(Times().draw(100, stream(2)), sample_times(100, stream(2)))


@pytest.mark.parametrize("kind", ["logit_normal", "mixed"])
def test_share_outside_is_exact(kind: str) -> None:
    ends = [math.log(t / (1 - t)) for t in (SD.least, SD.most)]
    parts = [(0.0, 1.0), (1.2, 1.3)][: 2 if kind == "mixed" else 1]
    inside = [normal_cdf((ends[1] - m) / sd) - normal_cdf((ends[0] - m) / sd) for m, sd in parts]
    expected = 1 - sum(inside) / len(inside)
    times = Times(kind=kind, schedule=SD)  # type: ignore[arg-type]
    assert times.outside == pytest.approx(expected, abs=1e-6)
    drawn = Times(kind=kind).draw(MANY, stream(3))  # type: ignore[arg-type]
    counted = float(((drawn < SD.least) | (drawn > SD.most)).double().mean())
    assert counted == pytest.approx(expected, abs=0.005)


def test_clamped_times_stand_at_the_ends() -> None:
    plain = Times().draw(MANY, stream(4))
    clamped = Times(schedule=SD).draw(MANY, stream(4))
    assert torch.equal(clamped, plain.clamp(SD.least, SD.most))
    assert float((clamped == clamped.max()).double().mean()) > 0.03


def test_dropped_times_are_drawn_again() -> None:
    plain = Times().draw(MANY, stream(4))
    dropped = Times(schedule=SD, out_of_range="drop").draw(MANY, stream(4))
    inside = (plain >= SD.least) & (plain <= SD.most)
    assert torch.equal(dropped[inside], plain[inside])
    assert float(dropped.min()) >= SD.least
    assert float(dropped.max()) <= SD.most
    assert float((dropped == SD.most).double().mean()) < 1e-3  # not piled up at the end
    assert torch.equal(Times(schedule=SD, out_of_range="drop").draw(MANY, stream(4)), dropped)


def test_both_ends_are_drawn_again() -> None:
    narrow = Schedule(prediction="noise", alpha_bar=torch.linspace(0.6, 0.4, 5))
    drawn = Times(schedule=narrow, out_of_range="drop").draw(MANY, stream(5))
    assert len(set(drawn.tolist())) > 0.95 * MANY  # none piled up at an end, though most were outside at first
    assert narrow.least < float(drawn.min())
    assert float(drawn.max()) < narrow.most


def test_the_statement_says_which_share_and_what_is_done() -> None:
    clamp, drop = (Times(schedule=SD, out_of_range=how) for how in ("clamp", "drop"))  # type: ignore[arg-type]
    assert "knows 0.0283 to 0.9360" in clamp.statement()
    assert f"the {clamp.outside:.1%} outside are moved to its ends" in clamp.statement()
    assert "outside are drawn again" in drop.statement()
    assert "over all that the teacher knows" in Times(schedule=FLOW).statement()
    assert "over all that the teacher knows" in Times(kind="uniform", schedule=SD).statement()


def test_unknown_words_are_named() -> None:
    with pytest.raises(UsageError, match="unknown times 'unifrom'; did you mean 'uniform'"):
        Times(kind="unifrom")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown out_of_range 'skip'"):
        Times(out_of_range="skip")  # type: ignore[arg-type]
