"""Tables: rows survive the disk, sessions are aligned by their anchors, fixed parts are found or refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nas import tables
from nas.device import load_sheet
from nas.errors import NasError
from nas.op import FEATURES
from nas.tables import Measurement, Subject

SLUG = "toy--onnxruntime--fp32"


def row(subject="a", ms=10.0, session="s1", **changes):
    values = {
        "target": SLUG,
        "subject": subject,
        "subject_kind": "network",
        "latency_ms": ms,
        "statistic": "min_cpu",
        "session": session,
        "device": "toy",
        "chip": "chip",
        "source": "measured",
    }
    return Measurement(**{**values, **changes})


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(ms=1 / 3, samples_ms=(1.25, 2.5), cpu_samples_ms=(1.0, 2.0), environment='quoted, "text"\nsecond line'),
        row("b", resolution_px=1024, role="decoder", subject_kind="component", flagged="drift", batch=2),
    ]
    tables.append(SLUG, rows[:1], tmp_path)
    tables.append(SLUG, rows[1:], tmp_path)
    assert tables.read(SLUG, tmp_path) == tuple(rows)


def test_missing_table_is_empty_and_missing_folder_is_an_error(tmp_path):
    assert tables.read(SLUG, tmp_path) == ()
    assert tables.subjects(SLUG, tmp_path) == {}
    with pytest.raises(NasError, match="no folder"):
        tables.read(SLUG, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("10.0", "ten"), r"\.csv:3: .*ten"),
        (lambda text: text.replace("10.0", "-1.0"), r"\.csv:3: .*positive"),
        (lambda text: text.replace("10.0", "nan"), r"\.csv:3: .*positive"),
        (lambda text: text + "half,a,row\n", r"\.csv:4: 3 cells where the header has"),
        (lambda text: text.replace("network,10.0", "house,10.0"), r"\.csv:3: subject_kind must be one of"),
        (lambda text: text.replace("latency_ms", "latency"), r"\.csv:1: .*differ in latency, latency_ms"),
        (lambda text: text.replace(f"{SLUG},b", "other,b"), r"\.csv:3: target must be"),
    ],
)
def test_corrupt_rows_are_named_with_file_and_line(tmp_path, damage, said):
    path = tables.append(SLUG, [row("a", 7.0), row("b", 10.0)], tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(NasError, match=said):
        tables.read(SLUG, tmp_path)


def test_append_to_a_corrupt_table_leaves_it_alone(tmp_path):
    path = tables.append(SLUG, [row()], tmp_path)
    path.write_text(path.read_text() + "broken\n")
    before = path.read_bytes()
    with pytest.raises(NasError):
        tables.append(SLUG, [row("b")], tmp_path)
    assert path.read_bytes() == before


def test_a_row_of_another_target_is_refused(tmp_path):
    with pytest.raises(NasError, match="cannot be written to the table"):
        tables.append("other--coreml--fp16", [row()], tmp_path)


def test_subjects_merge_and_keep_their_features(tmp_path):
    vector = np.zeros(len(FEATURES))
    vector[3], vector[-1] = 1.5, 1e-9 / 3
    first = Subject(key="a", kind="network", name="A", features=tables.feature_map(vector), macs=7, params=9)
    tables.write_subjects(SLUG, [first], tmp_path)
    tables.write_subjects(SLUG, [Subject(key="b", kind="block", name="B", spec={"kind": "resnet"})], tmp_path)
    read = tables.subjects(SLUG, tmp_path)
    assert read["a"] == first
    assert read["b"].spec == {"kind": "resnet"}
    assert np.array_equal(read["a"].vector, vector)


def test_subjects_of_another_version_or_with_strange_features_are_refused(tmp_path):
    path = tables.write_subjects(SLUG, [Subject(key="a", kind="network", name="A")], tmp_path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "features_version": 0}))
    with pytest.raises(NasError, match="features are of version 0"):
        tables.subjects(SLUG, tmp_path)
    data["subjects"]["a"]["features"] = {"conv.flops": 1.0}
    path.write_text(json.dumps(data))
    with pytest.raises(NasError, match=r"conv\.flops"):
        tables.subjects(SLUG, tmp_path)
    path.write_text('{\n"features_version": 1,')
    with pytest.raises(NasError, match=r"subjects\.json:\d+: not valid JSON"):
        tables.subjects(SLUG, tmp_path)


def test_the_hash_follows_rows_subjects_and_sheet(tmp_path):
    seen = {tables.inputs_sha(SLUG, tmp_path)}
    tables.append(SLUG, [row()], tmp_path)
    seen.add(tables.inputs_sha(SLUG, tmp_path))
    tables.write_subjects(SLUG, [Subject(key="a", kind="network", name="A")], tmp_path)
    seen.add(tables.inputs_sha(SLUG, tmp_path))
    (tmp_path / f"{SLUG}.toml").write_text('device = "toy"\nruntime = "onnxruntime"\nprecision = "fp32"\n')
    seen.add(tables.inputs_sha(SLUG, tmp_path))
    (tmp_path / f"{SLUG}.ratios.csv").write_text("subject\n")
    seen.add(tables.inputs_sha(SLUG, tmp_path))
    assert len(seen) == 5


MEMBER = "toy-two--onnxruntime--fp32"
HEAD = 'device = "toy"\nchip = "chip"\nruntime = "onnxruntime"\nprecision = "fp32"\n[chips]\nchip = {}\nother = {}\n'


def family(folder, **changes):
    """A family's sheet and one member's."""
    values = {"device": "toy-two", "chip": "other", "runtime": "onnxruntime", "precision": "fp32", "family": SLUG}
    (folder / f"{SLUG}.toml").write_text(HEAD)
    lines = "".join(f'{key} = "{value}"\n' for key, value in {**values, **changes}.items())
    (folder / f"{MEMBER}.toml").write_text(lines)


def test_a_member_reads_its_familys_table_behind_its_own(tmp_path):
    family(tmp_path)
    tables.append(SLUG, [row("a"), row("b")], tmp_path)
    tables.write_subjects(SLUG, [Subject(key=key, kind="network", name=key) for key in "ab"], tmp_path)
    assert [r.subject for r in tables.read(MEMBER, tmp_path)] == ["a", "b"]
    assert set(tables.subjects(MEMBER, tmp_path)) == {"a", "b"}
    before = tables.inputs_sha(MEMBER, tmp_path)
    own = row("c", target=MEMBER, chip="other")
    tables.append(MEMBER, [own], tmp_path)
    tables.append(MEMBER, [row("d", target=MEMBER, chip="other")], tmp_path)
    tables.write_subjects(MEMBER, [Subject(key="a", kind="network", name="nearer")], tmp_path)
    assert [r.subject for r in tables.read(MEMBER, tmp_path)] == ["c", "d", "a", "b"]
    assert [r.subject for r in tables.read(SLUG, tmp_path)] == ["a", "b"]
    assert tables.subjects(MEMBER, tmp_path)["a"].name == "nearer"
    assert tables.subjects(SLUG, tmp_path)["a"].name == "a"
    after = tables.inputs_sha(MEMBER, tmp_path)
    tables.append(SLUG, [row("e")], tmp_path)
    assert len({before, after, tables.inputs_sha(MEMBER, tmp_path)}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "toi--onnxruntime--fp32"}, "unknown family 'toi--onnxruntime--fp32'"),
        ({"chip": "newest"}, "unknown chip 'newest'"),
        ({"family": MEMBER}, "is itself a member"),
    ],
)
def test_a_member_that_does_not_fit_its_family_is_refused(tmp_path, changes, said):
    family(tmp_path, **changes)
    with pytest.raises(NasError, match=said):
        load_sheet(tmp_path / f"{MEMBER}.toml")


def test_a_member_says_nothing_that_is_its_familys(tmp_path):
    family(tmp_path)
    path = tmp_path / f"{MEMBER}.toml"
    path.write_text(path.read_text() + "[fit]\nchip_sd = 0.3\n")
    with pytest.raises(NasError, match=f"fit is the family's, and stands in {SLUG}.toml"):
        load_sheet(path)
    path.write_text(path.read_text().replace("[fit]\nchip_sd = 0.3\n", "threads = 2\n"))
    path = path.rename(tmp_path / f"{MEMBER}--t2.toml")
    with pytest.raises(NasError, match="threads must be the family's, None, got 2"):
        load_sheet(path)


def by_subject(rows):
    return {o.subject: o for o in tables.observations(rows)}


def test_a_slow_session_is_aligned_by_its_anchors():
    # Session s2 ran everything 1.5 times slower; "late" was measured only then.
    rows = [row("x", 10.0, "s1"), row("y", 20.0, "s1"), row("x", 15.0, "s2"), row("y", 30.0, "s2")]
    found = by_subject([*rows, row("late", 60.0, "s2"), row("early", 40.0, "s1")])
    assert found["late"].ms / found["x"].ms == pytest.approx(4.0)
    assert found["early"].ms / found["x"].ms == pytest.approx(4.0)
    assert found["x"].session_ms[0] == pytest.approx(found["x"].session_ms[1])


def test_an_anchor_repeated_in_a_session_counts_once_with_the_statistic_it_has():
    rows = [row("x", 12.0), row("x", 10.0), row("x", 11.0)]
    assert by_subject(rows)["x"].ms == 10.0
    rows = [row("x", ms, statistic="median_wall") for ms in (12.0, 10.0, 11.5)]
    assert by_subject(rows)["x"].ms == 11.5


def test_the_median_over_sessions_is_taken_per_chip():
    rows = [row("x", ms, session) for ms, session in ((10.0, "a"), (10.0, "b"))]
    found = tables.observations([*rows, row("x", 30.0, "c", chip="other")])
    assert {(o.chip, o.ms) for o in found} == {("chip", 10.0), ("other", 30.0)}


def test_flagged_and_excluded_rows_are_not_used():
    rows = [row("x", 10.0), row("x", 1.0, "s2", flagged="drift"), row("y", 1.0, excluded_because="another lowering")]
    found = by_subject(rows)
    assert set(found) == {"x"}
    assert found["x"].ms == 10.0


def test_noise_floor_is_the_deviation_of_sessions_from_their_median():
    # Two anchors moving oppositely leave the pace at 1: each session is 10 % off its subject's median.
    rows = [row("x", 9.0, "s1"), row("x", 11.0, "s2"), row("y", 22.0, "s1"), row("y", 18.0, "s2"), row("once", 5.0)]
    floor = tables.noise_floor(tables.observations(rows))
    assert floor == {"mean_deviation": pytest.approx(0.1), "subjects": 2.0, "sessions": 2.0}
    assert tables.noise_floor(tables.observations([row("once", 5.0)])) is None


def test_measurements_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().latency_ms = 3.0
    with pytest.raises(NasError, match="batch"):
        row(batch=0)


def test_shipped_tables_are_readable_and_complete():
    """Every used row of every shipped table has features, and every row its source."""
    folder = tables.table_path("x", "").parent
    for path in folder.glob("*.csv"):
        if path.name.endswith(".ratios.csv"):
            continue
        subjects = tables.subjects(path.stem)
        for measured in tables.read(path.stem):
            assert measured.source
            if measured.used and measured.subject_kind != "component":
                assert subjects[measured.subject].features, (path.name, measured.subject)
