"""What ending proxy runs early saves, at which loss of front: searches replayed over candidates that were all scored.

    python benchmarks/prune_saving.py [--pool 150] [--trials 60] [--seeds 5] [--jobs 2] [--proxy distill]

First every candidate of a pool is scored once, to its end, with its learning curve (a row each goes to
reports/proxy/curves.csv as soon as it is there; killed, the command goes on where it was). The pool is the starting
references and feasible candidates from equally full bands of latency. Then, for each seed, the real search loop of
nas/study runs over that pool with and without pruning, a worker's answer being read from the table: in two orders, the
same random one for both (equal proposals: the saving of the rule alone), and the sampler's own, each proposal being
replaced by the nearest member of the pool that was not tried yet (what is stopped then changes what comes next).

Seconds are CPU seconds of a whole run, and of a stopped one the part that it had trained for. Writes
reports/proxy/prune_saving.json; prints the figure last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nas.bench import Bench, Point, Stopped
from nas.errors import NasError
from nas.evaluate import Evaluation, Evaluator
from nas.evaluate.pool import within
from nas.fidelity import Table, pool_of, score_row, settings_key, spread_out
from nas.network import short_hash
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.proxies import Score, settings_of
from nas.record import Trial, front, hypervolumes
from nas.search import SearchSettings, plan_search
from nas.space import Candidate
from nas.stopping import Rule
from nas.study import Plan, Study
from nas.study.facts import Row, Snapshot
from nas.study.presence import Place
from nas.study.propose import Proposer

OUT = Path(__file__).resolve().parent.parent / "reports" / "proxy"
KEYS = ("space", "space_hash", "key")
ORDERS = ("random", "sampler")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A member of the pool as the table has it."""

    candidate: Candidate
    value: float
    text: float | None
    cpu_s: float
    curve: tuple[Point, ...]
    wall_s: float

    def spent_s(self, step: int) -> float:
        """CPU seconds of a run that ends at a step: of the whole run's, the share of its training time."""
        return self.cpu_s * next(point.seconds for point in self.curve if point.step == step) / self.wall_s


def pool_for(evaluator: Evaluator, size: int, seed: int = 0) -> list[Candidate]:
    """The references and feasible candidates of all latencies."""
    rows = pool_of(evaluator.space, seed)
    prices = evaluator.pricer.rows(rows)
    fits = within(evaluator.constraints, prices)
    latency = evaluator.predictor.predict(prices.features)[0]
    return spread_out(evaluator.space, size, seed, latency[fits], rows[fits])


def scored(plan: Plan, candidates: Sequence[Candidate], path: Path, jobs: int, say: Callable[[str], None]) -> Table:
    """The table of the pool, with what was missing."""
    bench = Bench(plan.teacher, plan.proxy)
    space = plan.evaluator.space
    table = Table(path, short_hash(settings_key(bench)), KEYS)
    missing = [each for each in candidates if (space.name, space.hash, each.key) not in table]
    bench.prepare()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers:
        futures = {workers.submit(score_row, each, plan.teacher, plan.proxy): each for each in missing}
        for future in as_completed(futures):
            candidate = futures[future]
            row = future.result()
            table.add(
                {
                    "space": space.name,
                    "space_hash": space.hash,
                    "key": candidate.key,
                    "choices": json.dumps(candidate.choices, sort_keys=True),
                    **row,
                }
            )
            say(f"{len(table)} scored: {candidate.key} {row['failed'] or row['value']}, {row['cpu_s']:.1f} CPU s")
    return table


def read(candidate: Candidate, row: Mapping[str, Any]) -> Scored:
    """A row as numbers."""
    return Scored(
        candidate=candidate,
        value=float(row["value"]),
        text=float(row["text"]) if row["text"] not in ("", None) else None,
        cpu_s=float(row["cpu_s"]),
        curve=tuple(Point(step=step, seconds=s, train_db=db) for step, s, db in json.loads(row["curve"])),
        wall_s=float(row["seconds"]),
    )


