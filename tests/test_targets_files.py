"""Files of rows: made once, mapped, continued, dropped, made again; and a search that goes on without them."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.errors import NasError, UsageError
from nas.targets import cached_rows, files, room

ABOUT = {"teacher": "t", "seed": 0, "part": "train"}
CHUNK = 4
LOG = "nas.targets"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(room, "SPARE", 0)
    monkeypatch.setattr(files, "_in_memory", {})
    monkeypatch.setattr(files, "_said", set())
    files._load.cache_clear()
    yield tmp_path / "targets"
    files._load.cache_clear()


class Teacher:
    """Answers row i with i, and remembers which chunks it was asked for."""

    def __init__(self, width: int = 3) -> None:
        self.asked: list[int] = []
        self.width = width

    def __call__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        rows = torch.arange(index * CHUNK, (index + 1) * CHUNK)
        return {"t": rows.float(), "x": rows.view(-1, 1).expand(-1, self.width).half()}


def ask(count: int, make: Any, about: dict[str, Any] = ABOUT, tick: Any = None) -> dict[str, Tensor]:
    found = cached_rows(about, count, CHUNK, make, tick)
    wanted = torch.arange(count)
    assert torch.equal(found["t"], wanted.float())
    assert torch.equal(found["x"], wanted.view(-1, 1).expand(-1, found["x"].shape[1]).half())
    return found


def path(about: dict[str, Any] = ABOUT) -> Path:
    return files.path_of(about)


def test_rows_are_made_once() -> None:
    make, done = Teacher(), []
    ask(10, make, tick=done.append)
    assert make.asked == [0, 1, 2]
    assert done == [4, 8, 10]
    files._load.cache_clear()
    ask(10, make)
    assert make.asked == [0, 1, 2]


def test_a_longer_file_serves_a_shorter_request_and_a_shorter_one_is_continued() -> None:
    make = Teacher()
    short = ask(3, make)
    assert make.asked == [0]
    ask(9, make)
    assert make.asked == [0, 1, 2]
    ask(2, make)
    assert files.rows_in(path()) == 12
    ask(12, make)  # the last chunk was kept whole
    assert make.asked == [0, 1, 2]
    assert torch.equal(short["t"], torch.arange(3.0))  # what was mapped before goes on
    assert len(list(path().parent.glob("*.rows"))) == 1


def test_a_killed_run_is_continued() -> None:
    def killed(index: int) -> dict[str, Tensor]:
        if index == 2:
            raise KeyboardInterrupt
        return Teacher()(index)

    with pytest.raises(KeyboardInterrupt):
        ask(16, killed)
    with path().open("ab") as stream:
        stream.write(b"half a chunk")  # what was written and not yet counted
    make = Teacher()
    ask(16, make)
    assert make.asked == [2, 3]


def _cut(place: Path) -> None:
    os.truncate(place, place.stat().st_size - 1)


def _scratched(place: Path) -> None:
    place.write_bytes(b"?" + place.read_bytes()[1:])


def _of_another_format(place: Path) -> None:
    data = place.read_bytes()
    assert b'"format": 2' in data
    place.write_bytes(data.replace(b'"format": 2', b'"format": 1', 1))


def _of_another_teacher(place: Path) -> None:
    data = place.read_bytes()
    place.write_bytes(data.replace(b'"teacher": "t"', b'"teacher": "u"', 1))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_cut, "too few for 12 rows"),
        (_scratched, "header cannot be read"),
        (lambda place: place.write_bytes(b""), "header cannot be read"),
        (_of_another_format, "format 1, and this version of nas reads 2"),
        (_of_another_teacher, "another teacher"),
    ],
)
def test_what_is_not_what_it_should_be_is_made_again_and_said(
    harm: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    make = Teacher()
    ask(10, make)
    files._load.cache_clear()
    harm(path())
    with caplog.at_level(logging.WARNING, LOG):
        ask(10, make)
    assert make.asked == [0, 1, 2] * 2
    assert [words in record.getMessage() for record in caplog.records] == [True]
    assert str(path()) in caplog.text
    ask(10, make)
    assert len(make.asked) == 6


@pytest.mark.parametrize("full_at", [0, 1])
def test_a_full_disk_keeps_rows_in_memory_and_says_so_once(
    full_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, plain = [], os.pwrite

    def pwrite(handle: int, data: Any, place: int) -> int:
        written.append(len(data))
        if len(written) > 2 * full_at:  # a chunk is two writes: the rows, and their number
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    make = Teacher()
    with caplog.at_level(logging.WARNING, LOG):
        ask(10, make)
        ask(10, make)
        ask(4, make)
        ask(3, Teacher(), {**ABOUT, "part": "held"})
    assert make.asked == [0, 1, 2]  # none twice, also not the one that could not be written
    assert len(caplog.records) == 1
    assert "in memory" in caplog.text
    assert "No space left" in caplog.text
    monkeypatch.setattr(os, "pwrite", plain)
    monkeypatch.setattr(files, "_in_memory", {})
    ask(10, make)  # with room again, what was counted is taken up
    assert make.asked[3:] == [0, 1, 2][full_at:]


def test_a_disk_that_would_be_filled_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=5000))
    monkeypatch.setattr(room, "SPARE", 1000)
    with caplog.at_level(logging.WARNING, LOG):
        ask(8, Teacher())
    assert "left" in caplog.text
    assert not list(path().parent.glob("*.rows"))


def test_other_refusals_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pwrite", refused)
    with pytest.raises(NasError, match="Permission denied"):
        ask(4, Teacher())


def small(limit_rows: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of so many rows of a wide teacher, one file's header each 4 rows."""
    monkeypatch.setenv("NAS_CACHE_GB", str((limit_rows / 4 * 4096 + limit_rows * WIDE_ROW) / 1e9))


