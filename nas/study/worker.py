"""One proxy run in a worker process."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from nas import quality
from nas.bench import ProxySettings, Stop, is_out_of_memory
from nas.errors import OUT_OF_MEMORY, UntrainableError
from nas.proxies import Score
from nas.space import Candidate


def scored(
    candidate: Candidate, teacher: str, settings: ProxySettings, stop: Stop | None, device: str = "cpu"
) -> Score:
    """`nas.quality.score`, with lack of memory outside training as what it is; in training the bench says it.

    Raises:
        UntrainableError: training diverged, or memory ran out.
        Stopped: `stop` gave a reason.
        NasError: the candidate cannot be scored for another reason.
    """
    try:
        return quality.score(candidate, teacher, settings, stop, device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the frames that held the tensors are gone.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise UntrainableError(
        f"{OUT_OF_MEMORY} on {device} while the candidate was built or judged, whatever the batch", OUT_OF_MEMORY
    )


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
