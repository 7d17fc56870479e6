"""Study: one search in a storage, opened by the search itself or by a worker that joins it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nas import cluster, proxies, stopping
from nas.errors import NasError
from nas.evaluate import Evaluation
from nas.record import Trial
from nas.space import Candidate
from nas.study import reuse
from nas.study.facts import Fact, Row, Snapshot
from nas.study.journal import Presence, searching
from nas.study.ledger import Ledger
from nas.study.outcome import DUPLICATE, FAILED, FORBIDDEN, OVER, PROXIED, STOPPED, UNTRAINABLE, Outcome
from nas.study.plan import SCHEMA, Plan, changed, refuse_others, refuse_worker
from nas.study.presence import Worker, refuse_other_machines
from nas.study.propose import Proposer
from nas.study.runner import Runner
from nas.study.storage import PATIENCE_S, Patience, close_storage, one_machine, open_storage, shown
from nas.study.worker import workers

Progress = Callable[[str, int, int, str], None]

JOURNALS_STUDY = "search"  # a journal holds one study, of this name
# A study of schema 1 wrote these into one attribute; what else was in it is priced anew.
_FIRST_FIXED = ("space", "space_hash", "teacher", "proxy", "seed")


class Study:
    """One search. Used as a context manager: it is one of the study's workers while open.

    Args:
        plan: what to search, and where the study is kept.
        folder: of the study's files and of its journal; None for a worker without one.
        progress: told (stage, done, total, note).
        executor: runs the proxies; by default worker processes of this machine, `plan.jobs` of them, or the plan's
            cluster.
        name: of the study in a storage that is shared; by default the folder's.
        joins: as a worker of a study that is there. Otherwise the study is made, or taken up under the plan's terms.

    Attributes:
        proposer: what is asked for candidates.
        changes: what is different of the terms since the study was last taken up, in words.

    Raises:
        NasError: the study belongs to another space version or other settings, is damaged, is in use by another
            search, or its storage cannot be reached.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path | None,
        progress: Progress | None = None,
        executor: Executor | None = None,
        *,
        name: str | None = None,
        joins: bool = False,
    ) -> None:
        self.plan, self.folder, self.joins = plan, folder, joins
        self.space = plan.evaluator.space
        self.progress = progress or (lambda stage, done, total, note: None)
        self.unit = proxies.proxy(plan.proxy.proxy).UNIT
        self.changes: tuple[str, ...] = ()
        self._name = JOURNALS_STUDY if plan.storage is None else name or (folder.name if folder else "search")
        self.where = shown(None, folder) if plan.storage is None else f"{shown(plan.storage, None)} ({self._name})"
        self._open = contextlib.ExitStack()
        self._executor = executor
        self.proposer = Proposer(plan.evaluator, plan.sampler, plan.seed, len(plan.proxy.seeds))
        self._prices: dict[Row, Evaluation] = {}

    def __enter__(self) -> Study:
        with contextlib.ExitStack() as opening:
            presence = self._enter_folder(opening)
            storage = open_storage(self.plan.storage, self.folder)
            opening.callback(close_storage, storage)
            patience = Patience(shown(self.plan.storage, self.folder), self._say_storage, PATIENCE_S)
            self.ledger = Ledger(storage, self._name, patience, create=not self.joins)
            self.study = self.ledger.study
            if one_machine(self.plan.storage):
                refuse_other_machines(self.ledger, self.where)
            self._join() if self.joins else self._take_up()
            self.worker = Worker(self.ledger, alone=presence is not None and presence.alone)
            opening.callback(self.worker.leave)
            if presence is not None:
                presence.share()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            # Proxy runs that nobody waits for any more must not keep a stopped search alive.
            for process in list(getattr(self._executor, "_processes", None) or {}):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._open.close()

    def _say_storage(self, note: str) -> None:
        self.progress("storage", 0, 1, note)

    def _enter_folder(self, opening: contextlib.ExitStack) -> Presence | None:
        """Takes the folder's locks; None where the study is not kept in it."""
        if self.folder is not None and not self.joins:
            opening.enter_context(searching(self.folder))
        if self.plan.storage is not None or self.folder is None:
            return None
        presence = Presence(self.folder)
        opening.callback(presence.close)
        return presence

    def _take_up(self) -> None:
        """Makes the study this plan's, or goes on with it under the plan's terms.

        `schema` is written last: whoever is interrupted before finds the study as it was and does it again.
        """
        attributes, fixed, terms = self.ledger.attributes(), self.plan.fixed(), self.plan.terms()
        schema = attributes.get("schema", 1 if "identity" in attributes else SCHEMA)
        if schema > SCHEMA:
            raise NasError(
                f"the study in {self.where} has schema {schema}, newer than the {SCHEMA} of this version",
                hint="use the version of nas that wrote it",
            )
        first = {k: v for k, v in attributes.get("identity", {}).items() if k in _FIRST_FIXED}
        refuse_others(attributes.get("fixed", first), fixed, self.where)
        self.changes = changed(attributes.get("terms", {}), terms)
        for name, value in (("settings", self.plan.settings), ("terms", terms), ("fixed", fixed), ("schema", SCHEMA)):
            if value is not None and attributes.get(name) != value:
                self.ledger.set(name, value)

    def _join(self) -> None:
        attributes = self.ledger.attributes()
        if attributes.get("schema") != SCHEMA:
            raise NasError(
                f"the study in {self.where} has schema {attributes.get('schema', 1)}, and workers join schema {SCHEMA}",
                hint="take it up with nas search first",
            )
        mine = {**self.plan.fixed(), **self.plan.terms()}
        refuse_worker({**attributes["fixed"], **attributes["terms"]}, mine, self.where)

    # What the storage holds, priced

    def price(self, row: Row, source: str = "search") -> Evaluation:
        """A row's evaluation under the plan's terms."""
        if row not in self._prices:
            self._price([row])
        return replace(self._prices[row], source=source)

    def _price(self, rows: list[Row]) -> None:
        candidates = [self.space.from_row(np.array(row)) for row in rows]
        self._prices.update(zip(rows, self.plan.evaluator.price(candidates, "search"), strict=True))

    def snapshot(self) -> Snapshot:
        """The study as it stands now."""
        facts = self.ledger.facts()
        new = {f.row for f in facts if f.row not in self._prices and f.state != FORBIDDEN}
        if new:
            self._price(sorted(new))
        good = [
            (self._prices[f.row].latency_ms, f.outcome.score.value, f.number)
            for f in facts
            if f.state == PROXIED and f.outcome and f.outcome.score and self._prices[f.row].feasible
        ]

        def open_again(fact: Fact) -> bool:
            """Whether nothing that is no slower reaches what the run was shown to end below, as prices are now."""
            assert fact.outcome is not None
            goal = fact.outcome.goal
            if goal is None:  # schema 1 did not write it down; it was a score from before
                before = [value for _, value, number in good if number < fact.number]
                goal = max(before, default=float("inf"))
            mine = self._prices[fact.row].latency_ms
            return not any(ms <= mine and value >= goal for ms, value, _ in good)

        return Snapshot(facts, open_again)

    def trials(self) -> list[Trial]:
        """The finished trials, by number: in the order of proposals, with no gap for a run that had to be repeated."""
        spent = 0
        found = []
        snapshot = self.snapshot()
        for number, fact in enumerate(snapshot.chains):
            if fact.outcome is None or fact.state == FORBIDDEN:
                continue
            trial = self._trial(number, fact, spent if fact.ran else None, snapshot)
            spent += fact.ran
            if trial is not None:
                found.append(trial)
        return found

    def _trial(self, number: int, fact: Fact, spent: int | None, snapshot: Snapshot) -> Trial | None:
        outcome, evaluation = fact.outcome, self.price(fact.row, fact.source)
        assert outcome is not None
        state = fact.state
        if state == OVER:
            if evaluation.feasible:
                return None  # as the terms are now, nothing is known of it
            state = "infeasible"
        elif state == DUPLICATE:
            twin = snapshot.known.get(fact.row)
            outcome = twin.outcome if twin is not None and twin.outcome is not None else outcome
        if outcome.score is not None:
            evaluation = evaluation.with_quality(outcome.score)
        elif state in (STOPPED, FAILED):
            evaluation = replace(evaluation, reason=outcome.reason, seconds=outcome.seconds)
        elif state == UNTRAINABLE:
            evaluation, state = replace(evaluation, reason=outcome.reason, feasible=False), "infeasible"
        return Trial(
            number=number,
            state=state,
            evaluation=evaluation,
            round=spent,
            cause=outcome.cause,
            curve=outcome.curve,
            saved_s=outcome.saved_s,
        )

    def past_run(self, fact: Fact) -> stopping.Run:
        """A proxied trial as what later runs are held against."""
        assert fact.outcome is not None
        assert fact.outcome.score is not None
        priced = self.price(fact.row)
        return stopping.Run(
            key=priced.key,
            latency_ms=priced.latency_ms,
            value=fact.outcome.score.value,
            curve=fact.outcome.curve,
            feasible=priced.feasible,
        )

    @property
    def proxied(self) -> int:
        """How many trials a proxy run has been spent on."""
        return sum(fact.outcome is not None for fact in self.snapshot().spending)

    @property
    def forbidden(self) -> int:
        """How many proposals a rule of the space forbade."""
        return sum(fact.state == FORBIDDEN for fact in self.snapshot().chains)

    def attr(self, name: str, value: Any = None) -> Any:
        """Reads a study attribute, or sets it where a value is given."""
        if value is not None:
            self.ledger.set(name, value)
            return value
        return self.ledger.attributes().get(name)

    # Running

    def run(self) -> None:
        """Works until `plan.trials` candidates have been proxied or nothing new is proposed.

        Raises:
            NasError: a proxy process died, the storage was lost, or another search changed the study's terms. Nothing
                that was done is lost: the same command resumes.
        """
        if not self.joins:
            reuse.take(self)
        if self._executor is None:
            self._executor = cluster.executor(self.plan.cluster) if self.plan.cluster else workers(self.plan.jobs)
        Runner(self, self._executor).run()

    def keep(self, candidate: Candidate, outcome: Outcome) -> None:
        """Keeps a finished run's score for other studies."""
        reuse.keep(self, candidate, outcome)
