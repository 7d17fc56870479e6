"""Published figures beside computed ones, and claims that do not hold."""

from __future__ import annotations

import pytest

from nas.errors import NasError, UsageError
from nas.pricing.references import check_params, check_references, figures
from nas.space import SearchSpace, load_space


@pytest.fixture
def edited(tmp_path):
    """The decoder space with a piece of its text replaced."""

    def make(old: str, new: str) -> SearchSpace:
        text = load_space("decoder").path.read_text()
        assert old in text
        (tmp_path / "mine.toml").write_text(text.replace(old, new))
        return load_space(tmp_path / "mine.toml")

    return make


def test_a_reference_has_its_claim_and_its_published_macs():
    found = figures(load_space("decoder"), "taesd")
    assert found.params == found.reference.params == 1_222_531
    assert {call.px: call.published_gmacs for call in found.calls} == {512: 70.675, 1024: 282.7}
    for call in found.calls:
        assert call.macs / 1e9 == pytest.approx(call.published_gmacs, rel=1e-3)
        assert call.difference == pytest.approx(call.macs / 1e9 / call.published_gmacs - 1)
    assert [call.px for call in found.calls if call.native] == [1024]


def test_without_published_macs_there_is_its_own_size(edited):
    space = edited('gmacs = { "512" = 70.675, "1024" = 282.7 }', "resolution_px = 256")
    (call,) = figures(space, "taesd").calls
    assert (call.px, call.native, call.published_gmacs, call.difference) == (256, True, None, None)


def test_a_claim_that_does_not_hold_names_file_reference_and_both_numbers(edited):
    space = edited("1222531", "1222532")
    said = f"{space.path}: reference 'taesd' claims 1,222,532 parameters, but the network of its choices has 1,222,531"
    for check in (
        lambda: check_params(space, "taesd"),
        lambda: check_references(space),
        lambda: figures(space, "taesd"),
    ):
        with pytest.raises(NasError) as caught:
            check()
        assert caught.value.message == said
        assert caught.value.exit_code == 1


def test_a_reference_without_a_claim_is_not_checked(edited):
    space = edited("params = 1222531", "")
    assert check_params(space, "taesd") == 1_222_531
    check_references(space)


def test_parameters_are_those_of_its_own_text_whatever_the_space_is_at():
    space = load_space("sd_unet").at_resolution(256)
    assert check_params(space, "sd-v2.1-base") == 865_910_724


def test_a_size_that_is_no_number_is_an_error(edited):
    space = edited('gmacs = { "512" = 70.675', 'gmacs = { "small" = 70.675')
    with pytest.raises(NasError, match="reference 'taesd': gmacs is keyed by the image's side in px, got 'small'"):
        figures(space, "taesd")


def test_a_size_that_the_family_cannot_take_names_file_and_reference(edited):
    space = edited('gmacs = { "512" = 70.675', 'gmacs = { "100" = 70.675')
    with pytest.raises(UsageError) as caught:
        figures(space, "taesd")
    assert caught.value.message.startswith(f"{space.path}: reference 'taesd': gmacs is given at a size, where ")
    assert "resolution 100 px" in caught.value.message


def test_an_unknown_reference_offers_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'taesd'"):
        figures(load_space("decoder"), "taes")
