"""`nas fidelity`: does the short score rank candidates as long training does, on this space and this teacher?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, closing, command_line, note, result, result_json, resumable, table

if TYPE_CHECKING:
    from nas.fidelity.test import FidelityTest

FOUND = Path("reports") / "proxy"  # where searches look for cards


def fidelity(
    space: Annotated[str, typer.Option(help="A space's name (nas spaces), or the path of its TOML file.")],
    teacher: Annotated[str, typer.Option(help="'embedded', or the teacher that you search with.")] = "embedded",
    candidates: Annotated[int, typer.Option(help="How many candidates to train long; at least 8.")] = 24,
    long_steps: Annotated[int, typer.Option(help="Steps of a long run; at least 10 times the proxy's.")] = 240,
    proxy: Annotated[str | None, typer.Option(help="The score to test (default: what nas search uses).")] = None,
    device: Annotated[str, typer.Option(help="Whose latencies say which candidates compete.")] = "iphone",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of candidates.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the tables and the card; searches look in the default.")] = FOUND,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
) -> None:
    """Test a score: train candidates long and see whether it ranks them so. The same command resumes a test."""
    from nas.fidelity.test import plan_test, run_test
    from nas.paths import writable_dir

    with resumable(command_line()), Progress("fidelity") as progress:
        test = plan_test(
            space,
            teacher,
            candidates=candidates,
            long_steps=long_steps,
            proxy=proxy,
            device=device,
            seed=seed,
            progress=progress,
        )
        if not dry_run:
            path, card = run_test(test, writable_dir(out), jobs, progress)
    if dry_run:
        _print_preview(test, as_json)
        return
    if as_json:
        result_json({"card": path, **card})
    else:
        for line in card_lines(card):
            result(line)
    if out.resolve() != FOUND.resolve():
        note(f"nas search looks for cards in {FOUND}/ only: run it where {path.name} lies there")
    closing(wrote=path, following=_following(card, space, teacher, proxy, candidates, long_steps), as_json=as_json)


def card_lines(card: Mapping[str, Any]) -> list[str]:
    """A card in plain words: a table of who ranks how well, then what that means."""
    from nas.fidelity.card import interval_words, right_order

    def row(of: str, line: Mapping[str, Any]) -> tuple[str, ...]:
        shares = (right_order(line["kendall"]), interval_words(line, "kendall"))
        band = (right_order(line["within_band"]), interval_words(line, "within_band"))
        return (f"{of}: {line['predictor']}", *shares, *band)

    header = ("what ranks", "pairs right", "tau", f"right within {card['band']:.0%} of latency", "tau within")
    rows = [row("quality", line) for line in card["agreement"]] + [row("text", line) for line in card["text_agreement"]]
    return [
        table(header, rows, right=(1, 3)),
        f"tau: Kendall's rank correlation, 1 all pairs right, 0 chance, with {card['confidence']:.0%} intervals",
        card["note"],
        card["text_note"],
        *_limits(card),
        f"verdict: {card['verdict']}; {card['seconds_per_candidate']:.1f} s of one thread per candidate",
    ]


def _limits(card: Mapping[str, Any]) -> list[str]:
    """What the truth itself leaves open."""
    found, plateau = card["reliability"], card.get("plateau") or {}
    lines = []
    if found["seed_sd"] is not None:
        lines.append(
            f"Long runs of one candidate differ by {found['seed_sd']:.2f} dB between seeds, candidates by"
            f" {found['between_candidates_sd']:.2f} dB: {found['tied_pairs']:.0%} of all pairs are ties, and no"
            f" score could reach a tau above about {found['highest_kendall']:.2f}."
        )
    if plateau.get("second_half_gain_db") is not None and plateau["kendall_half_way"] is not None:
        lines.append(
            f"The second half of the long runs still gained {plateau['second_half_gain_db']:.2f} dB; the ranking"
            f" half-way agrees with the last with tau {plateau['kendall_half_way']:.2f}."
        )
    if card["not_scored"]:
        lines.append(f"candidates without a score, which count as the worst: {card['not_scored']}")
    if card.get("not_trained"):
        lines.append(f"candidates that could not be trained long and are left out: {card['not_trained']}")
    return lines


def _following(
    card: Mapping[str, Any], space: str, teacher: str, proxy: str | None, candidates: int, long_steps: int
) -> str:
    """The next command: a search where the score may be used at all, else a test that could say more."""
    from nas.fidelity.card import UNPROVEN

    if card["verdict"] != UNPROVEN:
        words = ["nas", "search", "--space", space, "--teacher", teacher]
        chosen = [] if proxy is None else ["--proxy", proxy]
        return f"{shlex.join([*words, *chosen])} --budget TIME@DEVICE"
    words = ["nas", "fidelity", "--space", space, "--teacher", teacher, "--candidates", str(2 * candidates)]
    return f"{shlex.join([*words, '--long-steps', str(long_steps)])} --proxy ANOTHER"


def _print_preview(test: FidelityTest, as_json: bool) -> None:
    steps, low, high = test.settings.steps, float(test.latency_ms.min()), float(test.latency_ms.max())
    facts = {
        "space": test.space.name,
        "teacher": test.teacher,
        "proxy": test.settings.proxy,
        "proxy_steps": steps,
        "candidates": len(test.candidates),
        "latency_ms": [low, high],
        "device": test.device,
        "long_runs": len(test.runs),
        "long_steps": test.long.steps,
    }
    if as_json:
        result_json(facts)
        return
    span = f"{low:.0f} to {high:.0f} ms on {test.device}"
    result(f"space       {test.space.name}, {len(test.candidates)} candidates from {span}")
    result(f"score       {test.settings.proxy}, {steps} steps x {len(test.settings.seeds)} seeds")
    result(f"long runs   {len(test.runs)} of {test.long.steps} steps: each candidate once, every third twice")
    closing(following=command_line(leave_out=("--dry-run",)))
