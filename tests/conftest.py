"""What every test gets: one thread, and a cache of its own that the whole session shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch or numpy is imported: tests run beside each other, and results must not depend on the machine's cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
# Nothing here may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

if TYPE_CHECKING:
    from nas.space import SearchSpace

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Traces and teacher targets are made once per session and never mixed with the user's."""
    before = os.environ.get("NAS_CACHE")
    os.environ["NAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["NAS_CACHE"]
    else:
        os.environ["NAS_CACHE"] = before


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Data of its own in a folder of its own: one target, no rows."""
    from tests.measure_cases import sheet_in  # most tests need none of what it imports

    monkeypatch.setenv("NAS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "latency_tables"
    sheet_in(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny untrained teacher."""
    from tests.tiny_lesson import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    """A space of tiny networks."""
    from tests.tiny_space import write_space

    return write_space(tmp_path_factory.mktemp("space"))


def _own_cache(folder: Path) -> Iterator[Path]:
    """Points the cache elsewhere; what this process has open of the other one is let go."""
    from nas import targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE", str(folder))
        targets._load.cache_clear()
        yield folder / "targets"
        targets._load.cache_clear()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache of the test's own: the folder of teacher targets in it."""
    yield from _own_cache(tmp_path)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the test file's own."""
    yield from _own_cache(tmp_path_factory.mktemp("cache"))
