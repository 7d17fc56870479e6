import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from synthetic_study import BUDGET_MS, CALLS, FIXED_MS, SNAPGEN, edited, make_study

from nas.errors import NasError
from nas.page import as_json
from nas.page.numbers import decibels, duration, exact, milliseconds, percent, plain, scaled, significant
from nas.report import analysis, build_report, data, effects, figures, front, sections
from nas.report.files import read_files


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("reports") / "2026-01-02-snapgen_unet-iphone")


@pytest.fixture(scope="module")
def files(study):
    return read_files(study)


@pytest.fixture(scope="module")
def page(study):
    return build_report(study).read_text()


def body(page):
    """The page without plotly.js."""
    before, _, after = page[page.index("<body>") :].partition("<script>/**")
    return before + after.partition("</script>")[2]


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,230"), (0.012345, "0.0123"), (999.6, "1,000"), (9.996, "10.0"), (0, "0"), (-2.5, "−2.50"),
     (None, "–"), (float("nan"), "–"), (1.5e-9, "1.50 × 10⁻⁹"), (2e13, "2.00 × 10¹³")],
)  # fmt: skip
def test_significant(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(383_670_276, "", "384 M"), (658e9, "", "658 G"), (1_534_681_104, "B", "1.53 GB"), (999_700, "", "1.00 M"),
     (999, "", "999"), (0, "B", "0 B"), (None, "B", "–"), (1e13, "", "10.0 T")],
)  # fmt: skip
def test_scaled(value, unit, text):
    assert scaled(value, unit) == text


def test_other_numbers():
    assert [milliseconds(v) for v in (274.26, 999.4, 999.6, 1215.0, None)] == [
        "274 ms",
        "999 ms",
        "1.00 s",
        "1.22 s",
        "–",
    ]
    assert [exact(v) for v in (1400, 274, 900.5)] == ["1.4 s", "274 ms", "900.5 ms"]
    assert decibels(14.213, 0.08) == "14.21 ± 0.08"
    assert decibels(-0.5) == "−0.50"
    shares = (0.8734, 0.041, 0, 1, 0.9999, 0.0000001, -0.43)
    assert [percent(v) for v in shares] == ["87 %", "4.1 %", "0 %", "100 %", "99.9 %", "under 0.1 %", "−43 %"]
    assert [duration(v) for v in (7.5, 75, 3725)] == ["7.50 s", "1 min 15 s", "1 h 02 min"]
    assert plain({"a_b": [1, 2.50], "c": True}) == "a b 1, 2.5, c yes"


# Data


def test_points_stand_where_they_should(files):
    points = data.points(files)
    assert points["key"].is_unique
    assert set(points["standing"]) == {data.FRONT, data.DOMINATED, data.UNPROXIED}
    scored = points[points["standing"] != data.UNPROXIED]
    assert scored["quality"].notna().all()
    assert points.loc[points["standing"] == data.UNPROXIED, "latency_high_ms"].min() > BUDGET_MS
    for _, row in points[points["standing"] == data.DOMINATED].iterrows():
        better = (scored["latency_ms"] <= row["latency_ms"]) & (scored["quality"] >= row["quality"])
        assert better.sum() > 1  # another one beside itself


def test_a_scored_reference_over_the_budget_is_not_dominated(study, tmp_path):
    folder = edited(study, tmp_path, "trials.csv", lambda t: t.replace(",True,", ",False,"))
    assert set(data.points(read_files(folder))["standing"]) == {data.FRONT, data.OVER, data.UNPROXIED}


def test_front_table_is_fastest_first_with_one_recommended_and_its_command(files):
    table = data.front_table(files)
    assert (np.diff(table["latency_ms"]) > 0).all()
    assert (np.diff(table["quality"]) > 0).all()
    assert table["recommended"].sum() == 1
    best = table.loc[table["recommended"]].iloc[0]
    assert best["quality"] >= table["quality"].max() - 2 * 0.09
    assert best["command"] == f"nas train 2026-01-02-snapgen_unet-iphone#{best['key']}"


def test_parts_add_up_to_one_call_in_both_views(files):
    table = data.front_table(files)
    for by in ("stage", "kind"):
        parts = data.latency_parts(files, by)
        assert parts.index.tolist() == table["key"].tolist()
        np.testing.assert_allclose(parts.sum(axis=1), table["step_ms"], rtol=1e-9)
    assert data.latency_parts(files, "stage").columns.tolist()[2:9] == [
        "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2",
    ]  # fmt: skip


