"""`nas search` and `nas report`: from a space and a budget to a page to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, cell, closing, command_line, duration, note, result, result_json, resumable, table
from nas.cli.names import Decoder, Guidance, Steps, TextEncoders, name_list
from nas.paths import find_study

if TYPE_CHECKING:
    from nas.search import SearchResult

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def search(
    space: Annotated[str, typer.Option(help="A space's name (nas spaces), or the path of its TOML file.")],
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="TIME@DEVICE",
            help="1.4s@iphone for one image, 274ms/step@iphone per call. May be given again for other"
            " devices; all must be met, and the first one's latency is the front's axis.",
        ),
    ],
    max_params: Annotated[str | None, typer.Option(metavar="N", help="Most parameters of the network: 400M.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most memory of weights and activations: 1.2GB.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most bytes of weights on disk, at the target's precision: 800MB."),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="How many candidates to spend a proxy run on; 0 re-prices kept scores alone.")
    ] = 60,
    sampler: Annotated[str, typer.Option(help="What proposes candidates: front, gp, tpe, nsga2 or random.")] = "front",
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    jobs: Annotated[int, typer.Option(help="Proxy runs side by side, one thread each.")] = 2,
    confidence: Annotated[float, typer.Option(help="How sure each latency must be to lie within its budget.")] = 0.8,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    decoder: Decoder = None,
    text_encoders: TextEncoders = None,
    teacher: Annotated[str, typer.Option(help="'embedded', a diffusers folder, or a hub id.")] = "embedded",
    proxy: Annotated[
        str | None, typer.Option(help="What scores candidates (nas/proxies/); default: the tested one.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="End proxy runs that cannot reach the front at their latency.")
    ] = True,
    prune_confidence: Annotated[float, typer.Option(help="How sure of that it must be.")] = 0.95,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder that nas cache wrote: candidates are then tried at full size on its latents."),
    ] = None,
    train_on: Annotated[str, typer.Option(help="Where candidates are trained: cpu, cuda or cuda:N.")] = "cpu",
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", help="Take scores that earlier studies paid for, and keep those of this one."
        ),
    ] = True,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="postgresql://, sqlite:/// or grpc:// instead of a journal in the folder."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run the proxies on this Ray cluster ('auto': this machine's)."),
    ] = None,
    cpus_per_proxy: Annotated[float, typer.Option(help="CPUs of a proxy run on Ray.")] = 1.0,
    gpus_per_proxy: Annotated[float, typer.Option(help="GPUs of a proxy run on Ray; may be a part of one.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Study folder (default reports/DATE-SPACE-DEVICE).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming the same search.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, price the space, run no proxy.")
    ] = False,
    remeasure: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Then measure N finalists on the device, or write a kit to do so."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a space within latency budgets. Writes a study and its page; the same command resumes a search.

    With --out FOLDER of a study that is there, budgets, limits and trials may change: it goes on under the new ones.
    """
    from nas.evaluate import Limits
    from nas.proxies import settings_of
    from nas.quality import ProxySettings, on_latents
    from nas.search import SearchSettings, plan_search, preview, run_search

    chosen = None if proxy is None else settings_of(proxy)
    if data is not None:
        chosen = on_latents(chosen or ProxySettings(), data, train_on)
    settings = SearchSettings(
        space=space,
        budgets=tuple(budget),
        limits=Limits.parse(params=max_params, memory=max_memory, size=max_size),
        trials=trials,
        sampler=sampler,
        seed=seed,
        jobs=jobs,
        confidence=confidence,
        resolution_px=resolution,
        steps=steps,
        guidance=guidance,
        decoder=decoder,
        text_encoders=name_list(text_encoders),
        teacher=teacher,
        proxy=chosen,
        prune=prune,
        prune_confidence=prune_confidence,
        train_on=train_on,
        reuse=reuse,
        storage=storage,
        ray=ray,
        cpus_per_proxy=cpus_per_proxy,
        gpus_per_proxy=gpus_per_proxy,
        out=out,
        fresh=fresh,
        command=command_line(),
    )
    if dry_run:
        with Progress("price") as progress:
            plan = plan_search(settings)
            plan.evaluator.pricer.prepare(lambda done, total: progress("price", done, total, "blocks traced"))
        _print_preview(preview(plan), as_json)
        return
    with resumable(command_line(leave_out=("--fresh",))), Progress("search") as progress:
        found = run_search(settings, progress)
        progress("report", 0, 1, "drawing the page")
        page = _build_report(found.folder)
    if not as_json:
        _print_search(found)
    again = None if remeasure is None else _remeasure(found.folder, remeasure, as_json)
    if as_json:
        result_json({**found.to_json(), **({} if remeasure is None else {"remeasured": again})})
    closing(wrote=page, following=found.record["next"], as_json=as_json)


