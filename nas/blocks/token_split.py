"""Each token becomes 2x2: the inverse step of `token_merge`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the split.

    Attributes:
        width: Width C of a token before and after.
        rows: Rows of the grid of tokens before.
        columns: Its columns.
    """

    width: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_positive("token_split", width=self.width, rows=self.rows, columns=self.columns)


class Block(nn.Module):
    """A linear layer to four tokens, put in place.

    How SnapGen++ (arXiv 2601.08303) goes from its middle to its up stage is not public in detail: our reconstruction.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.proj = nn.Linear(settings.width, 4 * settings.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, rows * columns, C]` to `[B, 4 * rows * columns, C]`."""
        width, rows, columns = self.settings.width, self.settings.rows, self.settings.columns
        split = self.proj(x).reshape(-1, rows, columns, 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return split.reshape(-1, 4 * rows * columns, width)
