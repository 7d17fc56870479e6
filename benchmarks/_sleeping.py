"""A study whose proxy sleeps: all of it is real but the prices and the scores, which are formulas of the choices."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nas import quality
from nas.device import Budget
from nas.evaluate import Evaluation, Terms
from nas.proxies import Score
from nas.record import Trial
from nas.space import Candidate, SearchSpace, load_space
from nas.study import Plan, Study
from nas.study.storage import close_storage, open_storage

TOML = """
family = "unet"
[input]
latent_channels = 4
latent_height = 8
latent_width = 8
pixels_per_latent = 8
text_tokens = 4
text_width = 8
[choices]
width = [1, 2, 3, 4, 5, 6, 7, 8]
depth = [0, 1, 2, 3, 4, 5]
heads = [1, 2, 4, 8]
ratio = [1, 2, 3, 4]
kind = ["full", "separable"]
attention = [false, true]
[[reference]]
name = "known"
title = "a published one"
source = "a benchmark"
[reference.choices]
width = 4
depth = 3
heads = 2
ratio = 2
kind = "full"
attention = true
"""


def latency_ms(row: tuple[int, ...]) -> float:
    """The price of a row; it takes no time."""
    width, depth, heads, ratio, kind, attention = row
    return (10.0 + 4 * width * (1 + ratio) + 3 * depth + 2 * attention * 2**heads) * (0.6 if kind else 1.0)


def value(row: tuple[int, ...]) -> float:
    """The score of a row, of any space."""
    noise = int(hashlib.sha256(str(row).encode()).hexdigest()[:6], 16) / 16**6
    return float(3.0 * np.sqrt(1.0 + sum(row)) + noise)


@dataclass(frozen=True)
class Formulas:
    """Stands for `nas.evaluate.Evaluator`."""

    space: SearchSpace
    sheet: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(slug="formula"))
    terms: Terms = Terms(budget=Budget(ms=90.0, per_step=True, device="formula"), calls=1, parts=(), confidence=0.8)

    def identity(self) -> dict[str, Any]:
        """What decides the prices."""
        return {"budgets": [str(self.terms.budget)], "predictors": ["formula"]}

    def problem_pool(self, n: int = 100_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All candidates within the budget."""
        rows = np.array([c.row for c in self.space.enumerate() if latency_ms(c.row) <= self.terms.budget.ms])
        return rows, *self.features(rows)

    def features(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latency of any rows, and what a surrogate may read."""
        ms = np.array([latency_ms(tuple(row)) for row in rows.tolist()])
        return ms, np.log2(ms)[:, None]

    def price(self, candidates: list[Candidate], source: str = "search") -> list[Evaluation]:
        """Evaluations without quality."""
        return [self._priced(each, source) for each in candidates]

    def _priced(self, candidate: Candidate, source: str) -> Evaluation:
        ms = latency_ms(candidate.row)
        fits = ms <= self.terms.budget.ms
        return Evaluation(
            key=candidate.key,
            choices=candidate.choices,
            params=int(ms),
            macs=int(ms),
            weight_bytes=1,
            peak_activation_bytes=1,
            step_ms=ms,
            latency_ms=ms,
            latency_low_ms=ms,
            latency_high_ms=ms,
            meets_budget_probability=float(fits),
            feasible=fits,
            reason="" if fits else "over",
            source=source,
        )


def plan(trials: int, storage: str | None, *, sampler: str = "random", jobs: int = 1) -> Plan:
    """The study's plan."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "formulas.toml"
        path.write_text(TOML)
        space = load_space(path)
    return Plan(
        evaluator=Formulas(space),
        teacher="embedded",
        proxy=quality.ProxySettings(),
        trials=trials,
        seed=0,
        jobs=jobs,
        sampler=sampler,
        storage=storage,
    )


@contextmanager
def sleeping(mean_s: float, log: Path | None = None, spread: float = 0.0) -> Iterator[None]:
    """Inside, a proxy sleeps and then says its formula; `log` has a line when one begins and one when it ends.

    Args:
        mean_s: seconds that it sleeps on average.
        log: any number of processes may share it.
        spread: a run sleeps between (1 - spread) and (1 + spread) of the mean.
    """
    scored = quality.score

    def score(candidate: Candidate, *_: Any) -> Score:
        _say(log, f"begin {candidate.key} {os.getpid()} {time.monotonic()}")
        share = int(hashlib.sha256(f"{candidate.key}{time.time()}".encode()).hexdigest()[:6], 16) / 16**6
        began = time.monotonic()
        time.sleep(mean_s * (1 - spread + 2 * spread * share))
        _say(log, f"end {candidate.key} {os.getpid()} {time.monotonic()}")
        return Score(value=value(candidate.row), value_sd=0.01, seconds=time.monotonic() - began)

    quality.score = score
    try:
        yield
    finally:
        quality.score = scored


def _say(log: Path | None, line: str) -> None:
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)


def work(
    given: Plan, folder: Path, mean_s: float, log: Path | None = None, spread: float = 0.0, *, joins: bool
) -> list[Trial]:
    """One worker of the study, the searching one or one that joins; returns the trials once the study has them all."""
    threads = ThreadPoolExecutor(given.jobs)
    with (
        sleeping(mean_s, log, spread),
        Study(given, folder, executor=threads, name="sleeping", joins=joins) as study,
    ):
        _say(log, f"open {'worker' if joins else 'search'} {os.getpid()}")
        study.run()
        return study.trials()


def prepare(given: Plan, folder: Path) -> None:
    """Imports what the storage needs, and makes its tables, before workers are forked."""
    close_storage(open_storage(given.storage, folder))


def started(
    given: Plan, folder: Path, mean_s: float, log: Path, spread: float = 0.0, *, joins: bool
) -> multiprocessing.process.BaseProcess:
    """A worker in a process of its own, forked so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(
        target=work, args=(replace(given), folder, mean_s, log, spread), kwargs={"joins": joins}
    )
    process.start()
    return process
