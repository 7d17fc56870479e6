"""How many candidates an hour the proxy scores, what the cache of teacher targets saves, and how it bears being killed.

    python benchmarks/proxy_throughput.py [--candidates 4] [--rounds 2]

Everything runs in a cache folder of its own. First the cache: a process that fills it is killed (SIGKILL) half-way and
another takes it up; two processes ask for the same rows at once; the three files must be equal, byte for byte. Then the
same candidates of snapgen_unet are scored with the proxy's settings from the cache and with the teacher asked live (at
every training step, and about the held-out rows of every candidate), by one and by two worker processes, the four in
turns. Last, whether the seeds of one candidate are trained faster together (torch.func.vmap over stacked weights) than
one after the other. Writes reports/proxy/throughput.json and prints the figures last.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nas import proxies, targets
from nas.batches import Batch
from nas.bench import Bench, Fidelity, ProxySettings, fidelity_of, one_thread
from nas.distill import answer, predict
from nas.objectives import total
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.proxies import distill
from nas.space import Candidate, load_space
from nas.targets import Fresh

OUT = Path(__file__).resolve().parent.parent / "reports" / "proxy" / "throughput.json"
TEACHER = "embedded"
SPACE = "snapgen_unet"
_SEED = 5
_WAIT_S = 0.05


# ------------------------------------------------------------------------------------------------ without the cache


class Live(Bench):
    """A bench whose teacher is asked at every step, and about every candidate's held-out rows."""

    @property
    def asked(self) -> nn.Module:
        """The teacher."""
        return self.embedded

    def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """Nothing is shared by the candidates."""

    @property
    def data(self) -> Any:
        """Drawn at every step."""
        return Fresh(lesson=self.lesson, size=self.settings.batch, seed=self.settings.data_seed, null_every=0)

    def judge(self, denoiser: Any) -> Fidelity:
        """On rows that are drawn and asked about now."""
        batch = Fresh(
            lesson=self.lesson, size=self.settings.held_rows, seed=_SEED, null_every=0, splits=("held-out", "train")
        ).batch(0)
        with torch.no_grad():
            said = answer(self.asked, batch, with_null=True)
        return fidelity_of(denoiser, _Drawn(replace(batch, teacher=said)))


@dataclass(frozen=True)
class _Drawn:
    """Held-out rows in memory."""

    whole: Batch

    def __len__(self) -> int:
        return len(self.whole)

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of them."""
        return self.whole.rows(rows)


def opened(bench: Bench) -> dict[str, float]:
    """What a worker does before its first candidate, in milliseconds."""
    began = time.perf_counter()
    _ = bench.embedded
    with_teacher = time.perf_counter()
    targets._load.cache_clear()
    rows, held = bench.prepare() or ((), ())
    opening = time.perf_counter() - with_teacher
    return {"teacher_ms": 1e3 * (with_teacher - began), "rows_ms": 1e3 * opening, "rows": len(rows) + len(held)}


def scored(candidates: list[Candidate], bench: Bench, jobs: int) -> tuple[float, dict[str, float]]:
    """Seconds for all candidates by so many worker processes, which have started before, and what starting one took."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        # One task per worker, each long enough that no worker takes two.
        ready = list(pool.map(partial(_ready, bench), range(jobs)))
        began = time.perf_counter()
        done = [pool.submit(distill.score, each, bench) for each in candidates]
        for job in done:
            job.result()
        return time.perf_counter() - began, ready[0]


def _ready(bench: Bench, _: int) -> dict[str, float]:
    found = opened(bench)
    time.sleep(1.0)
    return found


