"""`nas inherit` as it is typed; what it makes of the weights is in test_inherit.py."""

from __future__ import annotations

import json

import pytest

from nas import families
from nas.build import build
from nas.checkpoint import load, save_diffusers, save_network
from nas.cli import main
from nas.formats import pixart
from nas.space import load_space

SPACE = """
family = "decoder"
[input]
latent_channels = 4
latent_height = 8
latent_width = 8
pixels_per_latent = 2
[fixed]
style = "taesd"
stages = 2
norm_groups = 1
width_0 = 8
width_1 = 8
[choices]
resnets_0 = [1, 2]
resnets_1 = [1]
[[reference]]
name = "large"
title = "two units, then one"
source = "none"
choices = { resnets_0 = 2, resnets_1 = 1 }
"""
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_size": 8,
}


@pytest.fixture
def line(tmp_path, monkeypatch):
    """A command that lacks the teacher, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SPACE)
    large = families.network(load_space("mine.toml").reference("large"))
    save_network(tmp_path / "teacher.safetensors", build(large, seed=0))
    return ["inherit", "--space", "mine.toml", "--candidate", "resnets_0=1,resnets_1=1"]


def test_a_file_to_write_is_the_file_that_the_next_command_reads(line, tmp_path, capsys):
    assert main([*line, "--teacher", "teacher.safetensors", "--out", "student.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: nas export student.safetensors"
    assert load(tmp_path / "student.safetensors").spec.input.height == 8


def test_what_is_inherited_can_be_exported(line, tmp_path, capsys):
    assert main([*line, "--teacher", "teacher.safetensors", "--out", "student"]) == 0
    plain = build(pixart.network(PIXART, name="pixart", where="config.json"), seed=0)
    save_diffusers(tmp_path / "plain", plain)
    for folder, network in (("student", load(tmp_path / "student")), ("plain", plain)):
        capsys.readouterr()
        assert main(["export", folder, "--out", f"{folder}.onnx", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["params"] == sum(p.numel() for p in network.parameters())
        assert (tmp_path / f"{folder}.onnx").is_file()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--out", "taken"], 1, "taken holds notes.txt, which is not of a network"),
        (["--out", "taken/notes.txt"], 1, "cannot write taken/notes.txt: Not a directory"),
        (["--inherit", "l2"], 2, "unknown way to choose channels 'l2'"),
    ],
)
def test_what_is_typed_wrongly_is_told_before_the_teacher_is_read(line, tmp_path, capsys, more, code, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert main([*line, "--teacher", "nowhere", *more]) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_a_teacher_of_which_nothing_fits_is_refused_and_nothing_is_written(line, tmp_path, capsys):
    other = pixart.network(PIXART, name="pixart", where="config.json")
    save_network(tmp_path / "pixart.safetensors", build(other, seed=0))
    assert main([*line, "--teacher", "pixart.safetensors", "--out", "student"]) == 1
    assert "no tensor of pixart.safetensors fits a block of" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
