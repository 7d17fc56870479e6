"""`nas spaces` and `nas profile`: what they print, what they refuse, and what they leave behind."""

from __future__ import annotations

import json
import re

import pytest

from nas.cli import main
from nas.cli.names import chosen, name_list, published
from nas.space import list_spaces, load_space
from tests.model_configs import KOALA, write
from tests.profile_cases import Linear


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def lying(tmp_path):
    """A space file whose reference claims one parameter too many."""
    text = load_space("decoder").path.read_text()
    path = tmp_path / "lying.toml"
    path.write_text(text.replace("params = 1222531", "params = 1222532"))
    return path


# nas spaces


def test_spaces_are_listed_with_their_exact_size(capsys):
    code, out, err = run(capsys, "spaces")
    assert code == 0
    assert not err
    lines = {line.split()[0]: line for line in out.splitlines()[2:]}
    for name in list_spaces():
        space = load_space(name)
        assert f"{space.count:,}" in lines[name]
        assert all(reference.name in lines[name] for reference in space.references)


def test_show_sets_published_beside_computed(capsys):
    code, out, err = run(capsys, "spaces", "show", "decoder")
    assert code == 0
    space = load_space("decoder")
    assert f"{space.count:,} distinct candidates ({space.size:,} combinations of choices)" in out
    for choice in space.choices:
        assert space.meanings[choice.name] in out
    for rule in space.rules:
        assert rule.because in out
    (params,) = [line for line in out.splitlines() if line.startswith("taesd ") and "1,222,531" in line]
    assert params.split()[-2:] == ["1,222,531", "1,222,531"]
    (macs,) = [line for line in out.splitlines() if line.startswith("taesd ") and "512 px" in line]
    assert re.search(r" 70\.675 +70\.67\d +[+-]?0\.00\d %$", macs)
    assert "references" in err  # progress