def rates(candidates: list[Candidate], settings: ProxySettings, rounds: int, say: Callable[[str], None]) -> Any:
    """Candidates per hour of the four kinds of run, in turns."""
    benches: dict[str, Bench] = {"cached": Bench(TEACHER, settings), "live": Live(TEACHER, settings)}
    began = time.perf_counter()
    benches["cached"].prepare()
    filled = time.perf_counter() - began
    found: dict[str, list[float]] = {}
    opening: list[dict[str, float]] = []
    for number in range(rounds):
        for jobs in (1, 2):
            for kind, bench in benches.items():
                seconds, ready = scored(candidates, bench, jobs)
                found.setdefault(f"{kind}-{jobs}", []).append(3600 * len(candidates) / seconds)
                opening += [ready] if kind == "cached" else []
                say(
                    f"round {number + 1}: {kind}, {jobs} workers: {found[f'{kind}-{jobs}'][-1]:.0f} candidates per hour"
                )

    def ratio(over: str, under: str) -> dict[str, float]:
        each = [a / b for a, b in zip(found[over], found[under], strict=True)]
        return {"median": statistics.median(each), "low": min(each), "high": max(each)}

    return {
        "candidates": [each.key for each in candidates],
        "filling_s": filled,
        "candidates_per_hour": {
            name: {"median": statistics.median(each), "rounds": each} for name, each in found.items()
        },
        "cache_speedup": {str(jobs): ratio(f"cached-{jobs}", f"live-{jobs}") for jobs in (1, 2)},
        "two_workers_speedup": {kind: ratio(f"{kind}-2", f"{kind}-1") for kind in benches},
        "opening_ms": {name: statistics.median(each[name] for each in opening) for name in opening[0]},
    }


# -------------------------------------------------------------------------------------------------------- the cache


def fill(rows: int) -> dict[str, Any]:
    """Computes a cache of so many rows; how many chunks this process computed, and how long it took."""
    done: list[int] = []
    bench = _filler(rows)
    began = time.perf_counter()
    bench.prepare(lambda so_far, _: done.append(so_far))
    return {"chunks": len(done), "seconds": time.perf_counter() - began}


