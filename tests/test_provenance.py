"""The record of what made an artefact."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nas
from nas import provenance


def test_hashes_are_sha256(tmp_path: Path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    path = tmp_path / "a"
    path.write_bytes(b"")
    assert provenance.file_sha(path) == provenance.text_sha("") == empty
    # Longer than one chunk, so a reader that stops after the first is found out.
    path.write_bytes(b"a" * 1_500_000)
    assert provenance.file_sha(path) == provenance.text_sha("a" * 1_500_000)


def test_library_versions_are_those_installed_and_absent_ones_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "_LIBRARIES", ("numpy", "no-such-library-here"))
    assert provenance.library_versions() == {"numpy": importlib.metadata.version("numpy")}


def test_the_record_needs_no_torch():
    code = "import sys; from nas.provenance import provenance; provenance(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_record_is_json_and_carries_what_is_added():
    record = json.loads(json.dumps(provenance.provenance(seed=3, inputs={"a.toml": "00"})))
    assert record["nas"] == nas.__version__
    assert record["seed"] == 3
    assert record["inputs"] == {"a.toml": "00"}
    assert record["processor"]
    assert record["libraries"]["numpy"] == importlib.metadata.version("numpy")
    date = datetime.datetime.fromisoformat(record["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - date) < datetime.timedelta(minutes=1)


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the package, not yet a repository."""
    root = tmp_path / "checkout"
    (root / "nas").mkdir(parents=True)
    (root / "nas" / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(root / "nas" / "provenance.py"))
    return root


def test_commit_is_none_outside_a_checkout_and_before_the_first_commit(checkout: Path):
    assert provenance.commit() is None
    _git(checkout, "init", "-q")
    assert provenance.commit() is None


def test_commit_tells_tracked_changes_and_ignores_untracked_files(checkout: Path):
    _git(checkout, "init", "-q")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-q", "-m", "first")
    head = _git(checkout, "rev-parse", "HEAD")[:12]
    assert provenance.commit() == head
    (checkout / "new.txt").write_text("")
    assert provenance.commit() == head
    (checkout / "nas" / "provenance.py").write_text("changed")
    assert provenance.commit() == f"{head}+changes"
