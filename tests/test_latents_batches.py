"""Cached data as batches: a pure function of the step, however many processes share it and whoever makes them early."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import latents_case as case
import pytest
import torch

from nas.batches import Part
from nas.diffusion import Conditioning, Schedule, noised
from nas.errors import NasError
from nas.tasks.latents import Ahead, LatentBatches, PromptBatches, Store
from nas.tasks.latents.batches import rows_of
from nas.times import Times


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return case.write(tmp_path / "data", images=True)


class TestBatches:
    def test_every_pass_sees_every_row_once_in_another_order(self) -> None:
        seen = [row for step in range(5) for row in rows_of(10, 4, 3, step, Part())]
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
        assert seen[:10] != seen[10:]
        assert seen[:10] != list(range(10))
        assert rows_of(10, 4, 4, 0, Part()) != seen[:4]
        # A batch larger than the data takes from several passes.
        assert Counter(rows_of(3, 7, 0, 0, Part())).most_common()[-1][1] >= 2

    def test_are_a_function_of_the_step(self, store: Store) -> None:
        data = LatentBatches(store=store, size=4, seed=1)
        first, again, other = data.batch(6), LatentBatches(store=store, size=4, seed=1).batch(6), data.batch(7)
        for name in ("clean", "noise", "t"):
            assert torch.equal(getattr(first, name), getattr(again, name))
            assert not torch.equal(getattr(first, name), getattr(other, name))
        assert torch.equal(first.text.tokens, again.text.tokens)
        assert not torch.equal(LatentBatches(store=store, size=4, seed=2).batch(6).noise, first.noise)

    @pytest.mark.parametrize("count", [2, 4])
    def test_parts_make_the_whole(self, store: Store, count: int) -> None:
        data = LatentBatches(store=store, size=8, null_share=0.4, images=True)
        whole, parts = data.batch(3), [data.batch(3, Part(index, count)) for index in range(count)]
        for name in ("clean", "noise", "t", "images"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        text = Conditioning.cat([part.text for part in parts])
        assert torch.equal(text.tokens, whole.text.tokens)
        assert torch.equal(text.pooled, whole.text.pooled)
        with pytest.raises(NasError, match="a batch of 8 cannot be cut into 3"):
            data.batch(0, Part(0, 3))

    def test_rows_come_with_their_own_conditions(self, store: Store) -> None:
        batch = LatentBatches(store=store, size=6, null_share=0.0).batch(0)
        rows = [int(row) for row in batch.text.pooled[:, 0]]
        assert torch.equal(batch.clean, store.latents(rows))
        assert torch.equal(batch.text.tokens, store.conditions(rows).tokens)
        x, t = batch.point()
        assert torch.equal(x, noised(batch.clean, batch.noise, t))

    def test_a_share_of_the_captions_is_dropped(self, store: Store) -> None:
        data = LatentBatches(store=store, size=10, null_share=0.3)
        null = store.null()
        dropped = 0
        for step in range(40):
            batch = data.batch(step)
            without = (batch.text.tokens == null.tokens).flatten(1).all(1)
            assert torch.equal(without, (batch.text.pooled == null.pooled).all(1))
            dropped += int(without.sum())
        assert dropped / 400 == pytest.approx(0.3, abs=0.07)
        assert not bool((LatentBatches(store=store, size=10, null_share=0.0).batch(0).text.tokens == 7).any())

    def test_times_are_those_asked_for(self, store: Store) -> None:
        schedule = Schedule(prediction="noise", alpha_bar=torch.linspace(0.9, 0.1, 5))
        for kind in ("uniform", "mixed"):
            times = Times(kind=kind, schedule=schedule, out_of_range="drop")  # type: ignore[arg-type]
            data = LatentBatches(store=store, size=10, times=times)
            t = torch.cat([data.batch(step).t for step in range(20)])
            assert float(t.min()) >= schedule.least
            assert float(t.max()) <= schedule.most
            assert (len(set(t.tolist())) == 5) == (kind == "uniform")
            assert data.statement() == times.statement()

    def test_prompts_alone(self, store: Store, tmp_path: Path) -> None:
        for source in (store, case.write(tmp_path / "p", latents=False)):
            data = PromptBatches(store=source, size=4, seed=5)
            whole, parts = data.batch(2), [data.batch(2, Part(index, 2)) for index in range(2)]
            assert torch.equal(Conditioning.cat([part.text for part in parts]).tokens, whole.text.tokens)
            assert whole.clean is None
            with pytest.raises(NasError, match="prompts only"):
                whole.point()
        with pytest.raises(NasError, match="has prompts only"):
            LatentBatches(store=case.write(tmp_path / "q", latents=False), size=4)

    @pytest.mark.parametrize(("size", "share"), [(0, 0.1), (4, 1.5), (4, -0.1)])
    def test_settings_are_checked(self, store: Store, size: int, share: float) -> None:
        with pytest.raises(NasError, match="size >= 1 and null_share in"):
            LatentBatches(store=store, size=size, null_share=share)


class TestAhead:
    """The same batches, made before they are asked for."""

    def asked(self, count: int) -> list[tuple[int, Part]]:
        """Five steps of one process in `count` accumulated pieces of four."""
        return [(step, Part(piece, 4)) for step in range(5) for piece in range(count)]

    @pytest.mark.parametrize("pieces", [1, 2])
    def test_gives_what_the_plain_ones_give(self, store: Store, pieces: int) -> None:
        plain = LatentBatches(store=store, size=8, seed=1)
        made: list[tuple[int, Part]] = []

        class Counted:
            size = plain.size

            def batch(self, step: int, part: Part) -> Any:
                made.append((step, part))
                return plain.batch(step, part)

        data = Ahead(Counted())
        assert data.size == 8
        for step, part in self.asked(pieces):
            assert torch.equal(data.batch(step, part).noise, plain.batch(step, part).noise)
        data.close()
        # One wrong guess where it could not know of the second piece, and one batch that nobody took.
        assert len(made) == 5 * pieces + 1 + (pieces == 2)
        assert set(self.asked(pieces)) <= set(made)

    def test_other_steps_and_parts_are_made_when_asked_for(self, store: Store) -> None:
        plain = LatentBatches(store=store, size=8)
        data = Ahead(plain)
        for step, part in ((0, Part()), (7, Part()), (3, Part(1, 2)), (3, Part(0, 4)), (4, Part(0, 4))):
            assert torch.equal(data.batch(step, part).t, plain.batch(step, part).t)

    def test_errors_come_when_the_batch_is_asked_for(self, store: Store) -> None:
        plain = LatentBatches(store=store, size=8)

        class Breaking:
            size = 8

            def batch(self, step: int, part: Part) -> Any:
                if step == 1:
                    raise NasError("the disk is gone")
                return plain.batch(step, part)

        data = Ahead(Breaking())
        data.batch(0)
        with pytest.raises(NasError, match="the disk is gone"):
            data.batch(1)
        assert len(data.batch(2)) == 8
        assert len(pickle.loads(pickle.dumps(Ahead(plain))).batch(0)) == 8
