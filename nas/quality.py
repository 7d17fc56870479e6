"""A candidate's quality: the score of the chosen proxy, what it cannot see, and how well it was found to rank."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from nas import proxies
from nas.bench import LATENTS, ProxySettings, Stop, bench_of, teacher_hash
from nas.errors import NasError
from nas.network import short_hash
from nas.paths import data_dir
from nas.proxies import Score, regression
from nas.space import Candidate, SearchSpace

__all__ = [
    "ProxySettings",
    "Score",
    "cannot_see",
    "chosen_because",
    "default_settings",
    "fidelity",
    "identity",
    "on_latents",
    "prepare",
    "score",
    "teacher_hash",
]

_FULL_SIZE_LR = 1e-4
CARDS = "proxy"  # below reports/: of this project, and of the folder that a person works in


def default_settings(space: SearchSpace, teacher: str) -> ProxySettings:
    """What a search takes unasked: the regression where one was fitted for the space and teacher, else distillation.

    The regression ranked best and is the cheapest where it exists (benchmarks/proxy_table.py). `chosen_because` says
    which of the two it was.

    Raises:
        NasError: no such teacher, or one that cannot teach the task.
    """
    fitted = proxies.settings_of("regression")
    return fitted if regression.fitted(space, bench_of(teacher, fitted)) else ProxySettings()


def chosen_because(settings: ProxySettings, space: SearchSpace) -> str:
    """Why a search that was asked for no proxy has this one."""
    if settings.proxy == "regression":
        return f"a regression was fitted on long runs of {space.name} with this teacher"
    return f"no regression was fitted on long runs of {space.name} as it is now with this teacher"


def identity(settings: ProxySettings, space: SearchSpace, teacher: str) -> dict[str, Any]:
    """What decides a score besides the candidate and the teacher's weights, as plain data.

    Raises:
        NasError: a regression that was not fitted for the space and teacher.
    """
    found = asdict(settings)
    if settings.proxy == "regression":
        fit = regression.fit_for(space, bench_of(teacher, settings))
        found["fit"] = short_hash(json.dumps(fit, sort_keys=True))
    return found


def prepare(
    space: SearchSpace,
    teacher: str,
    settings: ProxySettings,
    on_progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> None:
    """Computes what all candidates share (the teacher's answers, and what the proxy itself needs) unless it is cached.

    No candidate's time then includes it.

    Raises:
        NasError: no such teacher, or one that cannot teach the task.
    """
    bench = bench_of(teacher, settings, device)
    bench.prepare(on_progress)
    proxies.prepare(space, bench, on_progress)


def score(
    candidate: Candidate, teacher: str, settings: ProxySettings, stop: Stop | None = None, device: str = "cpu"
) -> Score:
    """The proxy's score of one candidate; runs in one thread, fit for a process pool.

    Args:
        candidate: to be scored.
        teacher: as for `nas.teachers.load_teacher`.
        settings: which proxy, and how.
        stop: ends a run early where it gives a reason; proxies that train nothing do not ask it.
        device: as for `nas.bench.Bench`; it decides the speed alone.

    Raises:
        Stopped: `stop` gave a reason.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    return proxies.proxy(settings.proxy).score(candidate, bench_of(teacher, settings, device), stop)


def on_latents(settings: ProxySettings, data: Path, device: str = "cpu") -> ProxySettings:
    """The same proxy on candidates at their full size, trained on a folder of latents: bf16 on a GPU.

    The rate is what the recipes of published systems take for networks of that size, a hundredth of the small copies'.
    """
    precision: Literal["fp32", "bf16"] = "bf16" if device.startswith("cuda") else "fp32"
    return replace(settings, task=LATENTS, data=str(data), lr=_FULL_SIZE_LR, precision=precision)


def cannot_see(settings: ProxySettings) -> tuple[str, ...]:
    """What a reader must know this score says nothing about."""
    scale = f"a copy with widths divided by {settings.width_divisor}"
    where = "drawn 32x32 scenes"
    if settings.task == LATENTS:
        scale, where = "the candidate itself", "examples from disk"
    found = []
    if settings.proxy == "regression":
        return (
            f"It trains nothing: it predicts from size, shape and training-free scores where a longer run of {scale}"
            " would end, by a fit of candidates that were run. Far from those, and where its features do not tell two"
            " networks apart (where attention stands, say), it is wrong without saying so.",
            "What it predicts is itself a run of small copies, not of the network at its full width and resolution, and"
            " not to its end.",
            "Differences below about two standard deviations of the predictions that left a candidate out are ties.",
        )
    if settings.steps == 0 and settings.shared_steps == 0:
        found.append(f"It trains nothing: it is read off {scale}, or off the candidate's size, and was never taught.")
    else:
        shared = f" on top of {settings.shared_steps} that all candidates share" if settings.shared_steps else ""
        found.append(
            f"It scores {scale} after {settings.steps} steps{shared}, {settings.steps * settings.batch:,} {where}: what"
            " shows only late in training is not in it"
            + (", nor what shows only at full width or full resolution." if settings.task != LATENTS else ".")
        )
        found.append(
            "So short a run favours networks that learn fast; a larger one may overtake them with training. The front"
            " can therefore end well below the budget."
        )
        found.append(
            "Captions are hardly learnt in so short a run, so the quality says little about where cross-attention"
            " stands; the text score beside it says how much of the caption's effect each student has learnt (0 dB:"
            " none)."
        )
        found.append(
            "It compares networks under output distillation with one recipe; a network that needs another learning"
            " rate or another loss is scored lower than it deserves."
        )
    found.append(
        "Differences below about two standard deviations of the seeds are ties."
        if len(settings.seeds) > 1
        else "One initialisation each: the fidelity card says how far two of them differ, and less than that is a tie."
    )
    return tuple(found)


def fidelity(settings: ProxySettings, teacher: str, space: str) -> dict[str, Any] | None:
    """How well this score ranked against longer training; None where these settings and teacher were never tested.

    A card of the space is taken before one of another. `nas fidelity` and benchmarks/proxy_table.py write them.
    """
    wanted, digest = json.loads(json.dumps(asdict(settings))), teacher_hash(teacher)
    found = [card for card in _cards() if card["proxy"] == wanted and card["teacher_digest"] == digest]
    found.sort(key=lambda card: (card["space"] != space, -int(card.get("candidates", 0))))
    return found[0] if found else None


def _cards() -> list[dict[str, Any]]:
    folders = [Path("reports") / CARDS]
    with contextlib.suppress(NasError):  # an installed package has no reports
        folders.append(data_dir("reports") / CARDS)
    paths = dict.fromkeys(path.resolve() for folder in folders for path in sorted(folder.glob("card-*.json")))
    return [json.loads(path.read_text()) for path in paths]
