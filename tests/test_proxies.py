"""The contract of every proxy, found by listing the folder."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict

import pytest
from proxy_case import SETTINGS

from nas import proxies
from nas.bench import Bench, ProxySettings
from nas.errors import UsageError
from nas.proxies import Score
from nas.space import SearchSpace

# It predicts from a fit of one teacher's long runs and refuses every other; see its own tests.
FITTED = {"regression"}

pytestmark = pytest.mark.usefixtures("module_cache")


def settings(name: str) -> ProxySettings:
    return ProxySettings(**{**asdict(SETTINGS), "proxy": name, "seeds": (0,)})


def scored(name: str, teacher: str, space: SearchSpace, row: int) -> Score:
    """The score of one of the space's candidates, by its place among them."""
    bench, chosen = Bench(teacher, settings(name)), space.from_row(space.sample(8, 0)[row])
    proxies.prepare(space, bench)
    return proxies.proxy(name).score(chosen, bench)


def test_the_folder_holds_what_is_compared() -> None:
    asked = {"distill", "supernet", "inherit", "blockwise", "synflow", "naswot", "grad_norm", "params", "macs"}
    assert asked | FITTED <= set(proxies.names())


@pytest.mark.parametrize("name", proxies.names())
class TestContract:
    def test_it_says_what_it_is(self, name: str, teacher: str) -> None:
        found = proxies.proxy(name)
        assert found.SUMMARY
        assert found.UNIT
        assert proxies.settings_of(name).proxy == name
        json.dumps(asdict(proxies.settings_of(name)))

    def test_a_score_is_finite_repeats_travels_and_tells_candidates_apart(
        self, name: str, teacher: str, space: SearchSpace
    ) -> None:
        if name in FITTED:
            pytest.skip("fitted for another teacher")
        first, again = scored(name, teacher, space, 0), scored(name, teacher, space, 0)
        assert math.isfinite(first.value)
        assert first.text is None or math.isfinite(first.text)
        assert (first.value, first.text, first.seeds) == (again.value, again.text, again.seeds)
        assert first.seconds > 0
        assert pickle.loads(pickle.dumps(first)) == first
        assert scored(name, teacher, space, 1).value != first.value


def test_own_settings_win_over_defaults() -> None:
    assert proxies.settings_of("distill", steps=7).steps == 7
    with pytest.raises(UsageError, match="unknown proxy 'nothing'"):
        proxies.settings_of("nothing")
