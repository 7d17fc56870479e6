"""The child of `nas.exporters.tvm.tuning`: python -m nas.exporters.tvm._tuner REQUEST.json."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from nas.exporters.tvm.records import append, best

# TVM reads the tensor intrinsics of every GPU before it tunes a CPU: half a minute of parsing that this process, which
# does nothing else, does without.
_NOT_FOR_CPUS = ("cuda", "rocm", "hexagon", "metal")
# Trials that are built together and then run together.
_BATCH = 4
# Of a trial, each as long as the request says; the fastest counts.
_REPEATS = 4


@derived_object
class _Builder(ms.builder.PyBuilder):
    """Builds in this process: TVM's own builder starts a process for every few trials, which costs more than they."""

    def build(self, build_inputs: list[Any]) -> list[Any]:
        return [_built(given) for given in build_inputs]


def _built(given: Any) -> Any:
    try:
        library = ms.builder.local_builder.default_build(given.mod, given.target, None)
        return ms.builder.BuilderResult(ms.builder.local_builder.default_export(library), None)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        # A schedule that cannot be compiled is a failed trial, as in TVM's own builder.
        return ms.builder.BuilderResult(None, str(error))


def main(path: str) -> None:
    """Tunes the kernels of a request, one after the other; tells each on stdout in one line of JSON."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    request = json.loads(Path(path).read_text())
    target = tvm.target.Target(request["target"])
    if target.kind.name == "llvm":
        for name in _NOT_FOR_CPUS:
            sys.modules[f"tvm.s_tir.tensor_intrin.{name}"] = ModuleType(name)
    effort, runner = request["effort"], _runner(request)
    for done, (name, text) in enumerate(request["kernels"].items(), 1):
        kernel = tvm.ir.load_json(text)
        record = best(_tuned(name, kernel, target, runner, effort), kernel, name, effort["trials"])
        if record is not None:
            append(Path(request["records"]), record, request["machine"])
        found = "no schedule ran" if record is None else f"{record.best_ms:.4f} ms"
        sys.stdout.write(json.dumps({"done": done, "kernel": name, "best": found}) + "\n")
        sys.stdout.flush()


def _end_with(parent: int) -> None:
    """Ends this process and its workers once the process that asked for the tuning is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _runner(request: dict[str, Any]) -> Any:
    evaluator = ms.runner.EvaluatorConfig(number=1, repeat=_REPEATS, min_repeat_ms=request["effort"]["least_run_ms"])
    tracker = request["tracker"]
    if tracker is None:
        return ms.runner.LocalRunner(timeout_sec=20, evaluator_config=evaluator)
    config = ms.runner.RPCConfig(
        tracker_host=tracker["host"],
        tracker_port=tracker["port"],
        tracker_key=tracker["key"],
        session_timeout_sec=60,
    )
    return ms.runner.RPCRunner(rpc_config=config, evaluator_config=evaluator, max_workers=1)


def _tuned(name: str, kernel: Any, target: Any, runner: Any, effort: dict[str, Any]) -> Any:
    """The database of one kernel's trials."""
    quiet = logging.getLogger("nas.tvm.trials")
    quiet.propagate = False  # a line per trial; the record of a kernel is told by `tuning`
    context = ms.TuneContext(
        mod=kernel,
        target=target,
        space_generator="post-order-apply",
        search_strategy="replay-trace",
        task_name=name,
        logger=quiet,
        rand_state=effort["seed"],
        num_threads=1,
    ).clone()
    found = ms.database.MemoryDatabase()
    with tempfile.TemporaryDirectory(prefix="nas-tvm-") as work:
        ms.tune.tune_tasks(
            tasks=[context],
            task_weights=[1.0],
            work_dir=work,
            max_trials_global=effort["trials"],
            num_trials_per_iter=min(_BATCH, effort["trials"]),
            builder=_Builder(),
            runner=runner,
            database=found,
            cost_model="random",
        )
    return found


if __name__ == "__main__":
    main(sys.argv[1])
