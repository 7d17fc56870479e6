"""Which cheap score predicts a long training? Every proxy on the truth of benchmarks/proxy_truth.py.

    python benchmarks/proxy_table.py [--jobs 2] [--variant NAME ...] [--space NAME ...] [--planned] [--only-report]

Scores every candidate of reports/proxy/truth.csv with every variant of every proxy (a row per score goes to
reports/proxy/scores.csv as soon as it is there; killed, the command goes on where it was), then compares scores with
truth: reports/proxy/table.json, table.html and a card per variant and space that `nas search` shows to whoever uses
those settings. With everything scored it takes seconds. Prints the table last.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _proxy_page
import _proxy_report as report
import proxy_truth

from nas import quality
from nas.bench import Bench, ProxySettings
from nas.errors import UsageError, unknown
from nas.fidelity import Table, most_frequent, score_row, settings_key
from nas.fidelity.card import interval_words
from nas.network import short_hash
from nas.paths import atomic_write
from nas.proxies import settings_of
from nas.space import Candidate, load_space

OUT = proxy_truth.OUT
TEACHER = proxy_truth.TEACHER
KEYS = ("variant", "settings", "space", "space_hash", "key")
# The truth's learning rate and batch, so that a variant differs from it in what its name says.
RECIPE: Mapping[str, Any] = {"batch": 16, "lr": 6e-3, "text_weight": 2.0}
# name: (proxy, what differs from RECIPE); of those that are not trained on it, from the proxy's own defaults.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "distill-6": ("distill", {**RECIPE, "steps": 6}),
    "distill-12": ("distill", {**RECIPE, "steps": 12}),
    "distill-24": ("distill", {**RECIPE, "steps": 24}),
    "distill-12-2seeds": ("distill", {**RECIPE, "steps": 12, "seeds": (0, 1)}),
    "distill-12-lr-by-width": ("distill", {**RECIPE, "steps": 12, "lr_rule": "width"}),
    "distill-12-half-lr": ("distill", {**RECIPE, "steps": 12, "lr": 3e-3}),
    "distill-24-no-text": ("distill", {**RECIPE, "steps": 24, "text_weight": 0.0}),
    "supernet-0": ("supernet", {"steps": 0}),
    "supernet-6": ("supernet", {"steps": 6}),
    "inherit": ("inherit", {}),
    "blockwise": ("blockwise", {}),
    "synflow": ("synflow", {}),
    "naswot": ("naswot", {}),
    "grad_norm": ("grad_norm", {}),
}  # The regression has no runs of its own: _proxy_report.cross_fitted


def settings_for(variant: str) -> ProxySettings:
    """A variant's settings.

    Raises:
        UsageError: no such variant, or no such proxy.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    proxy, given = VARIANTS[variant]
    return settings_of(proxy, **given)


def settings_digest(settings: ProxySettings) -> str:
    """What decides a score besides the candidate: the teacher and every setting."""
    return short_hash(settings_key(Bench(TEACHER, settings)))


@dataclass(frozen=True, kw_only=True)
class TruthTable:
    """The rows of one truth table, all of equal settings."""

    rows: list[dict[str, str]]

    @property
    def candidates(self) -> list[Candidate]:
        """Each candidate once, in the table's order.

        Raises:
            UsageError: the table is of another version of a space.
        """
        found: dict[tuple[str, str], Candidate] = {}
        for row in self.rows:
            if (row["space"], row["key"]) in found:
                continue
            space = load_space(row["space"])
            candidate = space.candidate(**json.loads(row["choices"]))
            if (space.hash, candidate.key) != (row["space_hash"], row["key"]):
                raise UsageError(
                    f"the truth has {row['space']} {row['key']} of version {row['space_hash']}, and the space is now of"
                    f" version {space.hash}",
                    hint="python benchmarks/proxy_truth.py",
                )
            found[row["space"], row["key"]] = candidate
        return list(found.values())


def read_truth(path: Path, say: Callable[[str], None]) -> TruthTable:
    """The rows of each space's most frequent settings.

    Raises:
        UsageError: there is no table.
    """
    if not path.is_file():
        raise UsageError(f"there is no truth table {path}", hint="python benchmarks/proxy_truth.py")
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    kept = most_frequent(rows)
    if len(kept) < len(rows):
        rest = len(rows) - len(kept)
        say(f"{path}: {len(kept)} rows of each space's most frequent settings are used, {rest} of others are not")
    return TruthTable(rows=kept)


def tables(out: Path) -> tuple[Table, Table]:
    """The scores, and the seconds of what candidates share."""
    return (
        Table(out / "scores.csv", TEACHER, KEYS),
        Table(out / "shared.csv", TEACHER, ("variant", "settings", "space", "space_hash")),
    )