def _remeasure(folder: Path, count: int, as_json: bool) -> dict[str, Any]:
    """Measures the finalists; a stop is taken up by measuring the study, which is finished."""
    from nas.cli.cost import fitted
    from nas.cli.remeasured import print_remeasured
    from nas.device import find_target
    from nas.remeasure import remeasure

    with resumable(f"nas measure --study {folder} --networks {count}"), Progress("remeasure") as progress:
        found = remeasure(
            folder,
            count,
            progress=lambda message, done, total: progress("measure" if total else "prepare", done, total, message),
        )
    card = fitted(find_target(found.target), untuned=True, required=False, as_json=True) if found.rows else None
    print_remeasured(found, card, as_json)
    return found.to_json()


def report(
    study: Annotated[str, typer.Argument(help="A study's folder, or its name under reports/.")], as_json: Json = False
) -> None:
    """Draw a study's page again. Reads the study's files only; nothing is measured or trained."""
    page = _build_report(find_study(study))
    if as_json:
        result_json({"study": page.parent.name, "report": page})
    closing(wrote=page, following=f"open {page} in a browser", as_json=as_json)


def _build_report(folder: Path) -> Path:
    from nas.report import build_report

    return build_report(folder)


def _print_preview(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        result_json(found)
        return
    budget, pipeline = found["budget"], found["pipeline"]
    result(f"space     {found['space']}, {found['space_size']:,} distinct candidates")
    result(f"target    {found['target']}")
    for each in found["budgets"]:
        result(f"budget    {each['text']}, which leaves {each['step_budget_ms']:.0f} ms for one denoiser call")
    if not budget["per_step"]:
        _print_parts(pipeline)
    result(f"feasible  {found['feasible_share']:.1%} of the space at confidence {budget['confidence']:g}")
    _print_rejected(found)
    for row in found["references"]:
        fits = "fits" if row["feasible"] else row["reason"]
        interval = f"{row['latency_low_ms']:.0f} to {row['latency_high_ms']:.0f}"
        result(f"{row['source']}  {row['latency_ms']:.0f} ms ({interval}), {fits}")
    for warning in found["warnings"]:
        note(warning)
    result(_tested(found))
    result(f"would spend {found['trials']} proxy runs, proposed by the sampler {found['sampler']}{_reusable(found)}")
    closing(following=command_line(leave_out=("--dry-run",)))


def _print_rejected(found: dict[str, Any]) -> None:
    """What each budget and limit keeps out, where there are several."""
    if len(found["rejected"]) < 2:
        return
    rows = [(name, f"{share:.1%}", f"{found['rejected_alone'][name]:.1%}") for name, share in found["rejected"].items()]
    result(table(("constraint", "rejects of the space", "no other does"), rows))


def _reusable(found: dict[str, Any]) -> str:
    """How many scores are kept from earlier studies."""
    reuse = found["reuse"]
    if not reuse or not reuse["available"]:
        return ""
    return f"; {reuse['available']} kept scores are reused, {reuse['feasible']} of them within every budget and limit"


def _print_parts(pipeline: dict[str, Any]) -> None:
    """What a budget in seconds is spent on, in running order."""
    guided = "two for each step" if pipeline["guidance"] else "one for each step"
    rows = [(part["name"], "1", f"{part['ms']:.0f}", _interval(part), part["basis"]) for part in pipeline["parts"]]
    denoiser = ("denoiser", str(pipeline["calls"]), "the rest", "", f"predicted; {guided}")
    rows.insert(len(pipeline["text_encoders"]), denoiser)
    result(table(("part", "calls", "ms", "interval", "basis"), rows, right=(1, 2, 3)))
    for part in pipeline["parts"]:
        result(f"  {part['name']}: {part['source']}")


def _interval(part: dict[str, Any]) -> str:
    """The bounds of a predicted part."""
    return f"{part['low_ms']:.0f}-{part['high_ms']:.0f}" if part["low_ms"] < part["high_ms"] else ""


def _print_search(found: SearchResult) -> None:
    record = found.record
    trials, recommended = record["trials"], record["recommended"]
    for change in record["changed"]:
        note(f"the study went on under other terms: {change}")
    for warning in record["warnings"]:
        note(warning)
    result(
        f"{trials['proxied']} candidates scored in {duration(record['wall_s'])}; of the other proposals"
        f" {trials['infeasible']} were infeasible{_reasons(record)}, {trials['forbidden']} against a rule,"
        f" {trials['duplicates']} known, {trials['failed']} failed; {_out(record)}"
    )
    _print_rejected(record)
    if record["reuse"] and record["reuse"]["used"]:
        reuse = record["reuse"]
        took = duration(reuse["seconds_saved"])
        result(f"{reuse['used']} kept scores of earlier studies reused, which took {took} of proxy time")
    stopping = record["stopping"]
    if stopping["stopped"]:
        result(f"{stopping['stopped']} stopped early, {duration(stopping['saved_s'])} of proxy time saved (estimate)")
    unit = record["proxy"]["unit"]
    chosen = recommended["key"] if recommended else None
    rows = [
        (
            f"{member.key}{' *' if member.key == chosen else ''}",
            f"{member.latency_ms:.0f}",
            f"{member.latency_low_ms:.0f}-{member.latency_high_ms:.0f}",
            f"{member.meets_budget_probability:.0%}",
            _score(member.quality, unit),
            _score(member.quality_sd or 0.0, unit),
            f"{member.params / 1e6:.0f}",
            f"{member.macs / 1e9:.0f}",
            *(f"{there['latency_ms']:.0f}" for there in member.others.values()),
        )
        for member in found.front
    ]
    elsewhere = [f"ms on {budget['alias']}" for budget in record["budgets"][1:]]
    header = ("candidate", "ms", "interval", "within", f"quality {unit}", "sd", "M params", "G MACs", *elsewhere)
    result(table(header, rows))
    if not record["budget"]["per_step"]:
        _print_parts(record["pipeline"])
    for row in record["references"]:
        fidelity = "not scored" if row["quality"] is None else f"{_score(row['quality'], unit)} {unit}"
        result(f"reference {row['name']}: {row['latency_ms']:.0f} ms, {fidelity}, {row['params'] / 1e6:.0f} M params")
    if recommended:
        result(f"* recommended: {recommended['why']}")
    else:
        result("no candidate within the budget was scored")
    result(_tested(record))


def _out(record: dict[str, Any]) -> str:
    """How much of the space is left out."""
    share, confidence = record["infeasible"]["share_of_space"], record["budget"]["confidence"]
    what = "is over the budget" if len(record["rejected"]) == 1 else "breaks a budget or limit"
    return f"{share:.0%} of the space {what} at confidence {confidence:g}"


def _reasons(record: dict[str, Any]) -> str:
    """Why candidates are infeasible, where it is not the first budget alone."""
    counts = record["infeasible"]["reasons"]
    found = {cause: count for cause, count in counts.items() if count and cause != "proxy run failed"}
    if set(found) <= {f"latency bound over {record['budget']['text']}"}:
        return ""
    return f" ({', '.join(f'{count} {cause}' for cause, count in found.items())})"


def _score(value: float | None, unit: str) -> str:
    """Two decimals of dB, because a proxy's gaps are of that size; four digits of anything else."""
    return cell(None if value is None else f"{value:.2f}" if unit == "dB" else value)


def _tested(record: dict[str, Any]) -> str:
    """How well this proxy ranks, from its card, or that nobody knows."""
    name, space, card = record["proxy"]["proxy"], record["space"], record["fidelity"]
    name += f" ({record['proxy']['because']})"
    teacher = "" if record["teacher"] == "embedded" else f" --teacher {record['teacher']}"
    again = f"nas fidelity --space {record.get('space_path') or space}{teacher}"
    if card is None:
        return f"proxy {name}: never tested on {space} with this teacher, so nobody knows how well it ranks; {again}"
    if card["space"] != space:
        return f"proxy {name}: tested on {card['space']} but never on {space} ({again}): {card['note']}"
    return f"proxy {name}: {card['note']}"
