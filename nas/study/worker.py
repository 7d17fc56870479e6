"""One proxy run in a worker process, and what is said of a candidate that cannot be trained."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from nas import quality
from nas.bench import ProxySettings, Stop
from nas.errors import NasError
from nas.proxies import Score
from nas.space import Candidate

DIVERGED = "training diverged"
MEMORY = "out of memory"

# What torch on CPU and CUDA, cuBLAS and cuDNN, and numpy say; only the first has an exception of its own.
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "unable to allocate")
_ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
_FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", re.IGNORECASE)
_SCALE = {"bytes": 0, "kib": 1, "mib": 2, "gib": 3, "tib": 4}


class Untrainable(NasError):
    """A candidate that has no score, and not by a mistake in what was asked for: it is infeasible, `cause` says why."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.cause)


def scored(
    candidate: Candidate, teacher: str, settings: ProxySettings, stop: Stop | None, device: str = "cpu"
) -> Score:
    """`nas.quality.score`, with divergence and lack of memory as what they are.

    Raises:
        Untrainable: training diverged, or memory ran out.
        Stopped: `stop` gave a reason.
        NasError: the candidate cannot be scored for another reason.
    """
    try:
        return quality.score(candidate, teacher, settings, stop, device)
    except NasError as error:
        if not diverged(error):
            raise
        raise Untrainable(_words(error), DIVERGED) from None
    except (MemoryError, RuntimeError) as error:
        words = memory_words(error, settings.batch, _free_bytes())
        if words is None:
            raise
    # Outside the handler: the frames that held the tensors are gone.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise Untrainable(words, MEMORY)


def diverged(error: NasError) -> bool:
    """Whether an error is of a student that cannot be trained with these settings: no better than untrained, or NaN."""
    return error.message.startswith(DIVERGED) or "is not finite at step" in error.message


def _words(error: NasError) -> str:
    if error.message.startswith(DIVERGED):
        return error.message
    return f"{DIVERGED}: {error.message.partition(';')[0]}"  # what follows is of checkpoints, which a proxy has none of


def memory_words(error: BaseException, batch: int, free_bytes: float | None = None) -> str | None:
    """What to do about an error of memory, in one sentence; None where it is another error.

    The batch is halved until the request that failed would have fitted, as far as the error says what was asked for
    and what was free: activations, which are what is too large, grow with the batch.

    Args:
        error: as raised.
        batch: rows per step that were tried.
        free_bytes: where the error does not say it.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and not any(words in text.lower() for words in _NO_MEMORY):
        return None
    asked, free = _bytes(_ASKED, text), _bytes(_FREE, text)
    free = free_bytes if free is None else free
    said = "" if asked is None else f", which asked for {_size(asked)} more"
    if batch == 1:
        return f"{MEMORY} at batch 1{said}: this machine has too little for this network"
    smaller = 1 << ((batch - 1).bit_length() - 1)
    if asked is None or free is None:
        return f"{MEMORY} at batch {batch}{said}; batch {smaller}, the next smaller power of two, may fit"
    while smaller >= 1 and asked * smaller / batch > free:
        smaller //= 2
    said += f" where {_size(free)} were free"
    if smaller < 1:
        return f"{MEMORY} at batch {batch}{said}; not even batch 1 would fit"
    return f"{MEMORY} at batch {batch}{said}; batch {smaller} would fit"


def _bytes(pattern: re.Pattern[str], text: str) -> float | None:
    match = pattern.search(text)
    return None if match is None else float(match[1]) * 1024.0 ** _SCALE[match[2].lower()]


def _size(count: float) -> str:
    for unit, scale in (("GiB", 1024.0**3), ("MiB", 1024.0**2)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def _free_bytes() -> float | None:
    """Free memory of this machine; None where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def workers(jobs: int) -> Executor:
    """A pool of processes that end with this one."""
    return ProcessPoolExecutor(
        max_workers=jobs, mp_context=get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
    )


def _start(parent: int) -> None:
    """Sets a worker up: Ctrl-C is the parent's business, and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
