"""Each 2x2 tokens become one, so that the stage behind works on a quarter of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nas.blocks import check, check_positive

_KIND = "token_merge"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the merge.

    Attributes:
        width: Width C of a token before and after.
        rows: Rows of the grid of tokens before, even.
        columns: Its columns, even.
    """

    width: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_positive(_KIND, width=self.width, rows=self.rows, columns=self.columns)
        for field, side in (("rows", self.rows), ("columns", self.columns)):
            check(side % 2 == 0, _KIND, field, side, "even")


class Block(nn.Module):
    """Concatenation of 2x2 tokens and a linear layer (patch merging without its norm, arXiv 2103.14030, section 3.1).

    How SnapGen++ (arXiv 2601.08303) goes from its down stage to its middle is not public in detail: our reconstruction.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.proj = nn.Linear(4 * settings.width, settings.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, rows * columns, C]` to `[B, rows * columns / 4, C]`."""
        width, rows, columns = self.settings.width, self.settings.rows // 2, self.settings.columns // 2
        split = x.reshape(-1, rows, 2, columns, 2, width).permute(0, 1, 3, 2, 4, 5)
        return self.proj(split.reshape(-1, rows * columns, 4 * width))