def _filler(rows: int) -> Bench:
    return Bench(TEACHER, ProxySettings(steps=-(-rows // 16), batch=16, held_rows=256))


def _process(rows: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--fill", str(rows)]
    return subprocess.Popen(command, env={**os.environ, "NAS_CACHE": str(folder)}, stdout=subprocess.PIPE)


def _result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"filling the cache failed with code {process.returncode}")
    found: dict[str, Any] = json.loads(said)
    return found


def killed(rows: int, root: Path) -> dict[str, Any]:
    """Kills a process that fills a cache and lets another take it up; two others fill one together."""
    file = targets.cache_path(_filler(rows).digest, _filler(rows).settings.targets).name
    alone, together = root / "killed", root / "together"
    process = _process(rows, alone)
    while _rows(alone / "targets" / file) < rows // 2 and process.poll() is None:
        time.sleep(_WAIT_S)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = _rows(alone / "targets" / file)
    resumed = _result(_process(rows, alone))
    both = [_process(rows, together) for _ in range(2)]
    asked = [_result(each) for each in both]
    chunks = -(-rows // targets.CHUNK) + 1  # one of held-out rows
    hashes = {_sha(folder / "targets" / file) for folder in (alone, together)}
    return {
        "rows": rows,
        "killed_by_signal": -process.returncode,
        "rows_kept": kept,
        "resumed": resumed,
        "chunks_in_all": chunks,
        "chunks_after_the_kill": resumed["chunks"],
        "two_at_once": asked,
        "computed_once": sum(each["chunks"] for each in asked) == chunks,
        "files_equal": len(hashes) == 1,
    }


def _rows(path: Path) -> int:
    return targets.rows_in(path) if path.is_file() else 0


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------- seeds together


def together(settings: ProxySettings, counts: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """CPU time of one step's gradients of several seeds, one after the other against all at once, in turns."""
    bench = Bench(TEACHER, settings)
    spec = bench.spec(load_space(SPACE).reference("snapgen"))
    batch, objectives = bench.data.batch(0), settings.objectives
    rows = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # attention has no batching rule, which is part of the finding
        for count in counts:
            students: list[nn.Module] = [bench.student(spec, seed) for seed in range(count)]
            for attention in ("fused", "plain"):
                one = partial(_one_by_one, students, objectives, batch)
                all_at_once = _at_once(students, objectives, batch, attention)
                one(), all_at_once()
                pairs = [(_cpu(one), _cpu(all_at_once)) for _ in range(repeats)]
                speedups = [apart / joined for apart, joined in pairs]
                rows.append(
                    {
                        "seeds": count,
                        "attention": attention,
                        "apart_s": statistics.median(apart for apart, _ in pairs),
                        "together_s": statistics.median(joined for _, joined in pairs),
                        "speedup": statistics.median(speedups),
                        "speedup_low": min(speedups),
                        "speedup_high": max(speedups),
                    }
                )
    return rows


class _Loss(nn.Module):
    def __init__(self, student: nn.Module, objectives: Any, batch: Batch) -> None:
        super().__init__()
        self.student, self.objectives, self.batch = student, objectives, batch

    def forward(self) -> Tensor:
        """The loss of the student on the batch."""
        student: Any = self.student
        said = predict(student, self.batch, with_null=any(each.needs_null for each in self.objectives))
        return total(self.objectives, said, self.batch.teacher, self.batch)[0]


def _one_by_one(students: list[nn.Module], objectives: Any, batch: Batch) -> None:
    for student in students:
        student.zero_grad()
        _Loss(student, objectives, batch)().backward()


def _at_once(students: list[nn.Module], objectives: Any, batch: Batch, attention: str) -> Callable[[], Any]:
    parameters, buffers = stack_module_state(students)
    loss = _Loss(copy.deepcopy(students[0]).to("meta"), objectives, batch)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        state = {f"student.{name}": each for name, each in {**parameters, **buffers}.items()}
        return functional_call(loss, state, ())

    def run() -> Any:
        kernel: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if attention == "plain" else nullcontext()
        with kernel:
            return vmap(grad(one))(parameters, buffers)

    return run


def _cpu(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measures everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=4, help="per round and kind of run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of the proxy, where not its default")
    parser.add_argument("--rows", type=int, default=2048, help="of the cache that is killed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3], help="trained together")
    parser.add_argument("--repeats", type=int, default=5, help="of the seeds' steps")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.fill is not None:
        say(json.dumps(fill(options.fill)))
        return 0
    settings = proxies.settings_of("distill", **({} if options.steps is None else {"steps": options.steps}))
    space = load_space(SPACE)
    candidates = [space.from_row(row) for row in space.sample(options.candidates, _SEED)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NAS_CACHE"] = folder
        cache = killed(options.rows, Path(folder))
        say(f"killed with {cache['rows_kept']} of {options.rows} rows, resumed")
        speed = rates(candidates, settings, options.rounds, say)
        seeds = together(settings, tuple(options.seeds), options.repeats)
        targets._load.cache_clear()
    best = max(seeds, key=lambda row: row["speedup"])
    found = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "what": "wall time of worker processes that have started and loaded the teacher; seeds together: CPU time of"
        " one thread, gradients of one step",
        "settings": asdict(settings),
        "cache": cache,
        "throughput": speed,
        "seeds_together": {
            "rows": seeds,
            "in_the_product": False,
            "why": f"at best {best['speedup']:.2f} times as fast ({best['seeds']} seeds, {best['attention']}"
            " attention); from 1.2 on it would be worth its code",
        },
        "provenance": provenance(seed=_SEED),
    }
    atomic_write(options.out, json.dumps(found, indent=1) + "\n")
    for kind, rate in speed["candidates_per_hour"].items():
        say(f"{kind:9} {rate['median']:6.0f} candidates per hour")
    say(
        f"the cache makes one worker {speed['cache_speedup']['1']['median']:.2f} and two workers"
        f" {speed['cache_speedup']['2']['median']:.2f} times as fast; a worker opens {speed['opening_ms']['rows']:.0f}"
        f" rows in {speed['opening_ms']['rows_ms']:.1f} ms; filling takes {speed['filling_s']:.1f} s once"
    )
    say(
        f"killed with {cache['rows_kept']} of {cache['rows']} rows, {cache['chunks_after_the_kill']} of"
        f" {cache['chunks_in_all']} chunks were left; two at once computed each chunk"
        f" {'once' if cache['computed_once'] else 'MORE THAN ONCE'}; the files"
        f" {'are equal' if cache['files_equal'] else 'DIFFER'}"
    )
    say(f"seeds together (vmap): {found['seeds_together']['why']}")
    return 0 if cache["computed_once"] and cache["files_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
