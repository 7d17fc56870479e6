"""Networks side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from nas.errors import UsageError
from nas.profile import candidate_subject, check_comparable, compare, comparison_page, profile
from nas.profile.comparison_page import operation_figure, stage_figure
from nas.space import load_space

NAMES = ("koala-700m", "segmind-vega")


@pytest.fixture(scope="module")
def profiles():
    space = load_space("sdxl_unet").at_resolution(128)
    return [profile(candidate_subject(space.reference(name), name, reference=name)) for name in NAMES]


@pytest.fixture(scope="module")
def found(profiles):
    return compare(profiles)


def test_vega_has_fewer_parameters_and_more_convolutions(found):
    """The published figures: 782,822,724 and 745,225,604 parameters; Vega keeps the second residual blocks."""
    totals = found.totals()
    assert totals["params"].tolist() == [782_822_724, 745_225_604]
    assert totals["conv_macs"]["segmind-vega"] > 1.3 * totals["conv_macs"]["koala-700m"]
    assert totals["linear_macs"]["segmind-vega"] < totals["linear_macs"]["koala-700m"]


def test_stages_add_up_and_what_one_lacks_is_not_zero(found):
    for measure in ("params", "macs"):
        table = found.stages(measure)
        assert table.sum().tolist() == found.totals()[measure].tolist()
        assert np.isnan(table.loc["mid_block", "koala-700m"])
        assert table.loc["mid_block", "segmind-vega"] > 0


def test_stages_stand_in_execution_order_whoever_has_them(profiles):
    for order in (profiles, profiles[::-1]):
        stages = list(compare(order).stages("macs").index)
        assert stages == [
            "conv_in",
            "time_embedding",
            "add_embedding",
            *(f"down_blocks.{i}" for i in range(3)),
            "mid_block",
            *(f"up_blocks.{i}" for i in range(3)),
            "head",
        ]


def test_sentences_name_what_differs_most(found):
    (sentence,) = found.sentences()
    assert sentence.startswith("segmind-vega against koala-700m: −4.8 % parameters (up_blocks.0 −86.6 M, mid_block ")
    assert "MACs (" in sentence
    assert "by operation: conv +" in sentence


def test_equal_networks_differ_in_nothing(profiles):
    first = profiles[0]
    other = replace(first, subject=replace(first.subject, name="twin"))
    (sentence,) = compare([first, other]).sentences()
    assert sentence == (
        "twin against koala-700m: equal parameters (the same in every stage); equal MACs (the same in every stage)"
    )


def test_a_comparison_is_json(found):
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [network["name"] for network in data["networks"]] == list(NAMES)
    assert data["relative_to"] == "koala-700m"
    assert data["ratios"]["segmind-vega"]["params"] == pytest.approx(745_225_604 / 782_822_724)
    mid = next(stage for stage in data["stages"] if stage["stage"] == "mid_block")
    assert mid["params"] == {"koala-700m": None, "segmind-vega": 31_138_560}
    assert type(data["totals"]["segmind-vega"]["macs"]) is int


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[:1], "needs at least two networks, got 1"),
        (lambda s: [s[0], s[0]], "koala-700m is named twice"),
        (lambda s: [s[0], replace(s[1], pixels_per_latent=4)], "at one size of the image, got 128 × 128, 64 × 64"),
    ],
)
def test_what_cannot_be_compared_is_refused(profiles, change, words):
    with pytest.raises(UsageError, match=words):
        check_comparable(change([p.subject for p in profiles]))


def test_figures_hold_every_network_and_add_up(found):
    for measure, unit in (("params", 1e6), ("macs", 1e9)):
        traces = stage_figure(found, measure)["data"]
        assert [trace["name"] for trace in traces] == list(NAMES)
        for trace, total in zip(traces, found.totals()[measure], strict=True):
            assert sum(filter(None, trace["x"])) == pytest.approx(total / unit)
    stacked = operation_figure(found)["data"]
    assert np.sum([trace["x"] for trace in stacked], axis=0) == pytest.approx(found.totals()["macs"].to_numpy() / 1e9)


def test_the_page_is_whole_and_offline(found, tmp_path):
    path = comparison_page(found, tmp_path / "page.html")
    page = path.read_text()
    body = page[page.index("<body>") :]
    assert len(re.findall(r'class="figure-data">(.*?)</script>', body)) == 3
    assert "koala-700m and segmind-vega" in body
    assert "−86.6 M" in body
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", body)
