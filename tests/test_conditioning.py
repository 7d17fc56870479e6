"""What a denoiser is told: rows, expansion, what is taken from other images, and joining."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nas.diffusion import Conditioning
from nas.errors import NasError


def conditions(count: int = 3, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    return Conditioning(tokens=normal(4, 5), pooled=normal(6), size_ids=normal(2), layout=normal(1, 2, 2))


def test_parts_are_those_that_are_there() -> None:
    assert [name for name, _ in conditions().parts()] == ["tokens", "pooled", "size_ids", "layout"]
    assert [name for name, _ in Conditioning(tokens=torch.zeros(1, 2, 3)).parts()] == ["tokens"]
    assert len(conditions(7)) == 7


def test_map_and_to_reach_every_part() -> None:
    doubled = conditions().map(lambda part: 2 * part)
    for name, part in conditions().parts():
        assert torch.equal(getattr(doubled, name), 2 * part)
    assert {part.dtype for _, part in conditions().to(dtype=torch.float64).parts()} == {torch.float64}
    assert conditions().to("meta").device == torch.device("meta")


def test_rows_of_every_part() -> None:
    whole = conditions(5)
    for which in (slice(1, 3), torch.tensor([4, 0])):
        some = whole.rows(which)
        assert len(some) == 2
        assert all(torch.equal(getattr(some, name), part[which]) for name, part in whole.parts())


def test_expand_repeats_one_row() -> None:
    one = conditions(1)
    many = one.expand(4)
    assert len(many) == 4
    assert all(torch.equal(getattr(many, name)[3], part[0]) for name, part in one.parts())


def test_like_takes_what_it_lacks_from_the_other() -> None:
    asked, null = conditions(3), replace(conditions(1, seed=1), size_ids=None)
    found = null.like(asked)
    assert torch.equal(found.tokens, null.tokens.expand(3, -1, -1))
    assert torch.equal(found.pooled, null.pooled.expand(3, -1))
    assert torch.equal(found.size_ids, asked.size_ids)  # of no caption, the image asked for has the same size
    # And nothing that the other does not have: a layout of its own would be told to a network that takes none.
    assert Conditioning(tokens=asked.tokens).like(Conditioning(tokens=asked.tokens)).layout is None
    assert null.like(Conditioning(tokens=asked.tokens)).layout is None
    several = conditions(3, seed=2)
    assert torch.equal(several.like(asked).pooled, several.pooled)


def test_where_chooses_rows() -> None:
    here, null = conditions(4), conditions(1, seed=1)
    chosen = torch.tensor([True, False, False, True])
    mixed = here.where(chosen, null)
    for name, part in here.parts():
        assert torch.equal(getattr(mixed, name)[1:3], part[1:3])
        assert torch.equal(getattr(mixed, name)[[0, 3]], getattr(null, name).expand(2, *part.shape[1:]))
    other = conditions(4, seed=2)
    assert torch.equal(here.where(chosen, other).pooled[3], other.pooled[3])


def test_cat_joins_and_refuses_unequal_parts() -> None:
    first, second = conditions(2), conditions(3, seed=1)
    joined = Conditioning.cat([first, second])
    assert len(joined) == 5
    assert torch.equal(joined.size_ids[2:], second.size_ids)
    with pytest.raises(NasError, match="different parts cannot be joined"):
        Conditioning.cat([first, replace(second, pooled=None)])
