"""Batches made while the step before is computed, so that an accelerator does not wait for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nas.batches import WHOLE, Batch, Batches, Part


class Ahead:
    """`Batches` that make the next batch in a thread of their own; what they give is the same.

    The next one is guessed from what was asked last: the next accumulated piece of the step, or the first of the next
    step. A wrong guess (after a resume, say) costs one batch.

    Args:
        inner: the batches, a pure function of the step.
    """

    def __init__(self, inner: Batches) -> None:
        self.inner = inner
        self._pool: ThreadPoolExecutor | None = None
        self._coming: tuple[tuple[int, Part], Future[Batch]] | None = None
        self._pieces: list[Part] = []  # those of this process, in the order in which it asks for them
        self._step: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Threads do not travel to other processes.
        return {**self.__dict__, "_pool": None, "_coming": None}

    @property
    def size(self) -> int:
        """B of a whole batch."""
        return self.inner.size

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The examples of that step, and the next ones are begun.

        Raises:
            NasError: as the inner batches do.
        """
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == (step, part):
            found = coming[1].result()
        else:
            if coming is not None:
                coming[1].cancel()
            found = self.inner.batch(step, part)
        following = self._following(step, part)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming = (following, self._pool.submit(self.inner.batch, *following))
        return found

    def close(self) -> None:
        """Waits for the batch that is being made and ends the thread; a later call starts another."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._coming = None

    def _following(self, step: int, part: Part) -> tuple[int, Part]:
        """What is asked next, if things go on as in the step before."""
        if part not in self._pieces or part.count != self._pieces[0].count:
            same_step = self._step == step and self._pieces and part.count == self._pieces[0].count
            self._pieces = [*self._pieces, part] if same_step else [part]
        self._step = step
        place = self._pieces.index(part)
        return (step, self._pieces[place + 1]) if place + 1 < len(self._pieces) else (step + 1, self._pieces[0])
