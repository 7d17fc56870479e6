"""Imports go downwards only; heavy libraries stay in their rooms; the light commands stay light."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nas"

# Top to bottom. A room may import rooms on lower lines only, never a neighbour on its own line.
LINES = (
    "cli",
    "train report profile",
    "judge",
    "page search remeasure students fidelity",
    "study",
    "cluster sampler",
    "record stopping importance scores",
    "evaluate",
    "quality",
    "proxies",
    "bench",
    "targets cache",
    "distill",
    "objectives tasks teachers",
    "batches times",
    "diffusion features",
    "measure",
    "backends",
    "exporters",
    "checkpoint components inherit pricing",
    "trace",
    "build",
    "blocks",
    # torch from here up
    "formats locate edit",
    "families latency",
    "tables cost",
    "space",
    "space_file",
    "network device op pareto",
    "paths registry provenance",
    "errors",
)
LEVEL = {room: level for level, line in enumerate(LINES) for room in line.split()}

TORCH_FREE = set(" ".join(LINES[LINES.index("formats locate edit") :]).split()) | {"cli", "report", "page"}
CONFINED = {
    "optuna": {"nas/study", "nas/sampler", "nas/importance.py"},
    "plotly": {"nas/report", "nas/page", "nas/profile"},
    "typer": {"nas/cli"},
    "webdataset": {"nas/tasks/latents", "nas/cache"},
    "accelerate": {"nas/train"},
    "fvcore": {"nas/profile"},
    "thop": {"nas/profile"},
    "onnxruntime": {"nas/backends", "nas/exporters/onnx"},
    "onnx": {"nas/exporters/onnx", "nas/backends/onnxruntime.py", "nas/backends/_onnx_nodes.py"},
    "tvm": {"nas/backends/tvm", "nas/exporters/tvm"},
    "openvino": {"nas/backends/openvino.py"},
    "coremltools": {"nas/backends/coreml_remote.py", "nas/exporters/coreml.py"},
    "executorch": {"nas/backends/executorch.py", "nas/exporters/executorch.py"},
}


@dataclass(frozen=True)
class Import:
    """One import statement's target; `eager` where it runs when the file is imported."""

    module: str
    line: int
    eager: bool


class _Imports(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[Import] = []
        self.eager = True

    def _function(self, node: ast.AST) -> None:
        before, self.eager = self.eager, False
        self.generic_visit(node)
        self.eager = before

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.dump(node.test):
            self._function(node)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, self.eager) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        self.found += [Import(f"{base}.{alias.name}", node.lineno, self.eager) for alias in node.names]


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "data" not in path.relative_to(PACKAGE).parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    name = module_name(path)
    visitor = _Imports(name if path.name == "__init__.py" else name.rpartition(".")[0])
    visitor.visit(ast.parse(path.read_text()))
    return tuple(visitor.found)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "nas" and not parts[1].startswith("_") else None


def wrong_direction(importer: str, imported: str) -> bool:
    """Whether a module of room `importer` may not import room `imported`."""
    return importer != imported and LEVEL[imported] <= LEVEL[importer]


def test_every_file_stands_in_a_known_room():
    strangers = {room(module_name(path)) for path in files()} - set(LEVEL) - {None}
    assert not strangers, f"give {strangers} a line in DESIGN and in this test"


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_go_downwards(path):
    importer = room(module_name(path))
    if importer is None:
        return
    upwards = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for found in imports(path)
        if (target := room(found.module)) in LEVEL and wrong_direction(importer, target)
    ]
    assert not upwards


def test_the_order_itself_can_fail():
    assert wrong_direction("errors", "cli")
    assert wrong_direction("tables", "cost")
    assert wrong_direction("families", "blocks")
    assert not wrong_direction("cli", "errors")
    assert not wrong_direction("blocks", "blocks")


def _inside(path: Path, places: set[str]) -> bool:
    relative = path.relative_to(ROOT).as_posix()
    return any(relative == place or relative.startswith((f"{place}/", f"{place}.py")) for place in places)


@pytest.mark.parametrize("library", sorted(CONFINED))
def test_a_library_is_imported_only_in_its_rooms(library):
    astray = [
        f"{path.relative_to(ROOT)}:{found.line}"
        for path in files()
        for found in imports(path)
        if found.module.split(".")[0] == library and not _inside(path, CONFINED[library])
    ]
    assert not astray


def _eager_closure(start: Path) -> set[str]:
    """Every module that importing `start` imports, as far as the package's own files tell."""
    by_name = {module_name(path): path for path in files()}
    seen: set[str] = set()
    todo = [module_name(start)]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in imports(by_name[name]) if name in by_name else ():
            if not found.eager:
                continue
            # `from nas.a import b` may name a module or something inside one; the packages above are run either way.
            parts = found.module.split(".")
            todo += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return seen


@pytest.mark.parametrize("path", [path for path in files() if room(module_name(path)) in TORCH_FREE], ids=module_name)
def test_light_rooms_do_not_import_torch(path):
    heavy = {name.split(".")[0] for name in _eager_closure(path)} & {"torch", "diffusers", "transformers", "optuna"}
    assert not heavy


# What a command really loads, seen from outside.

_PROBE = """
import sys, json
from nas.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["search", "--help"], ["spaces"], ["devices"], ["report", "none"]],
    ids=" ".join,
)
def test_light_commands_load_no_torch(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == (2 if arguments[0] == "report" else 0), done.stderr
    assert not {"torch", "optuna", "tvm", "onnxruntime", "diffusers"} & set(loaded)
    if "--help" in arguments:
        assert not {"numpy", "pandas", "scipy", "plotly"} & set(loaded)
