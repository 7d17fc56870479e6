"""`nas export`: every format of nas/exporters/, what is checked against torch, and what is said where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nas import registry
from nas.cli import main

NETWORK = ["--space", "decoder", "--reference", "taesd", "--resolution", "32"]
EXPORTER = """
SUFFIX = ".count"
def unavailable():
    return None
def export(module, inputs, path, *, letter: "str" = "a", times: "int" = 1, other: "dict" = {{}}):
    path.write_text(letter * times)
{rest}
"""


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["export", *NETWORK, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def plugin(folder: Path, rest: str = "") -> str:
    path = folder / f"exporter_{abs(hash(rest))}.py"
    path.write_text(EXPORTER.format(rest=rest))
    return str(path)


@pytest.mark.parametrize("name", registry.plugins("nas.exporters"))
def test_every_format_says_its_ending(name):
    suffix = registry.load("nas.exporters", name).SUFFIX
    assert suffix.startswith(".")
    assert suffix == suffix.lower()


def test_a_format_that_cannot_be_checked_says_why(run, tmp_path):
    rest = "def verify(path, module, inputs):\n    raise AssertionError\ndef unverifiable():\n    return 'no phone'"
    code, out, err = run("--format", plugin(tmp_path, rest), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["largest_difference"] is None
    assert found["not_checked"] == "no phone"
    assert Path(found["path"]).read_text() == "a"
    assert found["path"].startswith("exports/")
    assert found["path"].endswith(".count")
    assert f"wrote {found['path']}" in err
    code, out, _ = run("--format", plugin(tmp_path, rest))
    assert code == 0
    assert "parameters; not checked here: no phone" in out
    code, out, _ = run("--format", plugin(tmp_path))
    assert code == 0
    assert "not checked here: format" in out
    assert "has no parity check" in out


@pytest.mark.parametrize(
    ("rest", "wanted"),
    [
        ("def verify(path, module, inputs):\n    return 5e-4", 0),
        ("def verify(path, module, inputs):\n    return 5e-3", 1),
        ("def verify(path, module, inputs):\n    return float('nan')", 1),
        ("def verify(path, module, inputs):\n    return 5e-3\ndef allowed(letter='a'):\n    return 1e-2", 0),
        ("def verify(path, module, inputs):\n    return 5.0\ndef allowed(letter='a'):\n    return None", 0),
    ],
)
def test_a_difference_is_judged_by_what_the_format_allows(run, tmp_path, rest, wanted):
    code, out, err = run("--format", plugin(tmp_path, rest), "--out", str(tmp_path / "x.count"))
    assert code == wanted
    assert "largest difference from torch" in out
    assert ("differs from torch by" in err) == bool(wanted)
    assert (tmp_path / "x.count").is_file()


def test_options_reach_the_exporter_in_its_types(run, tmp_path):
    place = str(tmp_path / "x.count")
    arguments = ["--format", plugin(tmp_path), "--out", place, "--option", "letter=b=", "--option", "times=3"]
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    assert Path(place).read_text() == "b=b=b="
    assert json.loads(out)["options"] == {"letter": "b=", "times": 3}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("letter", "--option takes NAME=VALUE, got 'letter'"),
        ("leter=b", "did you mean 'letter'?"),
        ("other={}", "unknown option 'other'"),
        ("times=many", "--option times must be a whole number, got 'many'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_built(run, tmp_path, option, named):
    code, _, err = run("--format", plugin(tmp_path), "--option", option)
    assert code == 2
    assert named in err
    assert not (tmp_path / "exports").exists()


def test_a_format_whose_package_is_missing_names_the_extra(run, monkeypatch):
    exporter = registry.load("nas.exporters", "executorch")
    monkeypatch.setattr(exporter, "unavailable", lambda: "the package executorch is not installed")
    code, _, err = run("--format", "executorch")
    assert code == 1
    assert "format executorch cannot be written here: the package executorch is not installed" in err
    assert 'try: pip install -c constraints.txt -e ".[executorch]"' in err


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.plugins("nas.exporters"))
def test_every_format_here_is_written(run, name):
    exporter = registry.load("nas.exporters", name)
    if reason := exporter.unavailable():
        pytest.skip(reason)
    code, out, _ = run("--format", name, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["path"].endswith(exporter.SUFFIX)
    assert Path(found["path"]).exists()
    assert (found["largest_difference"] is None) == (found["not_checked"] is not None)


@pytest.mark.slow
def test_core_ml_weights_are_compressed_by_option(run):
    exporter = registry.load("nas.exporters", "coreml")
    if reason := exporter.unavailable():
        pytest.skip(reason)
    sizes = {}
    for arguments in ((), ("--option", "weights=4-bit")):
        code, out, _ = run("--format", "coreml", *arguments, "--json")
        assert code == 0
        sizes[arguments] = exporter.contents(json.loads(out)["path"]).weight_bytes
    full, small = sizes.values()
    assert small == pytest.approx(full / 4, rel=0.1)
    code, _, err = run("--format", "coreml", "--option", "weights=3-bit")
    assert code == 2
    assert "known: 4-bit, 6-bit, int8" in err