@dataclass
class Replay(Executor):
    """Answers as a worker would have, from the table; keeps what it did."""

    rows: Mapping[str, Scored]
    spent_s: float = 0.0
    saved_s: float = 0.0
    stopped: list[tuple[Scored, float]] = field(default_factory=list)

    def submit(  # type: ignore[override]
        self, fn: Any, candidate: Candidate, teacher: str, settings: Any, stop: Rule | None, device: str
    ) -> Future[Score]:
        """The run's outcome: its score, or where the rule ends it."""
        future = Future[Score]()
        if candidate.key not in self.rows:
            future.set_exception(NasError("it has no score in the table"))
            return future
        row = self.rows[candidate.key]
        for i, point in enumerate(row.curve[:-1], 1):
            if stop is not None and (reason := stop(row.curve[:i])) is not None:
                spent = row.spent_s(point.step)
                self.spent_s, self.saved_s = self.spent_s + spent, self.saved_s + row.cpu_s - spent
                self.stopped.append((row, float(stop.goal or 0.0)))
                future.set_exception(Stopped(reason, row.curve[:i]))
                return future
        self.spent_s += row.cpu_s
        future.set_result(Score(value=row.value, text=row.text, curve=row.curve, seconds=row.cpu_s))
        return future


class PoolProposer(Proposer):
    """Chooses from a pool: in a random order, or each proposal moved to the nearest member not yet tried."""

    def __init__(self, plan: Plan, pool: Sequence[Candidate], order: str) -> None:
        super().__init__(plan.evaluator, plan.sampler, plan.seed)
        self._space, self._members, self._order = plan.evaluator.space, pool, order

    def propose(
        self, snapshot: Snapshot, price: Callable[[Row], Evaluation], place: Place, at_random: bool
    ) -> tuple[Row | None, dict[str, Any]]:
        """The next member's row; None once all were tried."""
        tried = {fact.row for fact in snapshot.facts}
        left = [each.row for each in self._members if each.row not in tried]
        if not left:
            return None, {}
        if self._order == "random":
            return left[0], {}
        asked, kept = super().propose(snapshot, price, place, at_random)
        kinds = [(choice.ordinal, len(choice.values)) for choice in self._space.choices]
        away = np.abs(np.array(left) - np.array(asked)).astype(float)
        for i, (ordinal, count) in enumerate(kinds):
            away[:, i] = away[:, i] / max(count - 1, 1) if ordinal else away[:, i] != 0
        return left[int(away.sum(axis=1).argmin())], kept


def search(plan: Plan, pool: Sequence[Candidate], rows: Mapping[str, Scored], order: str) -> dict[str, Any]:
    """One search over the pool, and what it spent and found."""
    workers = Replay(rows)
    with tempfile.TemporaryDirectory() as folder, Study(plan, Path(folder), executor=workers) as study:
        shuffled = [pool[i] for i in np.random.default_rng(plan.seed).permutation(len(pool))]
        study.proposer = PoolProposer(plan, shuffled, order)
        study.run()
        trials = study.trials()
    members = front(trials)
    finished = {each.key: each for each in members}
    missed = 0
    for row, _ in workers.stopped:
        evaluation = next(
            t.evaluation for t in trials if t.state == "stopped" and t.evaluation.key == row.candidate.key
        )
        whole = Trial(number=len(trials), state="proxied", evaluation=replace(evaluation, quality=row.value))
        missed += row.candidate.key in {each.key for each in front([*trials, whole])}
    return {
        "order": order,
        "seed": plan.seed,
        "prune": plan.prune,
        "runs": sum(t.round is not None for t in trials),
        "stopped": len(workers.stopped),
        "spent_s": round(workers.spent_s, 1),
        "saved_s": round(workers.saved_s, 1),
        "hypervolume": hypervolumes(trials, plan.evaluator.terms.budget.ms)["values"][-1],
        "front": len(finished),
        "stopped_above_their_goal": sum(row.value > goal for row, goal in workers.stopped),
        "stopped_that_would_be_on_the_front": missed,
    }


