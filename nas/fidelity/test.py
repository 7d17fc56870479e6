"""Testing a proxy on a person's own space, teacher and task: candidates scored, trained long, and compared.

A test is a table of scores and a table of long runs, each row written as soon as it is there; the same test goes on
where it was stopped.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nas import proxies, quality, registry
from nas.bench import Bench, ProxySettings
from nas.device import find_target
from nas.errors import NasError, UsageError
from nas.fidelity.agreement import Truth, tau
from nas.fidelity.card import Compared, card, rounded
from nas.fidelity.choose import pool_of, spread_out
from nas.fidelity.rows import Table
from nas.fidelity.scoring import score_row, value_of
from nas.fidelity.truth import Samples, long_run, settings_key
from nas.latency import load_predictor
from nas.network import short_hash
from nas.paths import atomic_write
from nas.pricing import Pricer
from nas.space import Candidate, SearchSpace, load_space
from nas.study.worker import workers

FEWEST = 8  # candidates: with fewer, no interval of a rank correlation says anything
LONGER = 10  # times the proxy's steps, below which a long run is a proxy itself
SEEDS = (100, 101)  # no proxy's, so that agreement is not shared initialisation
EVERY_THIRD = 3  # candidates of which every one is trained twice
# Of long runs, as in benchmarks/proxy_truth.py: rows that no proxy sees, and the rate at which its students learn most.
LONG_LR = 6e-3

Progress = Callable[[str, int, int, str], None]
Job = tuple[tuple[Any, ...], dict[str, Any]]  # a worker's arguments, and the columns that its row begins with


@dataclass(frozen=True, kw_only=True)
class FidelityTest:
    """A test that has been checked and can be run.

    Attributes:
        space: whose candidates are tried.
        teacher: as for `nas.teachers.load_teacher`.
        settings: of the proxy.
        long: of the long runs.
        device: whose predicted latencies spread the candidates and define bands, by its slug.
        candidates: to be tried.
        costs: by name, of each candidate [n].
        latency_ms: of each candidate [n].
        samples: how the checker's samples are drawn.
    """

    space: SearchSpace
    teacher: str
    settings: ProxySettings
    long: ProxySettings
    device: str
    candidates: list[Candidate]
    costs: dict[str, np.ndarray]
    latency_ms: np.ndarray
    samples: Samples = Samples()

    @property
    def runs(self) -> list[tuple[Candidate, int]]:
        """Long runs: the first seed of all, then the second of every third."""
        first = [(each, SEEDS[0]) for each in self.candidates]
        return first + [(each, SEEDS[1]) for each in self.candidates[::EVERY_THIRD]]

    @cached_property
    def bench(self) -> Bench:
        """Of the long runs."""
        return Bench(self.teacher, self.long)


def plan_test(
    space_name: str,
    teacher: str,
    *,
    candidates: int,
    long_steps: int,
    proxy: str | None = None,
    device: str = "iphone",
    seed: int = 0,
    progress: Progress | None = None,
) -> FidelityTest:
    """Checks what is asked for and chooses the candidates.

    Args:
        space_name: a space's name, or the path of its file.
        teacher: as for `nas.teachers.load_teacher`.
        candidates: how many; the space's references first, the others spread over its latencies.
        long_steps: optimiser steps of each long run.
        proxy: a plug-in of nas/proxies/; None for what `nas search` uses unasked.
        device: whose latencies.
        seed: of the choice.
        progress: told what is priced.

    Raises:
        UsageError: an unknown name, too few candidates or steps, or a space that has no such candidates.
        NasError: the device has no predictor, or the teacher cannot be loaded.
    """
    space = load_space(space_name)
    if proxy is not None:
        proxies.proxy(proxy)
    reason = getattr(registry.load("nas.families", space.family), "NO_PROXY", None)
    if reason is not None:
        raise UsageError(f"space {space.name} has no proxy to test: {reason}")
    settings = quality.default_settings(space, teacher) if proxy is None else proxies.settings_of(proxy)
    if candidates < FEWEST:
        raise UsageError(
            f"--candidates must be at least {FEWEST} for a rank correlation to say anything, got {candidates}"
        )
    least = LONGER * max(settings.steps, 1)
    if long_steps < least:
        raise UsageError(
            f"--long-steps must be at least {least}, {LONGER} times the {max(settings.steps, 1)} of the proxy"
            f" {settings.proxy}, got {long_steps}"
        )
    predictor = load_predictor(find_target(device).slug)
    long = replace(
        settings,
        proxy="distill",
        steps=long_steps,
        shared_steps=0,
        lr=LONG_LR,
        lr_rule="fixed",
        held_rows=ProxySettings.held_rows,
        seeds=SEEDS[:1],
        text_weight=settings.text_weight or ProxySettings.text_weight,
        data_seed=settings.data_seed + 1,
    )
    _ = Bench(teacher, long).digest  # no such teacher is said now
    pricer, pool = Pricer(space), pool_of(space, seed)
    if progress is not None:
        pricer.prepare(lambda done, total: progress("price", done, total, "blocks traced"))
    latency = predictor.predict(pricer.rows(pool).features)[0]
    chosen = spread_out(space, candidates, seed, latency, pool)
    if len(chosen) < candidates:
        raise UsageError(
            f"space {space.name} gave only {len(chosen)} different candidates of the {candidates} asked for"
        )
    prices = pricer.rows(np.array([each.row for each in chosen]))
    return FidelityTest(
        space=space,
        teacher=teacher,
        settings=settings,
        long=long,
        device=find_target(device).slug,
        candidates=chosen,
        costs={"parameters": prices.params.astype(float), "MACs": prices.macs.astype(float)},
        latency_ms=predictor.predict(prices.features)[0],
    )


def run_test(test: FidelityTest, out: Path, jobs: int, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Scores and trains what is missing, and writes the card.

    Args:
        test: of `plan_test`.
        out: folder of the tables and the card; reports/proxy below the working directory is where searches look.
        jobs: processes, one thread each; 1 stays in this one.
        progress: told the stage, what is done of how much, and the last row.

    Returns:
        The card's path and content.

    Raises:
        NasError: a worker died, the folder cannot be written, or too few candidates could be trained long.
    """
    began = time.process_time()
    quality.prepare(test.space, test.teacher, test.settings, lambda d, n: progress("prepare", d, n, "what is shared"))
    shared = round(time.process_time() - began, 1)
    scores = Table(
        out / f"scores-{test.space.name}.csv", _digest(Bench(test.teacher, test.settings)), ("space_hash", "key")
    )
    place = {"space_hash": test.space.hash}
    missing: list[Job] = [
        ((each, test.teacher, test.settings), {**place, "key": each.key, "shared_s": shared})
        for each in test.candidates
        if (test.space.hash, each.key) not in scores
    ]
    _fill(scores, score_row, missing, jobs, "score", progress)
    progress("prepare", 0, 1, "the teacher's answers for the long runs")
    test.bench.prepare(lambda done, total: progress("prepare", done, total, "the teacher's answers for the long runs"))
    truth = Table(
        out / f"truth-{test.space.name}.csv", _digest(test.bench, test.samples), ("space_hash", "key", "seed")
    )
    missing = [
        ((each, test.bench, seed, test.samples), {**place, "key": each.key, "seed": seed, "choices": _choices(each)})
        for each, seed in test.runs
        if (test.space.hash, each.key, seed) not in truth
    ]
    _fill(truth, _long_row, missing, jobs, "train", progress)
    made = card_of(test, scores, truth)
    digest = short_hash(json.dumps([scores.digest, truth.digest, test.space.hash]))[:8]
    path = out / f"card-{test.space.name}-{test.settings.proxy}-{digest}.json"
    return atomic_write(path, json.dumps(made, indent=1) + "\n"), made


