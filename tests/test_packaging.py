"""The distribution itself: what the wheel holds, what it declares, and that the versions agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nas

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


# What an extra installs is imported where it is used, after it was asked for.
EXTRAS = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "dev" for text in texts]
DECLARED = {_name(requirement) for requirement in (*PROJECT["dependencies"], *EXTRAS)}


def _third_party(folder: Path) -> dict[str, str]:
    """Import name -> a file that imports it, anywhere in it."""
    found: dict[str, str] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in (full.partition(".")[0] for full in names):
                if name not in sys.stdlib_module_names and name != "nas":
                    found[name] = str(path.relative_to(ROOT))
    return found


def test_everything_imported_is_declared():
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        name: path
        for name, path in _third_party(ROOT / "nas").items()
        if not {provider.lower().replace("_", "-") for provider in providers.get(name, [name])} & DECLARED
    }
    assert not undeclared


def test_every_constraint_satisfies_the_declared_range():
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    assert pinned["torch"] == "2.13.0"
    own = [text for text in PROJECT["optional-dependencies"]["dev"] if _name(text) != PROJECT["name"]]
    for text in (*PROJECT["dependencies"], *EXTRAS, *own):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[_name(text)]), text


def test_the_installed_script_is_main():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert next(script for script in scripts if script.name == "nas").value == "nas.cli:main"
    assert importlib.metadata.version("nas-diffusion") == nas.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_code_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("search_spaces", "latency_tables"):
        expected = {
            f"nas/data/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / kind).rglob("*") if path.is_file()
        }
        assert expected
        assert not {name for name in expected - names if "/." not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nas").rglob("*.py")}
    assert modules <= names
    inside = [path for path in (ROOT / "nas").rglob("*") if path.suffix in (".safetensors", ".js", ".css", ".json")]
    assert inside
    assert {path.relative_to(ROOT).as_posix() for path in inside} <= names
    assert not [name for name in names if name.startswith(("tests/", "reports/"))]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    probe = "import nas, nas.space as s; print(nas.__file__); print(*s.list_spaces())"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    where, spaces = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert "snapgen_unet" in spaces.split()
