"""A priced toy space and a proxy that takes no time, for tests of the search loop."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np

from nas import quality
from nas.bench import Point, Stopped
from nas.device import Budget
from nas.errors import DIVERGED, UntrainableError
from nas.evaluate import Evaluation, Terms
from nas.proxies import Score
from nas.space import SearchSpace, load_space
from nas.study import Plan, Study

LOOKS = (6, 12, 18, 24)  # of 24 steps

TOML = """
family = "unet"
[input]
latent_channels = 4
latent_height = 8
latent_width = 8
pixels_per_latent = 8
text_tokens = 4
text_width = 8
[choices]
width = [1, 2, 3, 4, 5]
depth = [0, 1, 2, 3]
kind = ["full", "separable"]
attention = [false, true]
[[rules]]
when = { depth = [0] }
inactive = ["attention"]
because = "nothing attends"
[[rules]]
when = { width = [5], kind = ["full"] }
forbid = true
because = "too wide to be dense"
[pipeline]
steps = 4
guidance = false
text_encoders = []
decoder = "taesd"
source = "a test"
[[reference]]
name = "known"
title = "a published one"
source = "a test"
[reference.choices]
width = 4
depth = 3
kind = "full"
attention = true
"""


@dataclass(frozen=True)
class FakeEvaluator:
    """Latency is ten times width plus depth; the budget is 35 ms unless another is given."""

    space: SearchSpace
    sheet: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(slug="toy--none--fp32"))
    predictor: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(to_json=lambda: {"kind": "toy"}))
    terms: Terms = Terms(budget=Budget(ms=35.0, per_step=True, device="toy"), calls=1, parts=(), confidence=0.8)

    def identity(self):
        return {"budgets": [str(self.terms.budget)], "targets": [self.sheet.slug], "predictors": ["toy"]}

    def within(self, ms):
        """The same with another budget in milliseconds."""
        return replace(self, terms=replace(self.terms, budget=replace(self.terms.budget, ms=ms)))

    def problem_pool(self, n=100_000, seed=0):
        rows = np.array([each.row for each in self.space.enumerate() if self.price([each])[0].feasible])
        return rows, *self.features(rows)

    def features(self, rows):
        priced = self.price([self.space.from_row(row) for row in rows])
        return np.array([each.latency_ms for each in priced]), np.asarray(rows)[:, :2].astype(float)

    def price(self, candidates, source="search"):
        rows = []
        for candidate in candidates:
            ms = 10.0 * candidate.values["width"] + candidate.values["depth"]
            fits = ms + 1 <= self.terms.budget.ms
            rows.append(
                Evaluation(
                    key=candidate.key,
                    choices=candidate.choices,
                    params=int(ms),
                    macs=int(ms),
                    weight_bytes=4,
                    peak_activation_bytes=4,
                    step_ms=ms,
                    latency_ms=ms,
                    latency_low_ms=ms - 1,
                    latency_high_ms=ms + 1,
                    meets_budget_probability=1.0 if fits else 0.1,
                    feasible=fits,
                    reason="" if fits else "over",
                    source=source,
                )
            )
        return rows


def toy_score(candidate, teacher, settings, stop, device="cpu"):
    """Worth more when wide, deep and dense; its training loss follows that at every look, up to a little noise."""
    values = candidate.values
    if values["depth"] == 3 and values["width"] == 1:
        raise UntrainableError("after 24 steps the student is no better than before the first", DIVERGED, hint="none")
    value = values["width"] ** 0.5 + 0.1 * values["depth"] + (0.3 if values["kind"] == "full" else 0.0)
    curve = ()
    for step in LOOKS:
        noise = int(hashlib.sha256(f"{candidate.key}:{step}".encode()).hexdigest()[:6], 16) / 16**6 - 0.5
        curve += (Point(step=step, train_db=value - 5 / step + 0.02 * noise, seconds=step / 48),)
        if step < LOOKS[-1] and stop is not None and (reason := stop(curve)):
            raise Stopped(reason, curve)
    return Score(value=value, value_sd=0.01, text=0.0, seconds=0.5, curve=curve if stop is not None else curve[-1:])


class Inline(Executor):
    """Runs the proxy in the calling thread and remembers what it was asked for."""

    def __init__(self):
        self.asked, self.rules = [], {}

    def submit(self, fn, candidate, teacher, settings, stop, device):
        self.asked.append(candidate.key)
        self.rules[candidate.key] = stop
        future = Future()
        try:
            future.set_result(fn(candidate, teacher, settings, stop))
        except Exception as error:  # noqa: BLE001 - as a pool does
            future.set_exception(error)
        return future


def run(plan, folder, **named):
    """A study's trials, and the keys of the candidates that proxies were run for."""
    folder.mkdir(exist_ok=True)
    executor = Inline()
    with Study(plan, folder, executor=executor, **named) as opened:
        opened.run()
        return opened.trials(), executor.asked


def toy_plan(folder, monkeypatch, **changes):
    """A search of the toy space by Optuna's TPE, whose proxies take no time."""
    path = folder / "toy.toml"
    path.write_text(TOML)
    monkeypatch.setattr(quality, "teacher_hash", lambda teacher: "teacher")
    monkeypatch.setattr(quality, "score", toy_score)
    monkeypatch.setattr("os.fsync", lambda handle: None)  # a power cut is not tested
    plan = Plan(
        evaluator=FakeEvaluator(load_space(path)),
        teacher="embedded",
        proxy=quality.ProxySettings(steps=24),
        trials=12,
        seed=6,
        jobs=1,
        sampler="tpe",
    )
    return replace(plan, **changes)