def card_of(test: FidelityTest, scores: Table, truth: Table) -> dict[str, Any]:
    """The card of two full tables.

    Raises:
        NasError: fewer than eight candidates could be trained long.
    """
    found = {key: row for (_, key), row in scores.rows.items()}
    runs: dict[str, list[dict[str, Any]]] = {}
    for (_, key, _), row in sorted(truth.rows.items(), key=lambda each: int(each[0][2])):
        if not row.get("failed"):
            runs.setdefault(key, []).append(row)
    kept = [i for i, each in enumerate(test.candidates) if each.key in runs]
    if len(kept) < FEWEST:
        reasons = sorted({str(row["failed"]) for row in truth if row.get("failed")})
        raise NasError(
            f"only {len(kept)} of {len(test.candidates)} candidates could be trained long, and {FEWEST} are needed:"
            f" {'; '.join(reasons[:2])}"
        )
    keys, latency = [test.candidates[i].key for i in kept], test.latency_ms[kept]

    def column(name: str) -> np.ndarray:
        return np.array([math.nan if (v := value_of(found[key], name)) is None else v for key in keys])

    def truth_of(name: str) -> Truth:
        return Truth(runs=tuple(tuple(float(r[name]) for r in runs[key]) for key in keys), latency_ms=latency)

    texts, shared = column("text"), max(float(found[key]["shared_s"]) for key in keys)
    compared = Compared(
        space=test.space.name,
        settings=test.settings,
        long_steps=test.long.steps,
        quality=truth_of("quality_db"),
        text=truth_of("text_db"),
        scores=column("value"),
        texts=None if np.isnan(texts).all() else texts,
        costs={name: values[kept] for name, values in test.costs.items()},
        seconds=float(column("cpu_s").mean()) + shared / len(keys),
    )
    return card(
        compared,
        quality.teacher_hash(test.teacher),
        plateau=_plateau(compared.quality, [runs[key][0] for key in keys]),
        not_trained=len(test.candidates) - len(keys),
        device=test.device,
        teacher=test.teacher,
    )


