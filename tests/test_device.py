"""Targets, device sheets and budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.device import Budget, Target, find_target, list_targets, load_sheet
from nas.errors import NasError, UsageError

SHEET = """
device = "phone-1"
chip = "A1"
runtime = "coreml"
precision = "fp16"
aliases = ["phone", "p1"]
summary = "a phone"
shared = true
sources = ["a book"]
[roofline]
ms_per_gmac = 0.5
[chips.A0]
tflops = 1.0
"""


def _write(folder: Path, text: str = SHEET, name: str = "phone-1--coreml--fp16") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("extra", "slug"),
    [
        ({}, "a--b--fp32"),
        ({"threads": 2}, "a--b--fp32--t2"),
        ({"batch": 4}, "a--b--fp32--b4"),
        ({"threads": 2, "batch": 4}, "a--b--fp32--t2--b4"),
    ],
)
def test_slug_tells_threads_and_batch_only_when_not_one(extra: dict[str, int], slug: str):
    assert Target(device="a", runtime="b", precision="fp32", **extra).slug == slug


def test_a_sheet_is_read_whole(tmp_path: Path):
    sheet = load_sheet(_write(tmp_path))
    assert sheet.target == Target(device="phone-1", runtime="coreml", precision="fp16")
    assert (sheet.slug, sheet.alias, sheet.aliases) == ("phone-1--coreml--fp16", "phone", ("phone", "p1"))
    assert (sheet.chip, sheet.summary, sheet.backend, sheet.shared) == ("A1", "a phone", None, True)
    assert sheet.roofline == {"ms_per_gmac": 0.5}
    assert sheet.chips == {"A0": {"tflops": 1.0}}
    assert sheet.sources == ("a book",)


def test_a_sheet_may_say_little(tmp_path: Path):
    text = 'device = "d"\nruntime = "r"\nprecision = "fp32"\nthreads = 2\nbatch = 3\nbackend = "tvm"\n'
    sheet = load_sheet(_write(tmp_path, text, "d--r--fp32--t2--b3"))
    assert (sheet.target.threads, sheet.target.batch, sheet.backend) == (2, 3, "tvm")
    assert sheet.alias == sheet.slug
    assert sheet.shared is False


def test_a_sheet_must_be_named_after_its_target(tmp_path: Path):
    with pytest.raises(UsageError, match=r"wrong\.toml: the file must be named .* phone-1--coreml--fp16\.toml"):
        load_sheet(_write(tmp_path, name="wrong"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('chip = "A1"', 'chpi = "A1"', "unknown key 'chpi' in .*did you mean 'chip'"),
        ('runtime = "coreml"', "", "runtime must be lower-case words joined by '-', got None"),
        ('device = "phone-1"', 'device = "Phone 1"', "device must be lower-case words joined by '-', got 'Phone 1'"),
        ('device = "phone-1"', 'device = "phone-1\\n"', "device must be lower-case"),
        ('device = "phone-1"', "device = 1", "device must be a text, got 1"),
        ('aliases = ["phone", "p1"]', 'aliases = "phone"', "aliases must be a list of texts, got 'phone'"),
        ('aliases = ["phone", "p1"]', 'aliases = ["iPhone"]', "alias 'iPhone' must hold only lower-case"),
        ('aliases = ["phone", "p1"]', 'aliases = ["a b"]', "alias 'a b' must hold only"),
        ("shared = true", 'shared = "no"', "shared must be true or false, got 'no'"),
        ("shared = true", "threads = 0", "threads must be a whole number above 0, got 0"),
        ("shared = true", "batch = true", "batch must be a whole number above 0, got True"),
        ("shared = true", "threads = 1.5", "threads must be a whole number above 0, got 1.5"),
        ("shared = true", "fit = 3", "fit must be a table, got 3"),
        ("shared = true", "shared = maybe", "not valid TOML: .*line 8"),
    ],
)
def test_a_wrong_sheet_names_file_field_and_what_was_got(tmp_path: Path, old: str, new: str, words: str):
    assert old in SHEET
    with pytest.raises(UsageError, match=words) as caught:
        load_sheet(_write(tmp_path, SHEET.replace(old, new)))
    assert "phone-1--coreml--fp16.toml" in caught.value.message


def test_a_sheet_that_is_not_text_is_one_sentence(tmp_path: Path):
    path = _write(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_sheet(path)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    _write(tmp_path)
    text = SHEET.replace("phone-1", "phone-2").replace('["phone", "p1"]', '["phone-new"]')
    _write(tmp_path, text, "phone-2--coreml--fp16")
    return tmp_path


def test_targets_are_listed_by_slug(two: Path):
    assert [sheet.slug for sheet in list_targets(two)] == ["phone-1--coreml--fp16", "phone-2--coreml--fp16"]


@pytest.mark.parametrize("name", ["phone", "p1", "PHONE", "phone-1--coreml--fp16"])
def test_a_target_is_found_by_slug_and_alias_in_any_case(two: Path, name: str):
    assert find_target(name, two).target.device == "phone-1"


def test_an_unknown_device_offers_the_nearest_and_the_command(two: Path):
    with pytest.raises(
        UsageError, match=r"unknown device 'phnoe-new'; did you mean 'phone-new'.* known: .*p1"
    ) as caught:
        find_target("phnoe-new", two)
    assert caught.value.hint == "nas devices"


@pytest.mark.parametrize("alias", ["p1", "phone-1--coreml--fp16"])
def test_a_name_claimed_twice_is_refused(two: Path, alias: str):
    text = (two / "phone-2--coreml--fp16.toml").read_text().replace("phone-new", alias)
    _write(two, text, "phone-2--coreml--fp16")
    with pytest.raises(NasError, match=f"alias '{alias}' already belongs to phone-") as caught:
        list_targets(two)
    assert ".toml" in caught.value.message


def test_every_shipped_sheet_loads_and_every_name_fits_a_budget():
    for sheet in list_targets():
        for name in (sheet.slug, *sheet.aliases):
            assert find_target(Budget.parse(f"1s@{name}").device) == sheet
        assert sheet.sources, f"{sheet.path} names no source"


@pytest.mark.parametrize(
    ("text", "ms", "per_step", "device"),
    [
        ("1.4s@iphone", 1400.0, False, "iphone"),
        ("274ms/step@iphone", 274.0, True, "iphone"),
        ("0.5s/step@iphone", 500.0, True, "iphone"),
        ("900ms@cpu-onnxruntime", 900.0, False, "cpu-onnxruntime"),
        (" 1.4 s @ iphone-16-pro-max--coreml--fp16 ", 1400.0, False, "iphone-16-pro-max--coreml--fp16"),
        ("0.25ms@a.b_c", 0.25, False, "a.b_c"),
    ],
)
def test_budgets_are_read(text: str, ms: float, per_step: bool, device: str):
    assert Budget.parse(text) == Budget(ms=pytest.approx(ms), per_step=per_step, device=device)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1.4s", "1.4s@", "@iphone", "1.4@iphone", "s@iphone", "1.4m@iphone", "1.4s@i phone", "1.4s@a@b"),
        *("1,4s@iphone", "-1s@iphone", "1e3ms@iphone", "1.4s/image@iphone", "1.4s iphone", ".5s@iphone", "1.s@iphone"),
        *("0s@iphone", "0.0ms@iphone", "nan s@iphone", "9" * 400 + "s@iphone"),
    ],
)
def test_malformed_budgets_are_refused_with_what_was_typed(text: str):
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("text", ["1.4s@iphone", "274ms/step@iphone", "1.2345678s@x", "0.25ms@x", "1000000s@x"])
def test_a_printed_budget_reads_back_equal(text: str):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)
