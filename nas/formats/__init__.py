"""Published configurations: the config.json of a diffusers class to one of our networks and back.

A class is one file of this folder, found by listing it:

* `CLASS`, the class's name ("_class_name" in config.json), and `FAMILY`, the family that makes its networks;
* `network(config, *, height=None, width=None, text_tokens=77, name, where)` gives the NetworkSpec of a configuration;
  height and width are the latent's, by default those of its sample_size. A key that is not the class's, or a value that
  our blocks do not have, is a UsageError that names `where` (the file) and the key; keys that begin with "_" are
  diffusers' own notes and are passed over;
* `config(spec)` gives the class's keyword arguments that make exactly this network, or a NasError that names the block
  and the setting which the class cannot hold;
* `own_name(name)` turns one of its tensor names into ours, None for a part that we do not have (an image encoder);
  `their_name(name)` is the way back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from nas import registry
from nas.errors import NasError, UsageError, unknown
from nas.network import NetworkSpec

CONFIG: Final = "config.json"
# The folders of a diffusers pipeline that hold its denoiser.
DENOISERS: Final = ("unet", "transformer")


def classes() -> dict[str, ModuleType]:
    """Every class that can be read, by its name."""
    modules = (registry.load("nas.formats", name) for name in registry.plugins("nas.formats"))
    return {module.CLASS: module for module in modules}


def find(class_name: object, where: str) -> ModuleType:
    """The format of a diffusers class.

    Args:
        class_name: what config.json calls "_class_name"; None where it does not.
        where: the file, for errors.

    Raises:
        UsageError: no class is named, or one that cannot be read.
    """
    known = classes()
    if class_name is None:
        raise UsageError(f"{where} has no '_class_name'; classes that can be read: {', '.join(sorted(known))}")
    if not isinstance(class_name, str) or class_name not in known:
        raise unknown("'_class_name'", class_name, known, where=where)
    return known[class_name]


def config_file(path: str | Path, subfolder: str | None = None) -> Path:
    """The config.json that `path` means: itself, that of a folder, or that of the denoiser in a pipeline's folder.

    Args:
        path: a file, a folder with config.json, or a pipeline's folder with unet/ or transformer/.
        subfolder: the part of a pipeline that is meant ("vae"); the denoiser if None.

    Raises:
        UsageError: there is none.
    """
    root = Path(path)
    if root.is_file():
        return root
    if subfolder is not None:
        root = root / subfolder
    places = [root, *(() if subfolder is not None else (root / name for name in DENOISERS))]
    for folder in places:
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    looked = ", ".join(str(folder / CONFIG) for folder in places)
    raise UsageError(f"no configuration of a diffusers class at {path}: looked for {looked}")


def read_config(path: str | Path, subfolder: str | None = None) -> tuple[dict[str, Any], str]:
    """A configuration and the file that it is in (see `config_file`).

    Raises:
        UsageError: there is none, or it is not a JSON object.
        NasError: it cannot be read.
    """
    file = config_file(path, subfolder)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise NasError(f"{file} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} must hold a JSON object, got a {type(config).__name__}")
    return config, str(file)


def network(
    config: Mapping[str, Any],
    where: str,
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = 77,
    name: str | None = None,
) -> NetworkSpec:
    """The network of a configuration, by its "_class_name".

    Args:
        config: the content of a config.json.
        where: the file, for errors.
        height: of the latent, in its own pixels; that of the configuration's sample_size if None.
        width: likewise.
        text_tokens: T of the text that it will be called with.
        name: of the network; the class's if None.

    Raises:
        UsageError: an unknown class or key, or a value that our blocks do not have.
    """
    module = find(config.get("_class_name"), where)
    made: NetworkSpec = module.network(
        config, height=height, width=width, text_tokens=text_tokens, name=name or module.CLASS, where=where
    )
    return made


# Where several classes hold a network, the one that most tools read.
_PREFERRED: Final = ("UNet2DConditionModel",)


def holding(spec: NetworkSpec, class_name: str | None = None) -> tuple[ModuleType, dict[str, Any]]:
    """The class that holds a network, and its keyword arguments.

    Args:
        spec: the network.
        class_name: the class that must hold it; any if None.

    Raises:
        UsageError: there is no such class.
        NasError: none can hold it; says why not, by block and setting.
    """
    wanted = [find(class_name, "the class to write")] if class_name is not None else _by_preference(spec)
    refusals = []
    for module in wanted:
        try:
            return module, module.config(spec)
        except NasError as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    reasons = "; ".join(error.message for error in refusals)
    raise NasError(f"no diffusers class holds it: {reasons}", hint=refusals[0].hint)


def is_complete(module: ModuleType) -> bool:
    """Whether our network is all that the class has; of an autoencoder it is the decoder only."""
    return bool(module.FAMILY != "decoder")


def plain_class(spec: NetworkSpec) -> str | None:
    """The name of the class that holds a network; None where none does."""
    try:
        return str(holding(spec)[0].CLASS)
    except NasError:
        return None


def _by_preference(spec: NetworkSpec) -> list[ModuleType]:
    """The classes of the network's family, as far as its blocks tell it, the preferred first."""
    known = sorted(classes().values(), key=lambda module: (module.CLASS not in _PREFERRED, module.CLASS))
    marks = {"unet": "down_blocks.", "dit": "transformer_blocks."}
    for family, mark in marks.items():
        if any(block.name.startswith(mark) for block in spec.blocks):
            return [module for module in known if family == module.FAMILY]
    return [module for module in known if module.FAMILY not in marks]
