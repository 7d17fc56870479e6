"""Plug-ins are files; the folder is the registry."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from nas import registry
from nas.errors import NasError, UsageError

_numbers = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package with the plug-ins `alpha` (file), `beta` (folder), and what is not one."""
    name = f"plugged_{next(_numbers)}"
    folder = tmp_path / name
    (folder / "beta").mkdir(parents=True)
    (folder / "not_a_package").mkdir()
    (folder / "__pycache__").mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "alpha.py").write_text("WHO = 'alpha'\n")
    (folder / "beta" / "__init__.py").write_text("WHO = 'beta'\n")
    (folder / "_helper.py").write_text("raise RuntimeError\n")
    (folder / ".hidden.py").write_text("raise RuntimeError\n")
    (folder / "notes.md").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_plugins_lists_files_and_packages_and_imports_none(package: str):
    assert registry.plugins(package) == ("alpha", "beta")
    assert not any(name.startswith(f"{package}.") for name in sys.modules)


def test_a_file_dropped_into_the_folder_is_found_at_once(package: str, tmp_path: Path):
    assert "gamma" not in registry.plugins(package)
    (tmp_path / package / "gamma.py").write_text("WHO = 'gamma'\n")
    assert registry.load(package, "gamma").WHO == "gamma"


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_load_imports_by_name(package: str, name: str):
    assert name == registry.load(package, name).WHO


@pytest.mark.parametrize("name", ["alhpa", "_helper"])
def test_an_unknown_name_lists_the_known(package: str, name: str):
    with pytest.raises(UsageError, match=f"'{name}'.* known: alpha, beta"):
        registry.load(package, name)


@pytest.mark.parametrize(("package_name", "kind"), [("nas.families", "family"), ("nas.blocks", "block")])
def test_an_unknown_name_is_told_in_the_singular(package_name: str, kind: str):
    with pytest.raises(UsageError, match=f"^unknown {kind} 'zzz'"):
        registry.load(package_name, "zzz")


def test_a_missing_package_is_told():
    with pytest.raises(NasError, match=r"nas\.errors is not a package folder"):
        registry.plugins("nas.errors")


def test_a_path_outside_the_tree_loads_once_and_may_define_dataclasses(package: str, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Settings:\n    width: int\n"
    )
    module = registry.load(package, str(path))
    assert module.Settings(width=3).width == 3
    assert registry.load(package, str(path)) is module


def test_two_files_of_one_name_are_two_plugins(package: str, tmp_path: Path):
    modules = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"WHO = {folder!r}\n")
        modules.append(registry.load(package, str(tmp_path / folder / "mine.py")))
    assert [module.WHO for module in modules] == ["one", "two"]


def test_a_file_that_fails_is_not_remembered(package: str, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("raise RuntimeError('half way')\n")
    with pytest.raises(RuntimeError, match="half way"):
        registry.load(package, str(path))
    path.write_text("WHO = 'mended'\n")
    assert registry.load(package, str(path)).WHO == "mended"


def test_a_path_that_does_not_exist_is_told(package: str, tmp_path: Path):
    with pytest.raises(NasError, match=r"no plug-in file at .*nothing\.py"):
        registry.load(package, str(tmp_path / "nothing.py"))
