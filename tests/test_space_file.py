"""A space file that is wrong is told in one sentence with file, line and field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nas.errors import UsageError
from nas.space import load_space
from nas.space_file import Choice, InputSettings, Pipeline, Reference, Rule, read_space_file

# Line numbers matter below: the text starts on line 1.
TEXT = """family = "unet"
summary = "two choices"
sources = ["a book"]
[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
text_tokens = 7
text_width = 16
[fixed]
stages = 2
[choices]
depth = [0, 1]
attention = ["mha", "mqa"]
[[rules]]
when = { depth = [0] }
inactive = ["attention"]
because = "nothing attends"
[[rules]]
when = { depth = [1], attention = ["mqa"] }
forbid = true
because = "never seen"
[pipeline]
steps = 4
guidance = false
text_encoders = ["one", "two"]
decoder = "tiny"
source = "a paper"
[[reference]]
name = "one"
title = "the first"
source = "a book"
choices = { depth = 1, attention = "mha" }
[[reference]]
name = "two"
title = "the second"
source = "a book"
params = 12
gmacs = { "512" = 1.5 }
step_ms = { "phone--coreml--fp16" = 2.5 }
choices = { depth = 0 }
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_whole(tmp_path: Path):
    path = _write(tmp_path, TEXT)
    data = read_space_file(path)
    assert (data["name"], data["family"], data["summary"], data["sources"]) == (
        "mine",
        "unet",
        "two choices",
        ("a book",),
    )
    assert data["path"] == path
    assert data["fixed"] == {"stages": 2}
    assert data["input"] == InputSettings(
        latent_channels=4, latent_height=16, latent_width=16, pixels_per_latent=8, text_tokens=7, text_width=16
    )
    assert data["choices"] == (
        Choice(name="depth", values=(0, 1), ordinal=True),
        Choice(name="attention", values=("mha", "mqa"), ordinal=False),
    )
    assert data["rules"] == (
        Rule(when=(("depth", (0,)),), inactive=("attention",), because="nothing attends"),
        Rule(when=(("depth", (1,)), ("attention", ("mqa",))), inactive=(), because="never seen"),
    )
    assert [rule.forbids for rule in data["rules"]] == [False, True]
    assert data["pipeline"] == Pipeline(
        steps=4, guidance=False, text_encoders=("one", "two"), decoder="tiny", source="a paper"
    )
    one, two = data["references"]
    assert one == Reference(name="one", title="the first", choices={"depth": 1, "attention": "mha"}, source="a book")
    assert (one.params, one.gmacs, one.step_ms) == (None, None, None)
    assert (two.params, two.gmacs, two.step_ms) == (12, {"512": 1.5}, {"phone--coreml--fp16": 2.5})


def test_optional_tables_may_be_left_out(tmp_path: Path):
    head, _, rest = TEXT.partition("[fixed]\nstages = 2\n")
    text = head + rest.partition("[[reference]]")[0]
    text = text.partition("[[rules]]")[0] + "[pipeline]" + text.partition("[pipeline]")[2]
    data = read_space_file(_write(tmp_path, text.replace('summary = "two choices"\n', "")))
    assert (data["fixed"], data["rules"], data["references"], data["summary"]) == ({}, (), (), "")
    bare = text.partition("[pipeline]")[0].replace("text_tokens = 7\ntext_width = 16\n", "")
    data = read_space_file(_write(tmp_path, bare))
    assert (data["pipeline"], data["meanings"]) == (None, {})
    assert (data["input"].shape.text_tokens, data["input"].shape.text_width) == (0, 0)


def test_meanings_are_of_choices(tmp_path: Path):
    meant = TEXT.replace("[[rules]]", '[meanings]\ndepth = "how many"\n[[rules]]', 1)
    assert read_space_file(_write(tmp_path, meant))["meanings"] == {"depth": "how many"}
    with pytest.raises(UsageError, match=r"unknown key 'dept' in .*\[meanings\]; did you mean 'depth'"):
        read_space_file(_write(tmp_path, meant.replace('depth = "how', 'dept = "how')))
    with pytest.raises(UsageError, match=r"\[meanings\]: depth must be a text, got 3"):
        read_space_file(_write(tmp_path, meant.replace('"how many"', "3")))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # keys
        ("family =", "famly =", r"mine\.toml:1; did you mean 'family'"),
        ("latent_height =", "latent_heigth =", r"mine\.toml:6 \[input\]; did you mean 'latent_height'"),
        ("guidance =", "guidence =", r"mine\.toml:26 \[pipeline\]; did you mean 'guidance'"),
        ('inactive = ["att', 'inactiv = ["att', r"mine\.toml:18 \[rules\[0\]\]; did you mean 'inactive'"),
        ("forbid = true", "forbids = true", r"mine\.toml:22 \[rules\[1\]\]; did you mean 'forbid'"),
        ("gmacs = {", "gmac = {", r"mine\.toml:40 \[reference\[1\]\]; did you mean 'gmacs'"),
        ("[fixed]", "[fxied]", r"unknown key 'fxied' in .*mine\.toml:11; did you mean 'fixed'"),
        ('family = "unet"\n', "", r"mine\.toml: needs the key 'family'"),
        ("text_width = 16\n", "", r"mine\.toml: \[input\] needs the key 'text_width'"),
        ('because = "never seen"\n', "", r"\[rules\[1\]\] needs the key 'because'"),
        ('title = "the second"\n', "", r"\[reference\[1\]\] needs the key 'title'"),
        # values
        (
            "latent_channels = 4",
            "latent_channels = 4.0",
            r":5 \[input\]: latent_channels must be a whole number .* got 4\.0",
        ),
        ("text_tokens = 7", "text_tokens = 0", r":9 \[input\]: text_tokens must be a whole number above 0, got 0"),
        ("steps = 4", "steps = true", r":25 \[pipeline\]: steps must be a whole number above 0, got True"),
        ("guidance = false", 'guidance = "no"', r":26 \[pipeline\]: guidance must be true or false, got 'no'"),
        (
            'text_encoders = ["one", "two"]',
            'text_encoders = "one"',
            r":27 \[pipeline\]: text_encoders must be a list of texts, got 'one'",
        ),
        ('decoder = "tiny"', "decoder = 3", r":28 \[pipeline\]: decoder must be a text, got 3"),
        ('decoder = "tiny"\n', "", r"\[pipeline\] needs the key 'decoder'"),
        ('decoder = "tiny"', 'parts = ["decoder"]', r"unknown key 'parts' in .*:28 \[pipeline\]"),
        ('family = "unet"', "family = 3", r"mine\.toml:1: family must be a text, got 3"),
        ('sources = ["a book"]', 'sources = "a book"', r":3: sources must be a list of texts, got 'a book'"),
        ("stages = 2", "stages = [2]", r":11: fixed must be a table of plain values"),
        ("params = 12", "params = 1.5", r":39 \[reference\[1\]\]: params must be a whole number above 0, got 1\.5"),
        ("= 2.5 }", "= 0 }", r":41 \[reference\[1\]\]: step_ms must be a table of numbers above 0"),
        ("choices = { depth = 0 }", "choices = 3", r":42 \[reference\[1\]\]: choices must be a table"),
        ("[pipeline]", "pipelin = 3\n[pipeline]", r"unknown key 'pipelin'"),
        # choices
        ("depth = [0, 1]", "depth = 3", r":14 \[choices\]: depth must be a list of at least one value, got 3"),
        ("depth = [0, 1]", "depth = []", r":14 \[choices\]: depth must be a list of at least one value"),
        ("depth = [0, 1]", "depth = [1, 0]", r":14 \[choices\]: the numbers of depth must ascend, got \[1, 0\]"),
        ("depth = [0, 1]", "depth = [0, 1, 1]", r":14 \[choices\]: depth must hold distinct plain values"),
        ("depth = [0, 1]", "depth = [0, 1, true]", r":14 \[choices\]: depth must hold distinct plain values"),
        ("depth = [0, 1]", "depth = [[0], [1]]", r":14 \[choices\]: depth must hold distinct plain values"),
        ("stages = 2", "depth = 2", r":14 \[choices\]: depth is also in \[fixed\]"),
        # rules
        ("when = { depth = [0] }", "when = { detph = [0] }", r":17 \[rules\[0\]\]; did you mean 'depth'"),
        ("when = { depth = [0] }", "when = { depth = [7] }", r"unknown value of depth '7' in .*:17 \[rules\[0\]\]"),
        (
            "when = { depth = [0] }",
            "when = { depth = 0 }",
            r":17 \[rules\[0\]\]: when must be a table of choices, each with",
        ),
        ("when = { depth = [0] }", 'when = { attention = "mha" }', r":17 \[rules\[0\]\]: when must be a table"),
        ("when = { depth = [0] }", "when = { depth = [] }", r":17 \[rules\[0\]\]: when must be a table"),
        ("when = { depth = [0] }", "when = {}", r":17 \[rules\[0\]\]: when must be a table"),
        ("when = { depth = [0] }", "when = 3", r":17 \[rules\[0\]\]: when must be a table"),
        ('inactive = ["attention"]', 'inactive = ["atention"]', r"unknown choice 'atention' in .*\[rules\[0\]\]"),
        ('inactive = ["attention"]', 'inactive = "attention"', r":18 \[rules\[0\]\]: inactive must be a list of texts"),
        ('inactive = ["attention"]\n', "", r"\[rules\[0\]\] needs exactly one of"),
        ("forbid = true", 'forbid = true\ninactive = ["attention"]', r":21 \[rules\[1\]\] needs exactly one of"),
        ("forbid = true", 'forbid = "yes"', r":22 \[rules\[1\]\]: forbid must be true or false, got 'yes'"),
        ("forbid = true", "forbid = false", r":21 \[rules\[1\]\] needs exactly one of"),
        # references
        ('name = "two"', 'name = "one"', r":36 \[reference\[1\]\]: the name 'one' is taken"),
        ("depth = 1, att", "detph = 1, att", r"reference 'one': unknown choice 'detph'.* did you mean 'depth'"),
        ('1, attention = "mha"', '1, attention = "gqa"', r"reference 'one': unknown value of attention 'gqa'"),
        ('1, attention = "mha"', '1, attention = "mqa"', r"reference 'one': .*forbids this combination: never seen"),
        ("choices = { depth = 0 }", "choices = {}", r"reference 'two': .*no value was given for depth"),
        # not TOML
        ("depth = [0, 1]", "depth = [0, 1", r"mine\.toml: not valid TOML: .*line 1[45]"),
        ("stages = 2", "stages = 2\nstages = 3", r"mine\.toml: not valid TOML: .*line 13"),
    ],
)
def test_a_wrong_file_names_line_and_field(tmp_path: Path, old: str, new: str, words: str):
    assert TEXT.count(old) == 1 or old in ('sources = ["a book"]',)
    with pytest.raises(UsageError, match=words) as caught:
        load_space(_write(tmp_path, TEXT.replace(old, new)))
    assert "mine.toml" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rules = 3", "rules must be a list of tables, got 3"),
        ("rules = [3]", r"\[rules\[0\]\] must be a table, got 3"),
        ("reference = 3", "reference must be a list of tables, got 3"),
        ("reference = [3]", r"\[reference\[0\]\] must be a table, got 3"),
        ("fixed = 3", "fixed must be a table of plain values, got 3"),
        ("choices = {}", r"\[choices\] needs at least one choice"),
        ("choices = 3", "choices must be a table, got 3"),
        ("input = 3", "input must be a table, got 3"),
        ("pipeline = 3", "pipeline must be a table, got 3"),
    ],
)
def test_a_table_of_the_wrong_form_is_one_sentence(tmp_path: Path, line: str, words: str):
    key = line.split()[0]
    lines = {
        "input": f"input = {{ {', '.join(f'{field.name} = 1' for field in dataclasses.fields(InputSettings))} }}",
        "choices": "choices = { depth = [0] }",
        "pipeline": 'pipeline = { steps = 1, guidance = false, text_encoders = [], decoder = "d", source = "x" }',
    }
    text = "\n".join(['family = "unet"', *(v for k, v in lines.items() if k != key)])
    load_space(_write(tmp_path, "\n".join(['family = "unet"', *lines.values()])))
    with pytest.raises(UsageError, match=words):
        load_space(_write(tmp_path, f"{text}\n{line}"))


def test_a_file_that_is_not_text_or_not_there_is_one_sentence(tmp_path: Path):
    path = tmp_path / "mine.toml"
    with pytest.raises(UsageError, match="cannot be read"):
        read_space_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_space_file(path)