def test_show_is_one_json_document(capsys):
    code, out, _ = run(capsys, "spaces", "show", "decoder", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["candidates"] == load_space("decoder").count
    (taesd,) = [r for r in found["references"] if r["name"] == "taesd"]
    assert taesd["params"] == taesd["params_computed"] == 1_222_531
    assert [call["px"] for call in taesd["calls"]] == [512, 1024]
    assert all(abs(call["difference"]) < 1e-3 for call in taesd["calls"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["spaces", "show", "LYING"],
        ["profile", "--space", "LYING", "--reference", "taesd"],
        ["profile", "--space", "LYING"],
        ["profile", "--space", "LYING", "--compare", "sd-vae", "taesd"],
    ],
    ids=["show", "one", "space", "compare"],
)
def test_a_claim_that_does_not_hold_is_an_error_everywhere(capsys, tmp_path, lying, arguments):
    code, _, err = run(capsys, *(lying if argument == "LYING" else argument for argument in arguments))
    assert code == 1
    said = f"nas: {lying}: reference 'taesd' claims 1,222,532 parameters, but the network of its choices has 1,222,531"
    assert said in err.splitlines()
    assert not list(tmp_path.rglob("*.html"))


def test_rules_that_leave_nothing_are_an_error_of_the_file(capsys, tmp_path):
    text = load_space("decoder").path.read_text()
    path = tmp_path / "empty.toml"
    path.write_text(text + '\n[[rules]]\nwhen = { expansion = [1, 2] }\nforbid = true\nbecause = "none of it"\n')
    code, _, err = run(capsys, "spaces", "show", path)
    assert code == 2
    number = text.count("[[rules]]")
    assert err.startswith(f"nas: {path}: no candidate is left by [rules[{number}]] (none of it)")


# nas profile


def test_a_profile_is_one_json_object_with_every_counter(capsys, tmp_path):
    page = tmp_path / "page.html"
    asked = ["profile", "--space", "sdxl_unet", "--reference", "koala-700m", "--resolution", "128", "--json"]
    code, out, err = run(capsys, *asked, "--out", page, "--steps", "7", "--no-guidance", "--text-encoders", "none")
    assert code == 0
    found = json.loads(out)
    assert found["params"] == sum(block["params"] for block in found["blocks"]) == 782_822_724
    assert found["references"] == ["koala-700m"]
    counters = {counter["name"]: counter for counter in found["counters"]}
    assert {"nas", "torch_flop_counter", "fvcore", "thop"} <= set(counters)
    assert counters["nas"]["macs"] == counters["torch_flop_counter"]["macs"] == found["macs"]
    assert all(counter["leaves_out"] for counter in counters.values())
    assert [(part["role"], part["calls"]) for part in found["pipeline"]["parts"]] == [("denoiser", 7), ("decoder", 1)]
    assert page.is_file()
    assert f"wrote {page}" in err


def test_a_profile_prints_stages_blocks_and_a_whole_image(capsys):
    asked = ["profile", "--space", "sdxl_unet", "--reference", "koala-700m", "--resolution", "128"]
    code, out, _ = run(capsys, *asked, "--text-encoders", "none")
    assert code == 0
    assert "the reference koala-700m of the space sdxl_unet" in out
    for name in ("up_blocks.1", "up_blocks.1.resnets.0", "782,822,724 parameters", "sd-vae", "with guidance"):
        assert name in out
    assert "torch_flop_counter" not in out
    assert out.splitlines()[-1] == "next: nas profile --space sdxl_unet"


@pytest.mark.parametrize("option", ["--device", "--target"])
def test_a_device_adds_time_by_stage_part_and_operator(capsys, monkeypatch, option):
    monkeypatch.setattr("nas.latency.load_predictor", lambda slug: Linear())
    asked = ["profile", "--space", "sd_unet", "--reference", "bk-sdm-tiny", "--resolution", "128", option, "iphone"]
    code, out, _ = run(capsys, *asked)
    assert code == 0
    heads = [line.split() for line in out.splitlines()]
    assert ["stage", "part", "blocks", "ms", "%", "MACs", "%", "params", "%"] in heads
    assert ["operator", "operators", "GMACs", "moved", "MB", "ms", "share", "GMAC/s", "GB/s"] in heads
    assert "The roof of iphone-16-pro-max--coreml--fp16 is" in out
    assert "of the parameters (" in out.splitlines()[2]


@pytest.mark.slow
def test_measured_stands_beside_predicted(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("nas.latency.load_predictor", lambda slug: Linear())
    page = tmp_path / "page.html"
    asked = ["profile", "--space", "decoder", "--reference", "taesd", "--resolution", "64", "--target", "cpu"]
    code, out, _ = run(capsys, *asked, "--measure", "--out", page)
    assert code == 0
    assert "Measured on this machine: " in out
    assert "timed alone add up to" in out
    assert "% of them belong to a block" in out
    assert '<section id="measured">' in page.read_text()


def test_references_and_models_stand_side_by_side(capsys, tmp_path):
    model = write(tmp_path / "mine.json", KOALA | {"transformer_layers_per_block": [1, 2, 4]})
    asked = ["profile", "--compare", "koala-700m", "segmind-vega", "--model", model, "--resolution", "128"]
    code, out, _ = run(capsys, *asked)
    assert code == 0
    assert "  mine: a candidate of the space sdxl_unet" in out
    heads = [line for line in out.splitlines() if line.split()[-3:] == ["koala-700m", "segmind-vega", "mine"]]
    assert [line.split("  ")[0] for line in heads] == ["million parameters", "GMACs", "GMACs by operation"]
    assert "segmind-vega against koala-700m: −4.8 % parameters (up_blocks.0 −86.6 M" in out
    code, out, _ = run(capsys, *asked, "--json")
    assert [network["name"] for network in json.loads(out)["networks"]] == ["koala-700m", "segmind-vega", "mine"]
    assert (tmp_path / "reports" / "profiles" / "koala-700m-segmind-vega-mine-128px.html").is_file()


def test_a_comparison_is_at_the_first_networks_size(capsys):
    _, out, _ = run(capsys, "profile", "--space", "decoder", "--compare", "taesd", "snapgen-tiny", "--resolution", "64")
    assert out.startswith("one decoder call each for an image of 64 × 64 px")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--model", "none.json"], 2, "no model at none.json"),
        (["--model", "KOALA", "--space", "sdxl_unet"], 2, "leave out --space"),
        (["--model", "KOALA", "--reference", "koala-1b"], 2, "leave out --reference"),
        (["--model", "KOALA", "--model", "KOALA"], 2, "one network is profiled at a time"),
        (["koala-700m", "koala-1b"], 2, "one network is profiled at a time, got koala-700m, koala-1b"),
        (["--model", "KOALA", "--resolution", "1000"], 2, "does not suit"),
        (["--compare", "koala-70m", "koala-1b"], 2, "did you mean 'koala-700m'?"),
        (["--space", "sd_unet", "--compare", "koala-700m", "sd-v1.5"], 2, "unknown reference 'koala-700m' in space"),
        (["--compare", "koala-700m"], 2, "needs at least two networks, got 1"),
        (["--compare", "koala-700m", "koala-700m"], 2, "koala-700m is named twice"),
        (["--compare", "koala-700m", "--candidate", "mid=full"], 2, "not --candidate"),
        (["--compare", "koala-700m", "koala-1b", "--steps", "3"], 2, "steps cannot be set"),
        (["--space", "decoder", "--reference", "taesd", "--steps", "3"], 2, "has no [pipeline]"),
        (["--space", "sdxl_unet", "--steps", "3"], 2, "steps can be set for one network"),
        (["--space", "sdxl_unet", "--reference", "koala-700m", "--decoder", "taesdd"], 2, "did you mean 'taesd'?"),
        (["--space", "sdxl_unet", "--reference", "koala-700m", "--resolution", "100"], 2, "positive multiple of 32 px"),
        (["--model", "ODD", "--steps", "2"], 2, "there is no pipeline whose steps to set"),
        (["--model", "someone/something"], 1, "no model at someone/something"),
        (["--space", "decoder", "--reference", "taesd", "--measure"], 2, "--measure needs a device"),
        (["--space", "decoder", "--measure", "--target", "cpu"], 2, "--measure times one network"),
        (["--space", "sd_unet", "--compare", "sd-v1.5", "bk-sdm-tiny", "--measure"], 2, "--measure times one network"),
        (["--space", "sd_unet", "--reference", "sd-v1.5", "--measure", "--device", "iphone"], 2, "names no backend"),
    ],
)
def test_what_cannot_be_profiled_is_one_sentence(capsys, tmp_path, arguments, code, sentence):
    files = {
        "KOALA": write(tmp_path / "koala.json", KOALA),
        "ODD": write(tmp_path / "odd.json", KOALA | {"block_out_channels": [320, 640, 1920]}),
    }
    got, out, err = run(capsys, "profile", *(files.get(argument, argument) for argument in arguments))
    assert got == code
    assert not out
    said = [line for line in err.splitlines() if line.startswith("nas: ")]
    assert len(said) == 1
    assert sentence in said[0]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.html"))


