"""What is said of a candidate's quality, and of the score itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from proxy_case import SETTINGS
from tiny_lesson import candidate, write_teacher

from nas import quality
from nas.bench import bench_of
from nas.errors import UsageError
from nas.proxies import regression, settings_of
from nas.quality import ProxySettings
from nas.space import load_space


def test_cannot_see_states_the_run() -> None:
    sentences = quality.cannot_see(ProxySettings(steps=7, batch=3, width_divisor=8))
    assert "divided by 8 after 7 steps, 21 drawn" in sentences[0]
    assert any("cross-attention" in sentence for sentence in sentences)
    assert "One initialisation each" in sentences[-1]
    assert "ties" in quality.cannot_see(ProxySettings(seeds=(0, 1)))[-1]


def test_cannot_see_is_of_the_proxy_that_was_used(tmp_path: Path) -> None:
    assert "trains nothing" in quality.cannot_see(ProxySettings(proxy="naswot", steps=0))[0]
    shared = quality.cannot_see(ProxySettings(proxy="supernet", steps=5, shared_steps=400))[0]
    assert "after 5 steps on top of 400 that all candidates share" in shared
    full = quality.on_latents(ProxySettings(), tmp_path, "cuda")
    assert (full.task, full.data, full.precision) == ("latents", str(tmp_path), "bf16")
    assert quality.on_latents(ProxySettings(), tmp_path).precision == "fp32"
    sentence = quality.cannot_see(full)[0]
    assert "the candidate itself" in sentence
    assert "divided" not in sentence


def write_card(folder: Path, name: str, space: str, **rest: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    card = {"proxy": asdict(SETTINGS), "teacher_digest": "digest of embedded", "space": space, **rest}
    (folder / f"card-{name}.json").write_text(json.dumps(card))


def test_a_card_counts_only_for_the_settings_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "shipped"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shipped" / "reports" / "proxy"
    folder.mkdir(parents=True)
    monkeypatch.setattr(quality, "teacher_hash", lambda teacher: f"digest of {teacher}")
    assert quality.fidelity(SETTINGS, "embedded", "snapgen_unet") is None
    write_card(folder, "a", "snapgen_unet", kendall=0.5)
    card = quality.fidelity(SETTINGS, "embedded", "snapgen_unet")
    assert card is not None
    assert card["kendall"] == 0.5
    assert quality.fidelity(replace(SETTINGS, steps=4), "embedded", "snapgen_unet") is None
    assert quality.fidelity(SETTINGS, "another.safetensors", "snapgen_unet") is None


def test_a_card_of_the_space_comes_before_one_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "shipped"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "teacher_hash", lambda teacher: f"digest of {teacher}")
    write_card(tmp_path / "shipped" / "reports" / "proxy", "a", "snapgen_unet", who="shipped")
    write_card(tmp_path / "reports" / "proxy", "b", "sd_unet", who="own")
    found = {space: quality.fidelity(SETTINGS, "embedded", space) for space in ("snapgen_unet", "sd_unet", "dit")}
    assert {space: card and card["who"] for space, card in found.items()} == {
        "snapgen_unet": "shipped",
        "sd_unet": "own",
        "dit": "own",  # a person's own before what is shipped
    }


def test_an_unknown_proxy_is_named(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path)
    with pytest.raises(UsageError, match=r"unknown proxy 'distil'.*distill"):
        quality.score(candidate(), teacher, replace(SETTINGS, proxy="distil"))


def test_unasked_the_regression_is_taken_where_it_was_fitted(tmp_path: Path) -> None:
    fitted, other = load_space("snapgen_unet"), load_space("snapgen_unet").at_resolution(512)
    chosen = quality.default_settings(fitted, "embedded")
    assert chosen.proxy == "regression"
    assert quality.chosen_because(chosen, fitted).startswith("a regression was fitted")
    assert quality.score(fitted.reference("snapgen"), "embedded", chosen).value > 0
    for space, teacher in ((other, "embedded"), (fitted, write_teacher(tmp_path))):
        instead = quality.default_settings(space, teacher)
        assert instead == quality.ProxySettings()
        assert quality.chosen_because(instead, space).startswith("no regression was fitted")


def test_a_study_by_the_regression_is_of_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    space, settings = load_space("snapgen_unet"), settings_of("regression")
    before = quality.identity(settings, space, "embedded")
    assert before == quality.identity(settings, space, "embedded")
    fit = regression.fit_for(space, bench_of("embedded", settings))
    monkeypatch.setattr(regression, "fit_for", lambda *_: {**fit, "rows": 47})
    after = quality.identity(settings, space, "embedded")
    assert before.pop("fit") != after.pop("fit")
    assert before == after


def test_the_regression_says_what_it_is() -> None:
    said = quality.cannot_see(settings_of("regression"))
    assert said[0].startswith("It trains nothing: it predicts from size, shape")
    assert "divided by 16" in said[0]
