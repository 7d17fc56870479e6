"""The regression on long runs: exact lines, left-out residuals, what it refuses, and the command that fits it."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_lesson import candidate, write_teacher

from nas import targets
from nas.bench import Bench, ProxySettings
from nas.errors import NasError
from nas.fidelity import most_frequent
from nas.proxies import Score, naswot, regression
from nas.proxies.regression import FEATURES, Line, fit
from nas.space import Candidate

TINY = ProxySettings(proxy="regression", width_divisor=32, norm_groups=2, steps=0, batch=4, held_rows=4)
WEIGHTS = np.linspace(-1, 2, len(FEATURES))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        targets._load.cache_clear()
        yield
    targets._load.cache_clear()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(write_teacher(tmp_path_factory.mktemp("teacher")), TINY)


@pytest.fixture(autouse=True)
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices without tracing full-size blocks, which takes seconds; tests/test_proxies_free.py has the real ones."""
    monkeypatch.setattr(regression.params, "score", lambda own, bench: Score(value=8.0 + own.row[0] / 10))
    monkeypatch.setattr(regression.macs, "score", lambda own, bench: Score(value=11.0 + own.row[0] / 10))


@pytest.fixture
def fitted(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fit of the shipped space in force instead of the shipped ones."""
    space = candidate().space
    found = {"space": space.name, "space_hash": space.hash, **regression.belongs(bench), **fit(linear_rows(30))}
    path = tmp_path / "regression.json"
    path.write_text(json.dumps({"fits": [found]}))
    monkeypatch.setattr(regression, "FILE", path)
    return found


def linear_rows(count: int, noise: float = 0.0) -> list[dict[str, Any]]:
    """Candidates whose targets are linear in their features: quality as WEIGHTS say, text a tenth of it, negative."""
    generator = np.random.default_rng(0)
    x = generator.normal(3, 2, (count, len(FEATURES)))
    y = x @ WEIGHTS + 5 + noise * generator.normal(size=count)
    return [
        {
            "key": f"k{i}",
            **dict(zip(FEATURES, map(float, row), strict=True)),
            "quality_db": value,
            "text_db": -value / 10,
        }
        for i, (row, value) in enumerate(zip(x, y.tolist(), strict=True))
    ]


def test_an_exact_line_is_found_also_for_who_was_left_out() -> None:
    rows = linear_rows(30)
    found = fit(rows)
    quality, text = found["targets"]["quality_db"], found["targets"]["text_db"]
    assert found["rows"] == 30
    assert quality["residual_sd"] < 1e-4
    assert quality["explained"] == pytest.approx(1)
    for row in rows:
        assert quality["left_out"][row["key"]] == pytest.approx(row["quality_db"], abs=1e-3)
        assert text["left_out"][row["key"]] == pytest.approx(row["text_db"], abs=1e-3)
    row = np.arange(len(FEATURES), dtype=float)
    assert float(Line.from_json(json.loads(json.dumps(quality))).at(row)) == pytest.approx(row @ WEIGHTS + 5, abs=1e-3)


def test_noise_is_neither_explained_nor_hidden() -> None:
    rows = linear_rows(40)
    generator = np.random.default_rng(1)
    noise = [{**row, "quality_db": float(value)} for row, value in zip(rows, generator.normal(4, 0.5, 40), strict=True)]
    quality = fit(noise)["targets"]["quality_db"]
    assert quality["explained"] < 0.2
    assert 0.4 < quality["residual_sd"] < 0.7
    assert quality["alpha"] > 1  # weights of noise are pressed down
    half = fit(linear_rows(40, noise=0.5))["targets"]["quality_db"]
    assert 0.4 < half["residual_sd"] < 1.0  # the noise, and something for the weights' uncertainty


def test_a_prediction_left_out_is_of_the_others_alone() -> None:
    rows = linear_rows(20, noise=0.5)
    far = [{**row, "quality_db": 1e4} if row["key"] == "k7" else row for row in rows]
    plain, moved = (fit(each)["targets"]["quality_db"] for each in (rows, far))
    assert moved["left_out"]["k7"] == plain["left_out"]["k7"]
    assert abs(moved["left_out"]["k8"] - plain["left_out"]["k8"]) > 1


def test_a_line_is_ridge_regression() -> None:
    x, y = np.array([[-1.0, 5.0], [1.0, 5.0]]), np.array([1.0, 3.0])
    line = Line.fitted(x, y, alpha=2.0)
    # One feature of variance 1 (sum of squares 2) with covariance sum 2, and a constant: w = 2 / (2 + 2).
    np.testing.assert_allclose(line.weights, [0.5, 0.0])
    np.testing.assert_allclose(line.at(x), [1.5, 2.5])


def test_too_little_truth_is_refused() -> None:
    with pytest.raises(NasError, match="needs 8 candidates or more, one row of each, got 7 rows of 7"):
        fit(linear_rows(7))
    with pytest.raises(NasError, match="got 12 rows of 11"):
        fit([*linear_rows(11), linear_rows(1)[0]])


# Scores


def test_shape_counts_blocks(bench: Bench) -> None:
    found = regression.shape_of(
        bench.spec(candidate(resnets_0=2, conv_0="separable-2", depth_1=3, self_attention_1=True))
    )
    # Down 2 + 1 + 1, middle 2, up 2 + 2 + 3; stage 0, with 2 and 3 of them, is separable.
    assert found["residual_blocks"] == 13
    assert found["separable_share"] == pytest.approx(5 / 13)
    # Stage 1 has three units of three layers, which see pixels; stage 2 three of one, which do not; the middle one.
    assert found["transformer_layers"] == 3 * 3 + 3 + 1
    assert found["self_attention_layers"] == 3 * 3 + 1
    assert found["top_width"] == math.log2(128 // 32)
    assert found["mean_width"] == pytest.approx(math.log2((4 * 5 + 8 * 3 + 16 * 5) / 13))


def test_a_score_is_the_prediction_of_the_features(bench: Bench, fitted: dict[str, Any]) -> None:
    own = regression.features(candidate(), bench)
    assert tuple(own) == FEATURES
    assert own["naswot"] == naswot.score(candidate(), bench).value
    row = np.array([own[name] for name in FEATURES])
    found = regression.score(candidate(), bench)
    assert found.value == pytest.approx(float(row @ WEIGHTS) + 5, abs=0.05)
    assert found.text == pytest.approx(-found.value / 10, abs=0.01)
    assert found.value_sd == fitted["targets"]["quality_db"]["residual_sd"]
    assert found.text_sd == fitted["targets"]["text_db"]["residual_sd"]
    again = regression.score(*pickle.loads(pickle.dumps((candidate(), bench))))
    assert replace(again, seconds=found.seconds) == found


def test_no_candidate_is_judged_by_its_own_truth(
    bench: Bench, tmp_path: Path, fitted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, value in (("quality_db", 3.25), ("text_db", 0.5)):
        fitted["targets"][target]["left_out"][candidate().key] = value
    path = tmp_path / "with.json"
    path.write_text(json.dumps({"fits": [fitted]}))
    monkeypatch.setattr(regression, "FILE", path)
    monkeypatch.setattr(regression, "features", None)
    found = regression.score(candidate(), bench)
    assert (found.value, found.text) == (3.25, 0.5)


def test_what_it_was_not_fitted_for_is_refused(
    bench: Bench, fitted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_size = candidate().space.at_resolution(512).candidate(**candidate().choices)
    with pytest.raises(
        NasError, match=r"not fitted for space snapgen_unet \(\w+\); fitted are: snapgen_unet"
    ) as caught:
        regression.score(other_size, bench)
    assert caught.value.hint == "python benchmarks/fit_regression.py"
    other = Bench(write_teacher(tmp_path_factory.mktemp("other"), seed=1), TINY)
    with pytest.raises(NasError, match=r"not fitted for the teacher .*teacher-1\.safetensors' with the task shapes"):
        regression.score(candidate(), other)
    with pytest.raises(
        NasError, match=r"not fitted for a bench with batch = 8 \(not 4\), text_weight = 1.0 \(not 2.0\)"
    ):
        regression.score(candidate(), Bench(bench.teacher, replace(TINY, batch=8, text_weight=1.0)))
    # What decides no feature does not matter.
    assert regression.fit_for(candidate().space, Bench(bench.teacher, replace(TINY, held_rows=64))) == fitted
    monkeypatch.setattr(regression, "FILE", Path("nowhere.json"))
    with pytest.raises(NasError, match="fitted are: none"):
        regression.score(candidate(), bench)


# The command


def command() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "fit_regression.py"
    spec = importlib.util.spec_from_file_location("fit_regression", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def truth_row(own: Candidate, seed: int, quality: float, digest: str = "d") -> dict[str, Any]:
    space, choices = own.space, json.dumps(own.choices)
    where = {"digest": digest, "space": space.name, "space_hash": space.hash, "key": own.key, "seed": seed}
    return {**where, "choices": choices, "quality_db": quality, "text_db": quality / 10}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command_averages_seeds() -> None:
    fitting, one, two = command(), candidate(), candidate(width_0=256)
    rows = [truth_row(one, 1, 3.0), truth_row(one, 2, 4.0), truth_row(two, 1, 5.0)]
    found = fitting.truth_of(rows, one.space)
    assert {key: row["quality_db"] for key, row in found.items()} == {one.key: 3.5, two.key: 5.0}
    assert one.space.candidate(**found[one.key]["choices"]) == one


def test_of_a_mixed_table_the_most_frequent_settings_of_each_space_count() -> None:
    one, two = candidate(), candidate(width_0=256)
    begun = [truth_row(one, seed, 9.0, digest="old") for seed in (1, 2)]
    again = [truth_row(each, seed, 1.0, digest="new") for each in (one, two) for seed in (1, 2)]
    other = [{**truth_row(one, 1, 2.0, digest="old"), "space": "another"}]
    assert most_frequent([*begun, *again, *other]) == [*again, *other]
    assert most_frequent([]) == []


def test_the_command_writes_what_the_proxy_reads(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = command()
    space = candidate().space
    own = [space.from_row(row) for row in space.sample(12, 3)]
    monkeypatch.setattr(fitting, "settings_of", lambda name: TINY)
    known = {c.key: {n: row[n] for n in FEATURES} for c, row in zip(own, linear_rows(12), strict=True)}
    monkeypatch.setattr(fitting, "with_features", lambda *given: known)
    truth = write(
        tmp_path / "truth.csv",
        [truth_row(each, 1, row["quality_db"]) for each, row in zip(own, linear_rows(12), strict=True)],
    )
    out, said = tmp_path / "regression.json", []
    assert fitting.main(["--truth", str(truth), "--teacher", bench.teacher, "--out", str(out)], said.append) == 0
    assert "snapgen_unet: 12 candidates, left out one by one: quality_db Kendall" in said[-1]
    found = regression.fit_for(space, bench, out)
    left_out = found["targets"]["quality_db"]["left_out"]
    monkeypatch.setattr(regression, "FILE", out)
    assert regression.score(own[3], bench).value == left_out[own[3].key]
    noise = write(tmp_path / "noise.csv", [truth_row(each, 1, i % 5) for i, each in enumerate(own)])
    assert fitting.main(["--truth", str(noise), "--teacher", bench.teacher, "--out", str(out)], said.append) == 1
    assert "a fit that explains less than 50% is not used" in said[-1]
    few = write(tmp_path / "few.csv", [truth_row(each, 1, 1.0) for each in own[:3]])
    assert fitting.main(["--truth", str(few), "--teacher", bench.teacher, "--out", str(out)], said.append) == 1
    assert said[-1].startswith("snapgen_unet: no fit: a regression needs 8 candidates")


def test_features_are_worked_out_once(bench: Bench, tmp_path: Path) -> None:
    fitting, said = command(), []
    path = tmp_path / "features.csv"
    first = fitting.with_features([candidate()], bench, path, 1, said.append)
    again = fitting.with_features([candidate()], bench, path, 1, said.append)
    assert first == again
    assert len(said) == 1
    assert first[candidate().key] == pytest.approx(regression.features(candidate(), bench))
