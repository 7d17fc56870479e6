"""Plug-ins: a plug-in is a file, its name is the file's name, and the folder is the registry."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from nas.errors import NasError, unknown


@cache
def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NasError(f"{package} is not a package folder")
    return Path(next(iter(spec.submodule_search_locations)))


def plugins(package: str) -> tuple[str, ...]:
    """The names of the plug-ins of `package` ("nas.blocks"), read off its folder; nothing is imported."""
    names = []
    for entry in _folder(package).iterdir():
        if entry.name.startswith(("_", ".")):
            continue
        if entry.suffix == ".py":
            names.append(entry.stem)
        elif (entry / "__init__.py").is_file():
            names.append(entry.name)
    return tuple(sorted(names))


def load(package: str, name: str) -> ModuleType:
    """The plug-in `name` of `package`, or the Python file that `name` is a path to.

    Raises:
        UsageError: no such plug-in; the message offers the nearest and lists the known.
        NasError: the path does not exist.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    if name not in plugins(package):
        raise unknown(
            package.rpartition(".")[2].removesuffix("s").replace("familie", "family").replace("proxie", "proxy"),
            name,
            plugins(package),
        )
    return importlib.import_module(f"{package}.{name}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NasError(f"no plug-in file at {path}")
    module_name = f"nas_plugin_{path.stem}_{abs(hash(path.resolve()))}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise NasError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their own module up while the class body is read.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