def test_a_stage_that_only_a_later_member_has_still_stands_in_its_place(files):
    blocks = files.blocks[
        (files.blocks["key"] != files.front["key"].iloc[0]) | (files.blocks["stage"] != "down_blocks.1")
    ]
    columns = data.latency_parts(type(files)(**{**vars(files), "blocks": blocks}), "stage").columns.tolist()
    assert columns.index("down_blocks.1") == columns.index("down_blocks.0") + 1


def test_choice_lines_by_hand(files):
    lines = data.choice_lines(files).set_index(["key", "axis"])
    snapgen = files.trials["key"].iloc[0]
    # width_0 is the third of four values, ffn_ratio the second of three, each within its spread.
    assert lines.loc[(snapgen, "width_0"), "value"] == "256"
    assert abs(lines.loc[(snapgen, "width_0"), "position"] - 2 / 3) <= 0.05
    assert abs(lines.loc[(snapgen, "ffn_ratio"), "position"] - 0.5) <= 0.05
    scored = data.points(files).query("standing != 'not proxied'")
    quality = lines.xs("quality", level="axis")["position"]
    assert quality[scored.loc[scored["quality"].idxmax(), "key"]] == 1
    assert quality[scored.loc[scored["quality"].idxmin(), "key"]] == 0
    without = scored.loc[scored["choice.depth_1"] == "0", "key"].iloc[0]
    assert np.isnan(lines.loc[(without, "self_attention_1"), "position"])


def test_values_stand_in_order_of_size_and_whole_numbers_lose_their_point():
    assert data.ordered({"1024", "128", "512"}) == ["128", "512", "1024"]
    assert data.ordered({"mqa", "gqa"}) == ["gqa", "mqa"]
    assert [data.tidy(v) for v in ("2.0", "2.5", "True", "", None, "rms_norm", False)] == [
        "2", "2.5", "yes", "", "", "rms_norm", "no",
    ]  # fmt: skip


def test_describe_puts_numbered_choices_side_by_side():
    assert data.describe({"width_0": "256", "width_1": "512", "attention": "mqa", "self_attention_1": ""}) == [
        ("width", "256 / 512"), ("attention", "mqa"), ("self attention", "–"),
    ]  # fmt: skip


def test_hypervolume_curve_marks_improvements(files):
    curve = data.hypervolume_curve(files)
    assert curve["trial"].tolist() == list(range(1, files.record["trials"]["proxied"] + 1))
    gains = curve["value"].diff().fillna(curve["value"])
    assert curve["improved"].tolist() == (gains > 1e-12).tolist()
    assert data.reference_point(files) == (BUDGET_MS, 0.0)


def test_references_carry_what_was_published(files):
    row = data.references(files).iloc[0]
    assert (row["name"], row["published_step_ms"]) == ("snapgen", 274.0)
    assert row["published_ms"] == pytest.approx(FIXED_MS + CALLS * 274.0)


# Figures


def drawn(content):
    """plotly's own opinion of a figure, its colour tokens replaced as the page does."""
    return go.Figure(json.loads(re.sub(r'"@\w+"', '"#123456"', as_json(content))))


def test_plotly_accepts_every_figure(files):
    relative = analysis.relative_quality(files)
    for content in (front.front(files), figures.parts(files, "stage"), figures.parts(files, "kind"),
                    figures.choices(files), figures.hypervolume(files, "trial"), figures.hypervolume(files, "seconds"),
                    effects.importance(files.record["importance"]), effects.values(files, relative, "quality (dB)"),
                    effects.stability(files, analysis.front_probability(files))):  # fmt: skip
        figure = drawn(content)
        assert len(figure.data) == len(content["data"])
        titled = [a for a in (figure.layout.xaxis, figure.layout.yaxis) if a.title.text]
        assert all(re.search(r"\((ms|dB|s·dB|%|s|min)\)|scored", a.title.text) for a in titled)
        for item in content["layout"].get("meta", {}).get("legend", []):
            assert all(0 <= i < len(content["data"]) for i in item["traces"])


def test_every_colour_of_the_figures_is_defined_for_light_and_dark(page, files):
    contents = re.findall(r'class="figure-data">(.*?)</script>', body(page))
    assert len(contents) == 10
    tokens = set(re.findall(r'"@(\w+)"', "".join(contents))) | set(re.findall(r"--swatch:var\(--(\w+)\)", body(page)))
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for token in tokens:
        assert f"--{token}:" in light, token
        assert f"--{token}:" in dark, token


