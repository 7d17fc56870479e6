"""`nas worker`: one more machine, or one more process, for a search that runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import Progress, command_line, result, result_json, resumable


def worker(
    study: Annotated[str, typer.Argument(help="The study's name in the storage; without --storage, its folder.")],
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="postgresql://USER@HOST/DATABASE or grpc://HOST:PORT.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Proxy runs side by side, one thread each.")] = 1,
    train_on: Annotated[str, typer.Option(help="Where candidates are trained: cpu, cuda or cuda:N.")] = "cpu",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run the proxies on this Ray cluster: auto, HOST:PORT.")
    ] = None,
    cpus_per_proxy: Annotated[float, typer.Option(help="CPUs that Ray sets aside for a proxy run.")] = 1.0,
    gpus_per_proxy: Annotated[float, typer.Option(help="GPUs, or a part of one.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Join a search that another machine began, until it has its trials. May be stopped and started at any time."""
    from nas.search.joining import join_search

    if storage is None and not Path(study).is_dir() and (Path("reports") / study).is_dir():
        study = str(Path("reports") / study)
    with resumable(command_line()), Progress("worker") as progress:
        found = join_search(
            study,
            storage=storage,
            progress=progress,
            jobs=jobs,
            train_on=train_on,
            ray=ray,
            cpus_per_proxy=cpus_per_proxy,
            gpus_per_proxy=gpus_per_proxy,
        )
    if as_json:
        result_json(asdict(found))
    else:
        result(f"{found.mine} proxy runs done here; {found.study} has {found.proxied} of {found.trials}")
