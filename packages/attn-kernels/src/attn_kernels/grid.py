"""A grid of image tokens in raster order among the tokens of a sequence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """``rows x columns`` image tokens in raster order, from position ``start`` on.

    Attributes:
        start: Position of the first token in the sequence.
        rows: Rows of tokens.
        columns: Columns of tokens.
    """

    start: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.rows < 1 or self.columns < 1:
            raise ValueError(f"a grid needs start >= 0 and at least one row and column, got {self}")

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.tokens