def test_the_front_figure_shows_interval_spread_budget_and_configuration(files):
    content = front.front(files)
    table = data.front_table(files)
    (members,) = [t for t in content["data"] if t.get("ids") == table["key"].tolist()]
    np.testing.assert_allclose(members["error_x"]["array"], table["latency_high_ms"] - table["latency_ms"])
    np.testing.assert_allclose(members["error_x"]["arrayminus"], table["latency_ms"] - table["latency_low_ms"])
    assert members["error_y"]["array"] == table["quality_sd"].tolist()
    assert BUDGET_MS in [shape["x0"] for shape in content["layout"]["shapes"]]
    (reference,) = [t for t in content["data"] if t.get("marker", {}).get("symbol") == "square-open"]
    assert "published: 1.22 s (274 ms a call)" in reference["text"][0]
    assert "width 256 / 512 / 896" in reference["text"][0]
    (ticks,) = [t for t in content["data"] if t.get("yaxis") == "y2"]
    assert ticks["ids"] == data.points(files).query("standing == 'not proxied'")["key"].tolist()
    low, high = content["layout"]["xaxis"]["range"]
    assert low < table["latency_low_ms"].min()
    assert high > BUDGET_MS


# Page


def test_the_page_says_what_to_take_and_what_the_budget_pays_for(page, files):
    text = body(page)
    assert f'Take <b class="key">{files.recommended}</b>: the fastest whose quality ties with the best' in text
    assert "text encoders 6.30 ms (published) and SnapGen decoder 119 ms (published) are paid first" in text
    assert "4 steps, which leaves 319 ms for each denoiser call" in text
    assert "with probability 80 % or more" in text
    for key in files.front["key"]:
        assert f'id="candidate-{key}"' in text
        assert f'<tr data-key="{key}"' in text
    assert text.count('class="marked"') == 2  # its row and its card
    assert "stands at the edge of the space in these ordered choices" in text
    assert "differences below two spreads" in text
    assert "SnapGen++, arXiv 2601.08303 v2" in text
    assert "No row has operators of kind lookup, depthwise" in text


def test_the_page_warns_of_predictions_far_outside_the_fit(page):
    assert "3 of 9 networks are more than 2 times outside the fitted range." in body(page)


def test_the_page_needs_no_network(page):
    """Nothing is loaded: plotly.js names addresses, but only for maps and for an upload that is never called."""
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", body(page))
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", page[: page.index("<script>")])
    assert not re.search(r"""(?:src|href|action)=["']?\s*(?:https?:)?//""", body(page))
    assert not re.search(r"url\(|@import", page[page.index("<style>") : page.index("</style>")])
    assert page.count("plotly.js v") == 1


def test_a_name_with_markup_is_shown_not_run(study, tmp_path):
    folder = edited(
        study, tmp_path, "study.json", lambda t: t.replace('"a CPU"', '"</script><script>alert(1)</script>"')
    )
    assert "<script>alert(1)" not in build_report(folder).read_text()


def test_as_json_cannot_close_its_script_element():
    assert "</" not in as_json({"a": "</script>"})
    assert json.loads(as_json({"a": np.float64("nan"), "b": np.arange(2), "c": (np.int64(3), float("inf"))})) == {
        "a": None, "b": [0, 1], "c": [3, None],
    }  # fmt: skip


def test_a_budget_per_step_and_an_unfinished_study(study, tmp_path):
    def change(text):
        record = json.loads(text)
        record["budget"] |= {"per_step": True, "ms": 300.0, "step_budget_ms": 300.0}
        record |= {"finished": False, "fidelity": None, "edges": []}
        return json.dumps(record)

    text = body(build_report(edited(study, tmp_path, "study.json", change)).read_text())
    assert "The budget is 300 ms for one denoiser call" in text
    assert "This study is not finished" in text
    assert "predicted latency of one denoiser call (ms)" in text
    assert "Not measured for these settings" in text
    assert "stands at no edge" in text


def test_a_study_without_a_feasible_point_still_has_a_page(study, tmp_path):
    folder = edited(study, tmp_path, "study.json", lambda t: json.dumps({**json.loads(t), "recommended": None}))
    for name in ("front.csv", "blocks.csv"):
        (folder / name).write_text((study / name).read_text().splitlines()[0] + "\n")
    text = body(build_report(folder).read_text())
    assert "there is nothing to choose" in text
    assert 'id="figure-front"' in text