WIDE, WIDE_ROW = 50_000, 100_004  # entries, bytes


def test_the_files_used_longest_ago_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    small(8, monkeypatch)
    parts = [{**ABOUT, "part": name} for name in ("a", "b", "c")]
    for age, about in enumerate(parts[:2]):
        ask(4, Teacher(WIDE), about)
        os.utime(path(about), (1000 + age, 1000 + age))
    files._load.cache_clear()
    ask(4, Teacher(WIDE), parts[0])  # used again: now b is the older
    files._load.cache_clear()
    ask(4, Teacher(WIDE), parts[2])
    assert [path(about).is_file() for about in parts] == [True, False, True]


def test_a_file_in_use_is_not_dropped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small(8, monkeypatch)
    parts = [{**ABOUT, "part": name} for name in ("a", "b", "c", "d")]
    kept = ask(4, Teacher(WIDE), parts[0])
    os.utime(path(parts[0]), (1000, 1000))
    files._load.cache_clear()  # only what is asked of the rows themselves keeps them mapped
    ask(4, Teacher(WIDE), parts[1])
    files._load.cache_clear()
    also = ask(4, Teacher(WIDE), parts[2])
    assert [path(about).is_file() for about in parts[:3]] == [True, False, True]
    files._load.cache_clear()
    with caplog.at_level(logging.WARNING, LOG):
        ask(4, Teacher(WIDE), parts[3])
    assert "in use" in caplog.text
    assert float(kept["t"][1]) == float(also["t"][1]) == 1.0


def test_a_request_beyond_the_limit_drops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(8, monkeypatch)
    ask(4, Teacher(WIDE))
    files._load.cache_clear()
    with caplog.at_level(logging.WARNING, LOG):
        ask(16, Teacher(WIDE), {**ABOUT, "part": "held"})
    assert "NAS_CACHE_GB allows" in caplog.text
    assert path().is_file()


def test_no_cache_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_GB", "0")
    make = Teacher()
    ask(8, make)
    ask(6, make)
    assert make.asked == [0, 1]
    assert not list(path().parent.glob("*.rows"))


@pytest.mark.parametrize("given", ["much", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_GB", given)
    with pytest.raises(UsageError, match="NAS_CACHE_GB"):
        ask(4, Teacher())


def test_two_that_ask_at_once_make_it_once() -> None:
    make = Teacher()

    def slow(index: int) -> dict[str, Tensor]:
        time.sleep(0.05)
        return make(index)

    threads = [threading.Thread(target=ask, args=(count, slow)) for count in (12, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(make.asked) == [0, 1, 2]


def _mapping(place: Path) -> dict[str, int]:
    """What this process holds of a mapped file, in bytes, by the names of /proc/self/smaps."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(place))
        elif inside and line.endswith("kB"):
            name, size = line.removesuffix("kB").split(":")
            found[name] = found.get(name, 0) + 1024 * int(size)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_a_batch_reads_only_its_rows_and_no_page_is_copied() -> None:
    ask(200, Teacher(WIDE))
    files._load.cache_clear()
    rows = cached_rows(ABOUT, 200, CHUNK, Teacher(WIDE))
    before = _mapping(path())
    assert before["Size"] > 200 * WIDE_ROW
    assert before["Rss"] < 2e6
    rows["x"][100:110].float()
    some = _mapping(path())["Rss"]
    assert 10 * WIDE_ROW <= some < 3e6
    rows["x"].float()
    whole = _mapping(path())
    assert whole["Rss"] > 200 * WIDE_ROW
    assert whole["Anonymous"] == whole["Private_Dirty"] == 0  # the page cache's own, which all processes share