# Names


def test_a_reference_stands_at_its_own_published_input():
    turbo, name = chosen(None, "sdxl_unet", "sdxl-turbo", None, None)
    assert (name, turbo.space.resolution_px) == ("sdxl-turbo", 512)
    assert chosen(None, "sdxl_unet", "sdxl-turbo", None, 1024)[0].space.resolution_px == 1024
    sd2 = published("sd_unet", "sd-v2.1-base", 256)
    assert (sd2.space.resolution_px, sd2.space.input.text_width) == (256, 1024)
    changed, _ = chosen(None, "sd_unet", "sd-v2.1-base", "mid=none", None)
    assert changed.space.input.text_width == 1024


@pytest.mark.parametrize(("text", "names"), [(None, None), ("none", ()), ("clip-l", ("clip-l",)), ("a, b", ("a", "b"))])
def test_lists_of_names(text, names):
    assert name_list(text) == names


def test_the_next_command_names_a_space_as_it_must_be_typed(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(load_space("decoder").path.read_text())
    assert main(["spaces", "show", str(path)]) == 0
    assert f"next: nas profile --space {path} --reference" in capsys.readouterr().out
    assert main(["spaces", "show", "decoder"]) == 0
    assert "next: nas profile --space decoder --reference" in capsys.readouterr().out