# Bad input


def dropped(*path):
    def change(text):
        record = json.loads(text)
        inner = record
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        return json.dumps(record)

    return change


def with_value(value, *path):
    def change(text):
        record = json.loads(text)
        inner = record
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        return json.dumps(record)

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("study.json", lambda t: t[:200], r"study\.json is not valid JSON"),
        ("study.json", lambda t: "[]", r"study\.json must hold one JSON object, got list"),
        ("study.json", with_value(9, "schema"), r"schema must be 1, got 9"),
        ("study.json", dropped("budget", "ms"), r"study\.json: the field budget\.ms is missing"),
        ("study.json", with_value("soon", "budget", "ms"), r"budget\.ms must be a number, got 'soon'"),
        ("study.json", with_value(True, "seed"), r"seed must be a whole number, got True"),
        (
            "study.json",
            with_value("feedbeef00", "recommended", "key"),
            r"recommended\.key 'feedbeef00' is not in front",
        ),
        ("trials.csv", lambda t: t.replace("latency_ms", "latency"), r"trials\.csv: the column latency_ms is missing"),
        ("trials.csv", lambda t: "", r"trials\.csv is not a CSV table"),
        ("blocks.csv", lambda t: t + "a,b,c\n", r"blocks\.csv:\d+: params must be a number, got ''|not a CSV table"),
        ("blocks.csv", lambda t: t.splitlines()[0] + "\n", r"blocks\.csv: no row for '\w+', which is in front\.csv"),
    ],
)
def test_damage_is_named_by_file_and_field(study, tmp_path, name, change, says):
    with pytest.raises(NasError, match=says):
        build_report(edited(study, tmp_path, name, change))


def test_a_bad_number_is_named_by_line(study, tmp_path):
    def change(text):
        lines = text.splitlines()
        frame = pd.read_csv(study / "trials.csv", dtype=str, keep_default_na=False)
        lines[3] = lines[3].replace(frame["step_ms"].iloc[2], "fast")
        return "\n".join(lines) + "\n"

    with pytest.raises(NasError, match=r"trials\.csv:4: step_ms must be a number, got 'fast'"):
        build_report(edited(study, tmp_path, "trials.csv", change))


@pytest.mark.parametrize("name", ["study.json", "trials.csv", "front.csv", "blocks.csv"])
def test_a_missing_file_is_named(study, tmp_path, name):
    folder = edited(study, tmp_path, "", None)
    (folder / name).unlink()
    with pytest.raises(NasError, match=rf"{re.escape(name)} cannot be read: No such file"):
        build_report(folder)


def test_the_reference_is_compared_with(page, files):
    row = files.front[files.front["key"] == files.recommended].iloc[0]
    for name in ("width_0", "width_1", "conv_0"):
        assert row[f"choice.{name}"] != str(SNAPGEN[name])
        assert f"{name} {row[f'choice.{name}']} instead of {SNAPGEN[name]}" in body(page)
    assert sections.title(files) == "snapgen_unet within 1.4 s on iphone"


def test_report_imports_neither_torch_nor_optuna():
    code = "import sys, nas.report; print([m for m in ('torch', 'optuna', 'onnxruntime') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_image_is_the_sum_of_its_parts(files):
    row = data.front_table(files).iloc[0].to_dict()
    lines = data.image_parts(files.record, row)
    assert [line["name"] for line in lines] == ["text encoders", f"denoiser {row['key']}", "SnapGen decoder"]
    assert [line["calls"] for line in lines] == [1, 4, 1]
    assert [line["basis"] for line in lines] == ["published", "predicted", "published"]
    for name in ("ms", "low_ms", "high_ms"):
        total = row[{"ms": "latency_ms"}.get(name, f"latency_{name}")]
        assert sum(line[name] for line in lines) == pytest.approx(total)
    # A study of 0.1 says neither the basis of a component nor its bounds.
    old = {k: v for k, v in files.record["pipeline"]["parts"][0].items() if k in ("role", "name", "ms", "source")}
    before = files.record | {"pipeline": files.record["pipeline"] | {"parts": [old]}}
    first, _ = data.image_parts(before, row)
    assert (first["low_ms"], first["high_ms"], first["basis"]) == (6.3, 6.3, "measured or published")
