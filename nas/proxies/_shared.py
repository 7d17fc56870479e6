"""What proxies with something shared have in common: making it once, the largest candidate, and recovery from it."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from nas.bench import Bench, Curve, ProxySettings, Stop, distilled, one_thread
from nas.build import Network, build_block
from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.features import body
from nas.network import BlockSpec, NetworkSpec, Scalar, short_hash
from nas.paths import cache_dir
from nas.proxies import OnProgress, Score, combined
from nas.space import Candidate, SearchSpace

CHECKPOINT_EVERY = 50  # steps; a kill costs at most so many
_TRIED = 64  # candidates to look for one that can be made small among
# Of a score alone, not of what is shared; the seed is told apart.
_OWN = ("proxy", "steps", "held_rows", "seeds")


def shared_path(folder: str, space: SearchSpace, bench: Bench, seed: int, version: int) -> Path:
    """The file of what a space's candidates share; its name changes with anything that changes its content.

    Args:
        folder: below the cache folder.
        space: whose candidates.
        bench: teacher and settings.
        seed: of the run.
        version: of the proxy's code and file.
    """
    settings = {name: value for name, value in asdict(bench.settings).items() if name not in _OWN}
    identity = [version, space.hash, bench.digest, settings, seed]
    return cache_dir(folder) / f"{space.name}-{short_hash(json.dumps(identity, sort_keys=True))}.safetensors"


def once(path: Path, make: Callable[[], None]) -> Path:
    """The file, which `make` writes unless it is there; whoever comes first does so, the others wait for it."""
    if not path.is_file():
        # Released by the operating system when its holder dies, so a killed worker leaves nobody waiting.
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                make()
    return path


def training(bench: Bench) -> ProxySettings:
    """The settings of the shared run: those of a score, but for its length.

    Raises:
        NasError: it has no steps.
    """
    settings = bench.settings
    if settings.shared_steps < 1:
        raise NasError(
            f"the proxy {settings.proxy} needs shared_steps of 1 or more, got {settings.shared_steps}",
            hint="leave shared_steps at the proxy's own default",
        )
    return replace(settings, steps=settings.shared_steps)


def once_per_seed(
    bench: Bench,
    path_of: Callable[[int], Path],
    make: Callable[[Path, int, OnProgress | None], None],
    on_progress: OnProgress | None,
) -> None:
    """One shared file for each of the settings' seeds; progress is told as that of all, which are equally long."""
    seeds = bench.settings.seeds
    for number, seed in enumerate(seeds):

        def told(done: int, total: int, number: int = number) -> None:
            if on_progress is not None:
                on_progress(number * total + done, len(seeds) * total)

        path = path_of(seed)
        once(path, functools.partial(make, path, seed, told))


def first_small(space: SearchSpace, bench: Bench, rows: np.ndarray) -> tuple[Candidate, NetworkSpec]:
    """The first candidate of `rows` [n, choices] that can be made small, and its small copy.

    Raises:
        NasError: none can.
    """
    refused = NasError(f"space {space.name} has no candidate")
    for row in rows:
        candidate = space.from_row(row)
        try:
            return candidate, bench.spec(candidate)
        except NasError as error:
            refused = error
    raise refused


def largest(space: SearchSpace, bench: Bench) -> Candidate:
    """The candidate whose small copy has the most parameters.

    Numbers (widths, depths, units, ratios) are taken at their largest; then each other choice in turn takes the value
    with the most parameters, and every choice does where the largest numbers together are forbidden or cannot be made
    small. Published networks are seldom the largest of their space, and what a candidate inherits from must be at
    least as wide as it.

    Raises:
        NasError: no candidate can be made small.
    """
    top = np.array([[_most(choice.values) for choice in space.choices]])
    best, spec = first_small(space, bench, np.concatenate([top[space.allowed(top)], space.sample(_TRIED, 0)]))
    at_top = best.row == tuple(space.canonical(top)[0])
    most = _params(spec)
    for column, choice in enumerate(space.choices):
        for value in () if at_top and _numeric(choice.values) else range(len(choice.values)):
            changed = np.array([best.row])
            changed[0, column] = value
            if not space.allowed(changed)[0]:
                continue
            with contextlib.suppress(NasError):  # one that cannot be made small is not it
                candidate, spec = first_small(space, bench, changed)
                if (params := _params(spec)) > most:
                    best, most = candidate, params
    return best


def _numeric(values: Sequence[Scalar]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _most(values: Sequence[Scalar]) -> int:
    return int(np.argmax(np.array(values, dtype=float))) if _numeric(values) else 0


def _params(spec: NetworkSpec) -> int:
    return sum(_block_params(block.kind, block.settings) for block in spec.blocks)


@functools.cache
def _block_params(kind: str, settings: tuple[tuple[str, Scalar], ...]) -> int:
    with torch.device("meta"):
        module = build_block(BlockSpec(name="", kind=kind, settings=settings, inputs=()))
    return sum(each.numel() for each in module.parameters())


def network_of(student: FlowDenoiser) -> Network:
    """The network of a small copy."""
    network = body(student)
    assert isinstance(network, Network)  # a small copy is made of our blocks
    return network


def trained(
    candidate: Candidate,
    bench: Bench,
    stop: Stop | None = None,
    start: Callable[[Network, int], object] | None = None,
) -> Score:
    """The score of a small copy that is trained for the settings' steps, once per seed.

    Args:
        candidate: to be scored.
        bench: teacher and settings; at 0 steps the copy is judged as it starts.
        stop: asked about the first seed.
        start: puts shared weights into a network, given that and the seed; None leaves the random ones.

    Raises:
        Stopped: `stop` gave a reason.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    bench.prepare()
    began = time.perf_counter()
    spec = bench.spec(candidate)
    values: list[float] = []
    texts: list[float] = []
    curve: Curve = ()
    with one_thread():
        for seed in bench.settings.seeds:
            fresh = bench.student(spec, seed)
            if start is not None:
                start(network_of(fresh), seed)
            taught, found, way = distilled(fresh, bench, stop=None if values else stop)
            curve = curve or way
            values.append(found.quality_db)
            texts.append(found.text_db)
    params = sum(each.numel() for each in taught.parameters())
    return combined(values, texts, curve=curve, params=params, seconds=time.perf_counter() - began)
