"""`nas inherit`: a network that starts from the weights of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.console import Progress, closing, result, result_json, table
from nas.cli.names import chosen
from nas.errors import NasError, unknown

if TYPE_CHECKING:
    from nas.inherit import Report

RUNS = Path("runs")


def inherit(
    teacher: Annotated[
        str,
        typer.Option(help="A diffusers folder or hub id, a folder that nas wrote, or a .safetensors file of nas."),
    ],
    subject: Annotated[str | None, typer.Argument(help="STUDY#CANDIDATE to start, instead of --space.")] = None,
    space: Annotated[str | None, typer.Option(help="A space, with --reference or --candidate.")] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    widths: Annotated[
        str, typer.Option("--inherit", help="Channels kept where it is narrower: first, or l1 (largest weights).")
    ] = "first",
    seed: Annotated[int, typer.Option(min=0, help="Of what the teacher has nothing for.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write (default runs/NAME-inherited).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Start a network from a larger one's weights. Written as a plain diffusers class where one can hold it."""
    from nas import families
    from nas.build import build
    from nas.checkpoint import NETWORK, check_folder, load, save
    from nas.inherit import WIDTHS
    from nas.inherit import inherit as start
    from nas.paths import writable_dir

    student, name = chosen(subject, space, reference, candidate, resolution)
    spec = families.network(student)
    target = out if out is not None else RUNS / f"{student.space.name}-{name}-inherited"
    writable_dir(target.parent)
    if target.suffix != ".safetensors":
        check_folder(target)
    if widths not in WIDTHS:
        raise unknown("way to choose channels", widths, WIDTHS)
    with Progress("inherit") as progress:
        progress("teacher", 0, 1, teacher)
        larger = load(teacher)
        progress("inherit", 0, 1, f"{name} from {larger.spec.name}")
        state, report = start(spec, larger.spec, larger.state_dict(), widths=widths, seed=seed)
        if not report.params("copied") and not report.params("sliced"):
            raise NasError(
                f"no tensor of {teacher} fits a block of {name}, so nothing could be inherited",
                hint="give a teacher of the same family, such as a larger network of the space",
            )
        network = build(spec, "meta")
        network.load_state_dict(state, assign=True)
        progress("write", 0, 1, str(target))
        wrote = save(target, network, {"teacher": teacher, "inherit": widths, "seed": seed})
    form = _form(wrote)
    if as_json:
        answer = {"network": name, "teacher": teacher, "path": wrote, "format": form, "seed": seed, **report.to_json()}
        result_json(answer)
    else:
        result(report_text(report))
        result(f"saved as {form}")
    own = wrote if wrote.is_file() else wrote / NETWORK
    following = f"nas profile --model {wrote}" if form != "nas" else f"nas export {own}"
    closing(wrote=wrote, following=following, as_json=as_json)


def _form(folder: Path) -> str:
    """The diffusers class that a folder holds, or "nas" for our own format."""
    from nas.formats import CONFIG, read_config

    return str(read_config(folder)[0]["_class_name"]) if (folder / CONFIG).is_file() else "nas"


def report_text(report: Report) -> str:
    """The report as a table of the network's parts, and the blocks that moved or are new."""
    kinds = ("copied", "sliced", "new")
    parts: dict[str, list[int]] = {}
    for block in report.blocks:
        path = block.name.split(".")
        part = ".".join(path[: 2 if len(path) > 2 and path[1].isdigit() else 1])
        row = parts.setdefault(part, [0] * 6)
        for i, kind in enumerate(kinds):
            row[i] += block.tensors[kind]
            row[3 + i] += block.params[kind]
    total = [sum(row[i] for row in parts.values()) for i in range(6)]
    header = ("part", *(f"{kind} tensors" for kind in kinds), *(f"{kind} parameters" for kind in kinds))
    lines = [table(header, [(part, *row) for part, row in parts.items()] + [("whole", *total)])]
    share = 1 - total[5] / sum(total[3:])
    lines.append(f"{share:.1%} of the parameters come from the teacher")
    if report.moved_blocks:
        lines.append("from another place:")
        lines += [f"  {to} from {source}" for to, source in report.moved_blocks]
    if report.new_blocks:
        lines.append(f"new: {', '.join(report.new_blocks)}")
    return "\n".join(lines)
