"""Wrong units are named with the value in the right one, and honest tables raise no alarm."""

from __future__ import annotations

import dataclasses

import pytest
from latency_cases import measured, sheet_in, simulate

from nas import tables
from nas.device import list_targets
from nas.latency.plausible import implausible


def changed(rows, i, factor):
    return [
        dataclasses.replace(row, latency_ms=row.latency_ms * (factor if k == i else 1)) for k, row in enumerate(rows)
    ]


def test_honest_rows_pass(tmp_path):
    rows, known = simulate(n=8, blocks=8)
    assert implausible(rows, known, sheet_in(tmp_path)) == []


@pytest.mark.parametrize(("factor", "unit"), [(0.001, "seconds"), (1000.0, "microseconds")])
def test_one_row_in_another_unit_is_named_with_its_value_in_ms(tmp_path, factor, unit):
    rows, known = simulate(n=6)
    said = implausible(changed(rows, 2, factor), known, sheet_in(tmp_path))
    assert len(said) == 1
    assert "'network002'" in said[0]
    assert f"{rows[2].latency_ms:.4g} ms if it was written in {unit}" in said[0]


def test_a_table_wholly_in_seconds_is_told_by_the_roofline(tmp_path):
    rows, known = simulate(n=5)
    seconds = [dataclasses.replace(row, latency_ms=row.latency_ms / 1000) for row in rows]
    assert len(implausible(seconds, known, sheet_in(tmp_path))) == 5
    assert len(implausible(seconds[:1], known, sheet_in(tmp_path))) == 1


def test_half_of_the_rows_in_seconds_are_the_wrong_half(tmp_path):
    rows, known = simulate(n=4)
    mixed = changed(changed(rows, 0, 0.001), 1, 0.001)
    assert [said.split("'")[1] for said in implausible(mixed, known, sheet_in(tmp_path))] == [
        "network000",
        "network001",
    ]


def test_rows_already_in_the_table_set_the_scale_and_are_not_judged(tmp_path):
    rows, known = simulate(n=8)
    # A device 100 times slower than its sheet's roofline: the table knows, the roofline alone would complain.
    slow = [dataclasses.replace(row, latency_ms=row.latency_ms * 100) for row in rows]
    sheet = sheet_in(tmp_path)
    assert implausible(slow[:1], known, sheet, known=slow[1:]) == []
    assert len(implausible(changed(slow[:1], 0, 0.001), known, sheet, known=slow[1:])) == 1


def test_a_subject_twice_in_one_session_is_refused(tmp_path):
    rows, known = simulate(n=4)
    said = implausible([*rows, rows[1]], known, sheet_in(tmp_path))
    assert len(said) == 1
    assert "'network001' has 2 rows in session 's1'" in said[0]
    again = dataclasses.replace(rows[1], session="s2")
    assert implausible([*rows, again], known, sheet_in(tmp_path)) == []


def test_rows_without_features_are_left_to_others(tmp_path):
    assert implausible([measured("decoder", 1e9, kind="component")], {}, sheet_in(tmp_path)) == []


def test_no_shipped_table_raises_an_alarm_about_units():
    for sheet in list_targets():
        said = implausible(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)
        assert [text for text in said if "times too" in text] == [], sheet.slug
