"""The command line: one verb per stage. This package is the only place that prints."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from nas import __version__
from nas.cli import browse, cache, cost, export, fidelity, inherit, profiles, sampling, search, training, worker
from nas.cli.console import StoppedError, note, show_log
from nas.errors import NasError

app = typer.Typer(
    name="nas",
    help="Finds text-to-image denoisers that are as good as possible within a latency budget on a named device.",
    epilog="Start with: nas search --space snapgen_unet --budget 1.4s@iphone",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nas {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Finds text-to-image denoisers that are as good as possible within a latency budget on a named device."""


app.add_typer(browse.spaces, name="spaces")
app.add_typer(browse.devices, name="devices")
for verb in (
    search.search,
    worker.worker,
    search.report,
    fidelity.fidelity,
    profiles.profile,
    cost.measure,
    inherit.inherit,
    cache.cache,
    training.train,
    sampling.sample,
    sampling.evaluate,
    export.export,
):
    app.command()(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: what stands after `nas`; the process's own when None.

    Returns:
        The exit code: 0 done, 1 it cannot be done, 2 it was asked for wrongly, 130 stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    said = False
    show_log("nas.tvm")
    show_log("nas.targets")
    try:
        code = app(args=given, prog_name="nas", standalone_mode=False)
        sys.stdout.flush()
    except tuple(kind for kind, _ in _SENTENCES) as error:
        if debug:
            traceback.print_exc()
        sentence, hint, code = next(say for kind, say in _SENTENCES if isinstance(error, kind))(error)
        said = True
        if sentence:
            note(sentence)
        if hint:
            note(f"try: {hint}")
    if code == _STOPPED and not said:
        note("stopped")
    return code if isinstance(code, int) else 0


_STOPPED = 130  # what a shell calls a program ended by Ctrl-C; typer returns it for one that no command handles

# What is said: the sentence, the hint and the exit code of each kind of failure. Anything else is a defect of ours and
# keeps its traceback.
Said = tuple[str, str | None, int]


def _ours(error: BaseException) -> Said:
    assert isinstance(error, NasError)
    return f"nas: {error.message}", error.hint, error.exit_code


def _usage(error: BaseException) -> Said:
    assert isinstance(error, TyperException)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "nas"
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message(), None, 0
    sentence = error.format_message().rstrip(".")
    return f"nas: {sentence[:1].lower()}{sentence[1:]}", f"{path} --help", 2


def _stopped(error: BaseException) -> Said:
    assert isinstance(error, StoppedError)
    return f"stopped; go on with: {error.command}", None, _STOPPED


def _system(error: BaseException) -> Said:
    assert isinstance(error, OSError)
    if isinstance(error, BrokenPipeError):
        # The reader went away (`nas spaces | head`): nothing to say, and nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", None, 0
    hint = "choose another folder with --out" if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC) else None
    place = f"{error.filename}: " if error.filename else ""
    return f"nas: {place}{error.strerror or error}", hint, 1


def _package(error: BaseException) -> Said:
    assert isinstance(error, ModuleNotFoundError)
    return f"nas: the package {error.name} is not installed", "pip install -c constraints.txt -e .", 1


def _memory(error: BaseException) -> Said:
    return "nas: out of memory", "use a lower --resolution or fewer --jobs", 1


_SENTENCES: tuple[tuple[type[BaseException], Callable[[BaseException], Said]], ...] = (
    (NasError, _ours),
    (TyperException, _usage),
    (StoppedError, _stopped),
    (ModuleNotFoundError, _package),
    (MemoryError, _memory),
    (OSError, _system),
)
