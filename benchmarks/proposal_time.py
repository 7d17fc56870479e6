"""How long one proposal of a search by the sampler `front` takes, by the number of evaluations.

    python benchmarks/proposal_time.py [--repeats 5]

The candidates are those of `nas search --space snapgen_unet --budget 1.4s@iphone`: 100,000 priced ones and the
neighbours of the best. Evaluated are as many of them drawn at random as a line says, by a quality that is planted:
a random effect of every choice, and noise. Each time is the processor time of one thread from what the storage holds to
the next row, the candidates already listed, as they are for all but the first proposal of a worker. Prints the medians
last and writes reports/search/proposal_time.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import optuna
from study_scaling import evaluator

from nas.evaluate import Evaluation, Evaluator
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.proxies import Score
from nas.study.facts import Fact, Row, Snapshot
from nas.study.outcome import PROXIED, Outcome
from nas.study.presence import Place
from nas.study.propose import POOL, Proposer

OUT = Path("reports/search/proposal_time.json")
EVALUATIONS = (20, 50, 100, 200)


def main() -> None:
    """Times proposals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    prices = evaluator()
    proposer = Proposer(prices, "front", 0)
    found = {}
    for count in EVALUATIONS:
        seconds = []
        for seed in range(options.repeats):
            given, known = evaluated(prices, count, seed)
            proposer.propose(Snapshot(given[:-1]), known.__getitem__, Place(), at_random=False)
            began = time.process_time()
            proposer.propose(Snapshot(given), known.__getitem__, Place(), at_random=False)
            seconds.append(time.process_time() - began)
        found[str(count)] = {"median_s": round(float(np.median(seconds)), 3), "most_s": round(max(seconds), 3)}
        print(f"{count} evaluations: {found[str(count)]}", file=sys.stderr)
    whole = {
        "candidates": POOL,
        "repeats": options.repeats,
        "seconds_by_evaluations": found,
        "provenance": provenance(command="benchmarks/proposal_time.py", seed=0),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(OUT, json.dumps(whole, indent=1) + "\n")
    print(
        f"one proposal among {POOL:,} candidates, CPU s:",
        ", ".join(f"{each['median_s']} after {count} evaluations" for count, each in found.items()),
    )


def evaluated(prices: Evaluator, count: int, seed: int) -> tuple[list[Fact], dict[Row, Evaluation]]:
    """The references and others drawn at random, `count` in all, as a storage has them; and their prices."""
    generator = np.random.default_rng(seed)
    space, pool = prices.space, prices.problem_pool(POOL, 0)[0]
    effects = [generator.normal(size=len(choice.values)) for choice in space.choices]
    rows = {space.reference(each.name).row: f"reference:{each.name}" for each in space.starting}
    for place in generator.permutation(len(pool)):
        if len(rows) == count:
            break
        rows.setdefault(tuple(pool[place].tolist()), "search")
    facts = []
    for number, (row, source) in enumerate(rows.items()):
        value = sum(effect[index] for effect, index in zip(effects, row, strict=True)) + 0.3 * generator.normal()
        told = Outcome(state=PROXIED, score=Score(value=float(value)))
        facts.append(
            Fact(number=number, trial_id=number, row=row, source=source, state=PROXIED, outcome=told, origin=number)
        )
    priced = prices.price([space.from_row(np.array(row)) for row in rows])
    return facts, dict(zip(rows, priced, strict=True))


if __name__ == "__main__":
    main()
