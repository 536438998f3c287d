"""How the rows of an image lie on several ranks, and how much they send each other."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import NearFarConfig, tile_counts


@dataclass(frozen=True)
class Shards:
    """Which rows of an image lie on which rank.

    Attributes:
        grid: The whole image; the tokens before it are on every rank, and there is none behind it.
        config: Settings of near-far attention.
        bounds: First row of every rank, and the number of rows; each rank has whole rows of tiles.
    """

    grid: TokenGrid
    config: NearFarConfig
    bounds: tuple[int, ...]

    @classmethod
    def even(cls, grid: TokenGrid, config: NearFarConfig, ranks: int) -> "Shards":
        """Deal rows of tiles out as evenly as they go.

        Raises:
            ValueError: A rank would have fewer rows of tiles than the radius, or none.
        """
        height = config.tile_shape[0]
        rows = tile_counts(grid, config.tile_shape)[0]
        least = max(1, config.radius if ranks > 1 else 0)
        if rows // ranks < least:
            raise ValueError(
                f"{rows} rows of tiles on {ranks} ranks leave fewer than {least} for one of them; take fewer ranks or "
                "smaller tiles"
            )
        firsts = (rank * rows // ranks for rank in range(ranks + 1))
        return cls(grid, config, tuple(min(grid.rows, first * height) for first in firsts))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.bounds) - 1

    def rows(self, rank: int) -> int:
        """Rows of tokens of a rank."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def tiles(self, rank: int) -> tuple[int, int]:
        """First tile of a rank, and the one behind its last, in raster order over the whole image."""
        return self._tile(self.bounds[rank]), self._tile(self.bounds[rank + 1])

    def border(self, rank: int) -> tuple[int, int]:
        """Rows of tokens of other ranks above and below that a rank's queries see exactly."""
        reach = self.config.radius * self.config.tile_shape[0]
        first, last = self.bounds[rank : rank + 2]
        return min(reach, first), min(reach, self.grid.rows - last)

    def seen(self, rank: int) -> tuple[int, int]:
        """First and last tile, as in ``tiles``, of a rank's rows with their borders."""
        above, below = self.border(rank)
        return self._tile(self.bounds[rank] - above), self._tile(self.bounds[rank + 1] + below)

    def local(self, x: Tensor, rank: int) -> Tensor:
        """Take a rank's tokens ``[B, H, Nr, D]`` from those of the whole sequence ``[B, H, N, D]``."""
        start, columns = self.grid.start, self.grid.columns
        first, last = (start + row * columns for row in self.bounds[rank : rank + 2])
        return torch.cat([x[:, :, :start], x[:, :, first:last]], dim=2)

    def _tile(self, row: int) -> int:
        """First tile of the row of tiles that begins with a row of tokens."""
        return -(-row // self.config.tile_shape[0]) * tile_counts(self.grid, self.config.tile_shape)[1]


class Traffic(NamedTuple):
    """Bytes that one rank receives in one call.

    Attributes:
        border: Keys and values of the neighbours' nearest rows.
        pooled: One key and value per tile of every other rank.
        ring: Keys and values of every other rank, where tiles are chosen.
        text: Partials of the queries outside the image, where those are exact.
    """

    border: int
    pooled: int
    ring: int
    text: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def received_bytes(
    shards: Shards, rank: int, *, batch: int, heads: int, width: int, value_width: int, itemsize: int
) -> Traffic:
    """Count the bytes that a rank receives in one call; shares are padded to the largest one's size.

    Args:
        shards: Which rows lie where.
        rank: The rank.
        batch: B.
        heads: H.
        width: D.
        value_width: Dv.
        itemsize: Bytes of a number of q, k and v; means and partials travel in float32 at least.
    """
    per_key, wide = batch * heads * (width + value_width), max(4, itemsize)
    others = shards.ranks - 1
    most_tiles = max(last - first for first, last in map(shards.tiles, range(shards.ranks)))
    most_tokens = max(map(shards.rows, range(shards.ranks))) * shards.grid.columns
    text = shards.grid.start if shards.config.exact_queries == "exact" else 0
    return Traffic(
        border=sum(shards.border(rank)) * shards.grid.columns * per_key * itemsize,
        pooled=others * most_tiles * per_key * wide,
        ring=others * most_tokens * per_key * itemsize if shards.config.top_k else 0,
        text=others * text * batch * heads * (value_width + 1) * wide,
    )


class TileTokens(NamedTuple):
    """The tokens of the tiles of one grid.

    Attributes:
        tokens: ``[T, A]`` int64, positions within the grid of each tile's tokens, A = tokens of a full tile.
        inside: ``[T, A]`` bool, False where an edge tile has fewer.
        tile_of: ``[N]`` int64, tile of each token.
        place: ``[N]`` int64, position of each token in the flattened ``tokens``.
    """

    tokens: Tensor
    inside: Tensor
    tile_of: Tensor
    place: Tensor


def tile_tokens(grid: TokenGrid, config: NearFarConfig, device: torch.device) -> TileTokens:
    """List the tokens of every tile; positions count from the grid's first token."""
    (height, width), (down, across) = config.tile_shape, tile_counts(grid, config.tile_shape)
    row = torch.arange(down * height, device=device).view(down, 1, height, 1)
    column = torch.arange(across * width, device=device).view(1, across, 1, width)
    inside = ((row < grid.rows) & (column < grid.columns)).reshape(down * across, height * width)
    tokens = (row.clamp(max=grid.rows - 1) * grid.columns + column.clamp(max=grid.columns - 1)).reshape(inside.shape)
    token = torch.arange(grid.tokens, device=device)
    y, x = token // grid.columns, token % grid.columns
    tile_of = y // height * across + x // width
    return TileTokens(tokens, inside, tile_of, tile_of * height * width + y % height * width + x % width)
