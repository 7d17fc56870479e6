"""A batch, its parts and its random draws: parts make the whole, and what is missing is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nas.batches import WHOLE, Batch, Draws, Outputs, Part, stream
from nas.diffusion import Conditioning, noised
from nas.errors import NasError


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.randn(count, 2, 4, 4, generator=generator)

    return Batch(
        text=Conditioning(tokens=torch.randn(count, 3, 5, generator=generator)),
        null_text=Conditioning(tokens=torch.zeros(1, 3, 5)),
        clean=images(),
        noise=images(),
        t=torch.rand(count, generator=generator),
        images=images(),
        teacher=Outputs(velocity=images(), null_velocity=images(), features={"mid": images()}),
    )


class TestPart:
    def test_parts_cover_the_batch_once(self) -> None:
        rows = [Part(index, 3).rows(12) for index in range(3)]
        assert [i for each in rows for i in range(12)[each]] == list(range(12))
        assert WHOLE.rows(7) == slice(0, 7)

    @pytest.mark.parametrize(("total", "count"), [(10, 4), (2, 3), (0, 1)])
    def test_a_batch_that_cannot_be_cut(self, total: int, count: int) -> None:
        with pytest.raises(NasError, match=f"a batch of {total} cannot be cut into {count} equal parts"):
            Part(0, count).rows(total)


class TestBatch:
    def test_rows_of_everything(self) -> None:
        whole = batch()
        some = whole.rows(slice(2, 5))
        assert len(some) == 3
        for name in ("clean", "noise", "t", "images"):
            assert torch.equal(getattr(some, name), getattr(whole, name)[2:5])
        assert some.teacher is not None
        assert whole.teacher is not None
        assert torch.equal(some.teacher.features["mid"], whole.teacher.features["mid"][2:5])
        assert torch.equal(some.teacher.null_velocity, whole.teacher.null_velocity[2:5])
        assert len(some.null_text) == 1

    def test_point_is_the_noised_image_or_the_given_one(self) -> None:
        whole = batch()
        x, t = whole.point()
        assert torch.equal(x, noised(whole.clean, whole.noise, whole.t))
        assert torch.equal(t, whole.t)
        given = replace(whole, x=torch.ones_like(x))
        assert torch.equal(given.point()[0], torch.ones_like(x))

    def test_velocity_of_the_data(self) -> None:
        whole = batch()
        x, t = whole.point()
        # x_t moves along eps - x0.
        later = noised(whole.clean, whole.noise, t + 0.1)
        torch.testing.assert_close(x + 0.1 * whole.velocity, later)

    def test_prompts_have_no_images(self) -> None:
        prompts = Batch(text=batch().text, null_text=batch().null_text)
        with pytest.raises(NasError, match="the data has prompts only"):
            prompts.point()
        with pytest.raises(NasError, match="needs real images"):
            prompts.images_needed()
        with pytest.raises(NasError, match="needs the noise"):
            _ = prompts.velocity
        with pytest.raises(NasError, match="the data has prompts only"):
            replace(batch(), noise=None).point()


class TestDraws:
    def draws(self, part: Part = WHOLE) -> Draws:
        return Draws(generator=stream(3, 7), total=6, part=part, device=torch.device("cpu"))

    def test_parts_make_the_whole(self) -> None:
        def drawn(part: Part) -> list[Tensor]:
            draws = self.draws(part)
            return [draws.normal(2, 2), draws.uniform(), draws.integers(3, 9), torch.tensor([draws.integer(0, 1000)])]

        whole, parts = drawn(WHOLE), [drawn(Part(index, 3)) for index in range(3)]
        for number in range(3):
            assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
        assert all(torch.equal(part[3], whole[3]) for part in parts)  # one number for all of them

    def test_ranges(self) -> None:
        draws = Draws(generator=stream(1), total=2000, part=WHOLE, device=torch.device("cpu"))
        uniform, whole = draws.uniform(), draws.integers(20, 23)
        assert 0 <= float(uniform.min()) < 0.01
        assert 0.99 < float(uniform.max()) < 1
        assert sorted(set(whole.tolist())) == [20, 21, 22]
        assert float(draws.normal(4).std()) == pytest.approx(1, abs=0.05)

    def test_streams_differ_by_every_number(self) -> None:
        first = torch.rand(4, generator=stream(1, 2))
        assert torch.equal(torch.rand(4, generator=stream(1, 2)), first)
        for other in ((2, 1), (1, 3), (1, 2, 3), (1,)):
            assert not torch.equal(torch.rand(4, generator=stream(*other)), first)
        torch.rand(1, generator=stream(2**70, 5))  # a seed may have any size