def _plateau(truth: Truth, rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Whether longer runs would change the truth: what the second half of the first runs gained and reordered."""
    curves = [json.loads(row["curve"]) for row in rows]
    if any(len(curve) < 2 for curve in curves):
        return {"second_half_gain_db": None, "kendall_half_way": None}
    half, end = (np.array([curve[place][3] for curve in curves]) for place in (-2, -1))
    last = replace(truth, runs=tuple((value,) for value in end.tolist()))
    return {
        "second_half_gain_db": rounded(float(np.median(end - half))),
        "kendall_half_way": rounded(tau(half, last).value),
    }


def _long_row(candidate: Candidate, bench: Bench, seed: int, samples: Samples) -> dict[str, Any]:
    try:
        return {**long_run(candidate, bench, seed, samples), "failed": ""}
    except NasError as error:
        return {"failed": error.message}


def _fill(
    table: Table, work: Callable[..., dict[str, Any]], jobs: list[Job], processes: int, stage: str, progress: Progress
) -> None:
    """Adds a row for each job as it is finished."""
    if not jobs:
        return
    progress(stage, 0, len(jobs), "")
    for done, (row, known) in enumerate(_rows(work, jobs, processes), 1):
        table.add({**known, **row})
        value = row.get("value", row.get("quality_db"))
        progress(stage, done, len(jobs), f"{known['key']}: {row['failed'] or f'{value:.3f}'}")


def _rows(
    work: Callable[..., dict[str, Any]], jobs: list[Job], processes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if processes == 1:
        for arguments, known in jobs:
            yield work(*arguments), known
        return
    with workers(processes) as pool, _ended():
        waiting = {pool.submit(work, *arguments): known for arguments, known in jobs}
        try:
            for job in as_completed(waiting):
                yield job.result(), waiting[job]
        except BrokenProcessPool as error:
            raise NasError(
                "a worker process died (out of memory?)", hint="the same command resumes; --jobs 1 needs less memory"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ended() -> Iterator[None]:
    """Ends the workers that were started inside where the block is left early: a long run is not waited for."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise


def _choices(candidate: Candidate) -> str:
    return json.dumps(candidate.choices, sort_keys=True)


def _digest(bench: Bench, samples: Samples | None = None) -> str:
    return short_hash(settings_key(bench, samples))
