"""A candidate's quality: the score of the chosen proxy, what it cannot see, and how well it was found to rank."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nas import proxies
from nas.bench import Bench, ProxySettings, Stop, teacher_hash
from nas.errors import NasError
from nas.paths import data_dir
from nas.proxies import Score
from nas.space import Candidate, SearchSpace

__all__ = ["ProxySettings", "Score", "cannot_see", "fidelity", "prepare", "score", "teacher_hash"]

CARDS = "proxy"  # below reports/: of this project, and of the folder that a person works in


def prepare(
    space: SearchSpace,
    teacher: str,
    settings: ProxySettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Computes what all candidates share (the teacher's answers, and what the proxy itself needs) unless it is cached.

    No candidate's time then includes it.

    Raises:
        NasError: no such teacher, or one that cannot teach the task.
    """
    bench = Bench(teacher, settings)
    bench.prepare(on_progress)
    proxies.prepare(space, bench, on_progress)


def score(candidate: Candidate, teacher: str, settings: ProxySettings, stop: Stop | None = None) -> Score:
    """The proxy's score of one candidate; runs in one thread, fit for a process pool.

    Args:
        candidate: to be scored.
        teacher: as for `nas.teachers.load_teacher`.
        settings: which proxy, and how.
        stop: ends a run early where it gives a reason; proxies that train nothing do not ask it.

    Raises:
        Stopped: `stop` gave a reason.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    return proxies.proxy(settings.proxy).score(candidate, Bench(teacher, settings), stop)


def cannot_see(settings: ProxySettings) -> tuple[str, ...]:
    """What a reader must know this score says nothing about."""
    rows = settings.steps * settings.batch
    return (
        f"It scores a copy with widths divided by {settings.width_divisor} after {settings.steps} steps on {rows:,}"
        " drawn 32x32 scenes: what shows only at full width, at full resolution or late in training is not in it.",
        "So short a run favours networks that learn fast, which are often the small and shallow ones; a larger network"
        " may overtake them with training. The front can therefore end well below the budget.",
        "Captions are hardly learnt in so short a run, so the quality does not judge where cross-attention stands; the"
        " text score beside it says how much of the caption's effect each student has learnt (0 dB: none).",
        "It compares networks under output distillation with one recipe; a network that needs another learning rate"
        " or another loss is scored lower than it deserves.",
        "Differences below about two standard deviations of the seeds are ties.",
    )


def fidelity(settings: ProxySettings, teacher: str, space: str) -> dict[str, Any] | None:
    """How well this score ranked against longer training; None where these settings and teacher were never tested.

    A card of the space is taken before one of another. `nas fidelity` and benchmarks/proxy_table.py write them.
    """
    wanted, digest = json.loads(json.dumps(asdict(settings))), teacher_hash(teacher)
    found = [card for card in _cards() if card["proxy"] == wanted and card["teacher_digest"] == digest]
    found.sort(key=lambda card: card["space"] != space)
    return found[0] if found else None


def _cards() -> list[dict[str, Any]]:
    folders = [Path("reports") / CARDS]
    with contextlib.suppress(NasError):  # an installed package has no reports
        folders.append(data_dir("reports") / CARDS)
    paths = dict.fromkeys(path.resolve() for folder in folders for path in sorted(folder.glob("card-*.json")))
    return [json.loads(path.read_text()) for path in paths]