def summary(rows: Sequence[Mapping[str, Any]], order: str) -> dict[str, Any]:
    """What pruning saved and cost in one order, over the seeds."""
    pruned = [row for row in rows if row["order"] == order and row["prune"] is not None]
    whole = {row["seed"]: row for row in rows if row["order"] == order and row["prune"] is None}
    saved = [1 - row["spent_s"] / whole[row["seed"]]["spent_s"] for row in pruned]
    kept = [row["hypervolume"] / whole[row["seed"]]["hypervolume"] for row in pruned]
    return {
        "seeds": len(pruned),
        "seconds_without": round(sum(row["spent_s"] for row in whole.values()), 1),
        "seconds_with": round(sum(row["spent_s"] for row in pruned), 1),
        "share_saved": {"mean": float(np.mean(saved)), "lowest": min(saved), "highest": max(saved)},
        "hypervolume_with_over_without": {"mean": float(np.mean(kept)), "lowest": min(kept), "highest": max(kept)},
        "stopped": sum(row["stopped"] for row in pruned),
        "stopped_above_their_goal": sum(row["stopped_above_their_goal"] for row in pruned),
        "stopped_that_would_be_on_the_front": sum(row["stopped_that_would_be_on_the_front"] for row in pruned),
    }


def words(order: str, found: Mapping[str, Any], confidence: float) -> str:
    """A summary in one sentence."""
    share, kept = found["share_saved"], found["hypervolume_with_over_without"]
    return (
        f"{order} order, {found['seeds']} seeds: {share['mean']:.0%} of the proxy seconds saved"
        f" ({share['lowest']:.0%} to {share['highest']:.0%}) at {kept['mean']:.4f} of the hypervolume"
        f" ({kept['lowest']:.4f} to {kept['highest']:.4f}); of {found['stopped']} runs stopped at {confidence:.0%}"
        f" confidence {found['stopped_above_their_goal']} would have reached their goal and"
        f" {found['stopped_that_would_be_on_the_front']} the final front"
    )


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Scores what is missing, then replays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="snapgen_unet")
    parser.add_argument("--budget", default="1.4s@iphone")
    parser.add_argument("--pool", type=int, default=150)
    parser.add_argument("--trials", type=int, help="proxy runs of one search (default 0.4 of the pool)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--proxy", default="distill")
    parser.add_argument("--steps", type=int, help="of a proxy run, instead of the proxy's own")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    given = {} if arguments.steps is None else {"steps": arguments.steps}
    settings = SearchSettings(
        space=arguments.space,
        budgets=(arguments.budget,),
        trials=arguments.trials or max(1, round(0.4 * arguments.pool)),
        jobs=arguments.jobs,
        proxy=settings_of(arguments.proxy, **given),
        prune_confidence=arguments.confidence,
        sampler="tpe",
        reuse=False,
    )
    plan = plan_search(settings)
    pool = pool_for(plan.evaluator, arguments.pool)
    table = scored(plan, pool, arguments.out / "curves.csv", arguments.jobs, say)
    by_key = {row["key"]: row for row in table}
    rows = {each.key: read(each, by_key[each.key]) for each in pool if not by_key[each.key]["failed"]}
    usable = [each for each in pool if each.key in rows]
    found = [
        search(replace(plan, seed=seed, prune=prune), usable, rows, order)
        for order in ORDERS
        for seed in range(arguments.seeds)
        for prune in (plan.prune, None)
    ]
    result = {
        "space": arguments.space,
        "budget": arguments.budget,
        "pool": len(usable),
        "runs_per_search": plan.trials,
        "confidence": arguments.confidence,
        "cpu_s_per_run": float(np.mean([row.cpu_s for row in rows.values()])),
        "digest": table.digest,
        "proxy": json.loads(settings_key(Bench(plan.teacher, plan.proxy)))[1],
        "summary": {order: summary(found, order) for order in ORDERS},
        "searches": found,
        "provenance": provenance(command=" ".join(sys.argv)),
    }
    atomic_write(arguments.out / "prune_saving.json", json.dumps(result, indent=1) + "\n")
    for order in ORDERS:
        say(words(order, result["summary"][order], arguments.confidence))
    return 0


if __name__ == "__main__":
    sys.exit(main())
