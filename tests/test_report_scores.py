"""The page of studies with stopped runs, with candidates that could not be trained, and of proxies without dB."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from synthetic_study import edited, make_study

from nas.report import build_report, data, figures, front, sections
from nas.report.files import read_files


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("reports") / "2026-01-02-snapgen_unet-iphone")


def test_stopped_and_untrainable_candidates_are_shown_as_what_they_are(study, tmp_path):
    frame = pd.read_csv(study / "trials.csv", dtype=str, keep_default_na=False)
    members = set(pd.read_csv(study / "front.csv", dtype=str)["key"])
    plain = frame[(frame["state"] == "proxied") & ~frame["key"].isin(members) & (frame["source"] == "search")]
    first, second = plain["key"].tolist()[:2]
    blank = ["quality", "quality_sd", "text_quality", "text_quality_sd"]
    for key, state, reason in ((first, "stopped", "stopped after 6 of 24 steps"), (second, "infeasible", "diverged")):
        frame.loc[frame["key"] == key, [*blank, "state", "reason"]] = [*[""] * 4, state, reason]
    stopping = {"confidence": 0.95, "stopped": 1, "spent_s": 7.0, "saved_s": 14.0, "basis": "estimate: by steps"}

    def change(text):
        return json.dumps({**json.loads(text), "stopping": stopping})

    folder = edited(study, tmp_path, "study.json", change)
    frame.to_csv(folder / "trials.csv", index=False)
    files = read_files(folder)
    standing = data.points(files).set_index("key")["standing"]
    assert (standing[first], standing[second]) == (data.STOPPED, data.UNTRAINABLE)
    assert not {first, second} & set(data.choice_lines(files)["key"])
    content = front.front(files)
    ticks = [t for t in content["data"] if t.get("yaxis") == "y2"]
    assert [t["ids"] for t in ticks[:2]] == [[first], [second]]
    assert "stopped after 6 of 24 steps" in ticks[0]["text"][0]
    legend = {item["name"]: item["traces"] for item in content["layout"]["meta"]["legend"]}
    assert legend["stopped early: would not have reached the front"] == [0]
    assert legend["infeasible: could not be trained"] == [1]
    text = build_report(folder).read_text()
    assert "1 proxy runs were stopped early, after 7.00 s in all" in text
    assert "with 95 % confidence" in text
    assert "saved 14.0 s of proxy time (estimate: by steps)" in text


def test_another_unit_is_named_everywhere_and_a_missing_text_part_is_not_shown(study, tmp_path):
    def change(text):
        record = json.loads(text)
        record["proxy"] |= {"proxy": "params", "unit": "log10"}
        return json.dumps(record)

    folder = edited(study, tmp_path, "study.json", change)
    for name in ("trials.csv", "front.csv"):
        frame = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        frame[["text_quality", "text_quality_sd"]] = ""
        frame.to_csv(folder / name, index=False)
    files = read_files(folder)
    assert front.front(files)["layout"]["yaxis"]["title"]["text"] == "quality: score of params (log10)"
    assert "quality (log10)" in figures.choices(files)["layout"]["yaxis"]["ticktext"]
    page = "".join(section.body for section in sections.ordered(files) if section.slug in ("front", "candidates"))
    assert "quality (log10)" in page
    assert "dB" not in page
    assert "text part" not in page
