"""What a person reads when something is wrong."""

from __future__ import annotations

import pytest

from nas.errors import DIVERGED, NasError, UntrainableError, UsageError, nearest, unknown


def test_exit_codes_tell_usage_from_failure():
    assert NasError("x").exit_code == 1
    assert UsageError("x").exit_code == 2
    assert isinstance(UsageError("x"), NasError)


def test_message_and_hint_are_kept_apart():
    error = NasError("no table", hint="nas measure")
    assert str(error) == error.message == "no table"
    assert error.hint == "nas measure"
    assert NasError("no table").hint is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("snapgen_unt", "snapgen_unet"),
        ("SNAPGEN-unet", "snapgen_unet"),
        ("iphone", "iPhone"),
        ("zzz", None),
        ("", None),
    ],
)
def test_nearest_ignores_case_and_offers_only_what_is_close(name: str, found: str | None):
    assert nearest(name, ["snapgen_unet", "dit", "iPhone"]) == found


def test_unknown_names_thing_place_nearest_known_and_hint():
    error = unknown("space", "snapgen", ["sd_unet", "dit", "snapgen_unet"], where="a.toml:3", hint="nas spaces")
    assert isinstance(error, UsageError)
    assert error.message == (
        "unknown space 'snapgen' in a.toml:3; did you mean 'snapgen_unet'? known: dit, sd_unet, snapgen_unet"
    )
    assert error.hint == "nas spaces"


def test_unknown_guesses_nothing_far_and_says_when_nothing_is_known():
    assert unknown("space", "zzz", ["dit"]).message == "unknown space 'zzz'; known: dit"
    assert unknown("space", "zzz", []).message == "unknown space 'zzz'; known: none"


def test_unknown_takes_values_that_are_not_text():
    assert unknown("value of width", 250, [128, 256]).message.startswith(
        "unknown value of width '250'; did you mean '256'?"
    )


@pytest.mark.parametrize("error", [NasError("why", hint="so"), UsageError("why"), UntrainableError("why", DIVERGED)])
def test_an_error_said_in_other_words_stays_what_it_is(error):
    again = error.restated("here: why", "do")
    assert type(again) is type(error)
    assert (str(again), again.message, again.hint, again.exit_code) == ("here: why", "here: why", "do", error.exit_code)
    assert getattr(again, "cause", None) == getattr(error, "cause", None)
    assert error.message == "why"