def score_missing(
    candidates: Iterable[Candidate], variants: Iterable[str], out: Path, jobs: int, say: Callable[[str], None]
) -> None:
    """Scores what has no row yet, variant by variant."""
    candidates = list(candidates)
    scores, shared = tables(out)
    for variant in variants:
        settings = settings_for(variant)
        digest = settings_digest(settings)
        missing = [
            (each, (variant, digest, each.space.name, each.space.hash, each.key))
            for each in candidates
            if (variant, digest, each.space.name, each.space.hash, each.key) not in scores
        ]
        for space in {each.space.name: each.space for each, _ in missing}.values():
            Bench(TEACHER, settings).prepare()  # the teacher's answers, which every proxy reads
            began = time.process_time()
            quality.prepare(space, TEACHER, settings)
            seconds = time.process_time() - began
            place = (variant, digest, space.name, space.hash)
            if place not in shared:  # a later time is that of finding it in the cache
                named = dict(zip(shared.keys, place, strict=True))
                shared.add({**named, "shared_cpu_s": round(seconds, 1)})
        if not missing:
            continue
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(score_row, each, TEACHER, settings): place for each, place in missing}
            for done, job in enumerate(as_completed(waiting), 1):
                row = job.result()
                scores.add({**dict(zip(KEYS, waiting[job], strict=True)), **row})
                what = row["failed"] or f"{row['value']:.3f}"
                say(f"{variant} {done}/{len(missing)} {' '.join(waiting[job][2::2])}: {what}, {row['cpu_s']:.1f} CPU s")


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Scores what is missing and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, default=OUT / "truth.csv")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the tables, the page and the cards")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--space", action="append", choices=sorted(proxy_truth.PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--planned", action="store_true", help="score candidates whose truth is still to come, too")
    parser.add_argument("--only-report", action="store_true", help="score nothing")
    arguments = parser.parse_args(argv)
    truth = read_truth(arguments.truth, say)
    spaces = arguments.space or list(proxy_truth.PARTS)
    if not arguments.only_report:
        candidates = truth.candidates
        if arguments.planned:
            candidates += [entry.candidate for entry, _ in proxy_truth.wanted(spaces)]
        once = {(each.space.name, each.key): each for each in candidates if each.space.name in spaces}
        score_missing(once.values(), arguments.variant or VARIANTS, arguments.out, arguments.jobs, say)
    known = report.Known.of(row for row in truth.rows if row["space"] in spaces)
    variants = scored(arguments.out, known)
    candidates = [each for each in truth.candidates if each.space.name in spaces]
    variants += [*report.cross_fitted(known, candidates, variants, TEACHER), *report.costs(known)]
    found = report.build(known, variants)
    atomic_write(arguments.out / "table.json", json.dumps(found, indent=1) + "\n")
    _proxy_page.write_table_page(arguments.out / "table.html", found)
    report.write_cards(known, variants, arguments.out, TEACHER)
    print_table(found, say)
    return 0


def scored(out: Path, known: report.Known) -> list[report.Scored]:
    """Every variant that has scores, with what else its runs can be read for."""
    scores, shared = tables(out)
    found = []
    for variant in [name for name in VARIANTS if any(row["variant"] == name for row in scores)]:
        settings = settings_for(variant)
        digest = settings_digest(settings)
        rows = [r for r in scores if (r["variant"], r["settings"]) == (variant, digest)]
        rows = [r for r in rows if (r["space"], r["key"]) in known.rows]
        seconds = {
            r["space"]: float(r["shared_cpu_s"]) for r in shared if (r["variant"], r["settings"]) == (variant, digest)
        }
        if rows:
            own = report.from_rows(variant, settings, rows, seconds)
            found += [own, *report.readings(own, rows, known.steps)]
    return found


def print_table(found: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The rows by tau within bands, in words a terminal holds."""
    for (group, target), rows in groupby(found["rows"], key=lambda row: (row["group"], row["target"])):
        say(f"\n{group}, {target}: tau within latency bands, tau, Spearman, top 5 regret, seconds; * on the front")
        for row in sorted(rows, key=lambda each: -(each["within_band"] if each["within_band"] is not None else -2)):
            band, whole = (interval_words(row, name) for name in ("within_band", "kendall"))
            rho = "    –" if row["spearman"] is None else f"{row['spearman']:5.2f}"
            say(
                f"{'*' if row['pareto'] else ' '} {row['variant']:<45} {band:<22} {whole:<22}"
                f" {rho} {row['top5_regret']:6.3f} {row['seconds']:7.1f} n={row['candidates']}"
            )
    for group, facts in found["choosing"].items():
        say(
            f"{group}: the best of {facts['variants']} affordable variants has {facts['within_band_where_chosen']:.2f}"
            f" within bands where it is chosen, {facts['within_band_elsewhere']:.2f} on other candidates"
        )
    say(found["note"])


if __name__ == "__main__":
    sys.exit(main())
