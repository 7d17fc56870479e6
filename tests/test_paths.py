"""Where data is found, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nas import paths
from nas.errors import NasError


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A package at tmp/site/nas and the three places where the kind "things" may lie, none of them made yet."""
    package = tmp_path / "site" / "nas"
    package.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", package)
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "env"))
    return {
        "environment": tmp_path / "env" / "things",
        "packaged": package / "data" / "things",
        "sibling": tmp_path / "site" / "things",
    }


def test_data_dir_prefers_environment_then_package_then_checkout(roots: dict[str, Path]):
    for name in ("sibling", "packaged", "environment"):
        roots[name].mkdir(parents=True)
        assert paths.data_dir("things") == roots[name]


def test_data_dir_takes_an_override_and_nothing_else(roots: dict[str, Path], tmp_path: Path):
    roots["sibling"].mkdir()
    own = tmp_path / "own"
    with pytest.raises(NasError, match="own"):
        paths.data_dir("things", own)
    own.mkdir()
    assert paths.data_dir("things", str(own)) == own


def test_data_dir_says_where_it_looked(roots: dict[str, Path]):
    with pytest.raises(NasError) as caught:
        paths.data_dir("things")
    assert all(str(folder) in caught.value.message for folder in roots.values())
    assert "NAS_DATA" in str(caught.value.hint)


def test_the_checkouts_own_spaces_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NAS_DATA", raising=False)
    assert (paths.data_dir("search_spaces") / "snapgen_unet.toml").is_file()


def test_package_data_lies_inside_the_package():
    assert paths.package_data("teachers", "x") == Path(paths.__file__).parent / "data" / "teachers" / "x"


def test_cache_dir_follows_the_environment_and_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    assert paths.cache_dir("traces", "v1") == tmp_path / "cache" / "traces" / "v1"
    assert paths.cache_dir("traces", "v1").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAS_CACHE", "")
    assert paths.cache_dir() == tmp_path / ".cache" / "nas"
    monkeypatch.delenv("NAS_CACHE")
    assert paths.cache_dir() == tmp_path / ".cache" / "nas"


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A folder that nobody, root included, can make: its parent is a regular file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


def test_unwritable_places_are_one_sentence_with_the_remedy(blocked: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NasError, match="output folder") as caught:
        paths.writable_dir(blocked)
    assert str(blocked) in caught.value.message
    assert "--out" in str(caught.value.hint)
    with pytest.raises(NasError, match="cannot write") as caught:
        paths.atomic_write(blocked / "a.txt", "x")
    assert str(blocked / "a.txt") in caught.value.message
    monkeypatch.setenv("NAS_CACHE", str(blocked))
    with pytest.raises(NasError, match="cache folder") as caught:
        paths.cache_dir("traces")
    assert "NAS_CACHE" in str(caught.value.hint)


def test_a_folder_that_exists_but_refuses_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", refuse)
    with pytest.raises(NasError, match="Read-only file system"):
        paths.writable_dir(tmp_path)


def test_writable_dir_makes_the_folder_and_leaves_it_empty(tmp_path: Path):
    folder = paths.writable_dir(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_atomic_write_writes_text_and_bytes_and_makes_the_folder(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    assert paths.atomic_write(path, "é\n") == path
    assert path.read_bytes() == "é\n".encode()
    paths.atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, call: str
):
    path = paths.atomic_write(tmp_path / "a.txt", "old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, call, fail)
    expected = NasError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        paths.atomic_write(path, "new and longer")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
