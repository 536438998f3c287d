"""Which keys lie in a query's window, as masks and as blocks.

A mask is the definition: ``[Nq, Nk]``, True where the query sees the key. The blocks cut the same pairs into small
dense pieces, each pair in exactly one of them, so that whoever needs something of the pairs near by (their exact
attention, or what a global approximation says of them) can compute it in bounded memory. Everything here depends on
shapes alone, so nothing waits for the device.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import check_grids, exact_ranges

OutsideQueries = Literal["exact", "local"]
"""What queries outside every grid see: every key, or only the tokens outside the grids."""


class WindowBlock(NamedTuple):
    """Some queries and a superset of the keys that they see.

    Attributes:
        queries: ``[n]`` int64, rows of q.
        keys: ``[m]`` int64, rows of k, none twice. No query of the block sees any other key.
        keep: ``[n, m]`` bool, True where the query sees the key; ``None`` = every query sees every key.
    """

    queries: Tensor
    keys: Tensor
    keep: Tensor | None


def check_window(window: int, prefix: int, chunk: int) -> None:
    """Check the integers of a one-dimensional window.

    Raises:
        ValueError: ``window`` or ``prefix`` is negative, or ``chunk`` is not positive.
    """
    if window < 0 or prefix < 0 or chunk < 1:
        raise ValueError(f"a window needs window >= 0, prefix >= 0 and chunk >= 1, got {window}, {prefix} and {chunk}")


def check_windows_2d(
    grids: Sequence[TokenGrid], length: int, radius: int | tuple[int, int], exact_queries: str
) -> tuple[tuple[TokenGrid, ...], tuple[int, int]]:
    """Return the grids as a tuple, and the radius along rows and columns.

    Raises:
        ValueError: No grid, grids that overlap or end after ``length`` tokens, a grid of several frames, a negative
            radius, or an unknown ``exact_queries``.
    """
    if not grids:
        raise ValueError("a 2-D window needs at least one TokenGrid; without one use window_attention")
    for grid in grids:
        if grid.tokens != grid.rows * grid.columns:
            raise ValueError(f"a 2-D window takes one grid per frame, got {grid}")
    both = (radius, radius) if isinstance(radius, int) else tuple(radius)
    if len(both) != 2 or min(both) < 0:
        raise ValueError(f"radius must be an integer >= 0 or two of them (rows, columns), got {radius}")
    if exact_queries not in ("exact", "local"):
        raise ValueError(f"exact_queries must be 'exact' or 'local', got {exact_queries!r}")
    return check_grids(grids, length), (both[0], both[1])


def window_mask(
    queries: int,
    keys: int,
    *,
    window: int,
    prefix: int = 0,
    chunk: int = 1,
    query_positions: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which keys a query sees in ``window_attention``.

    Args:
        queries: Number of all queries, Nq.
        keys: Number of keys, Nk.
        window: Radius in tokens.
        prefix: Leading keys that every query sees.
        chunk: Queries that share one window.
        query_positions: ``[n]`` int64, the queries to answer for; ``None`` = all.
        device: Device of the mask; that of ``query_positions`` if given.

    Returns:
        ``[Nq, Nk]`` (or ``[n, Nk]``) bool, True = seen.

    Raises:
        ValueError: ``window`` or ``prefix`` is negative, or ``chunk`` is not positive.
    """
    check_window(window, prefix, chunk)
    rows = torch.arange(queries, device=device) if query_positions is None else query_positions
    return _sees(rows, torch.arange(keys, device=rows.device), queries, window, prefix, chunk)


def _sees(rows: Tensor, places: Tensor, queries: int, window: int, prefix: int, chunk: int) -> Tensor:
    """Return ``[n, m]`` bool: which of the keys ``places`` ``[m]`` the queries ``rows`` ``[n]`` see."""
    first = (rows // chunk * chunk).unsqueeze(-1)
    last = (first + chunk).clamp(max=queries) - 1
    return ((places >= first - window) & (places <= last + window)) | (places < prefix)


def window_blocks(
    queries: int,
    keys: int,
    *,
    window: int,
    prefix: int = 0,
    chunk: int = 1,
    block: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[WindowBlock]:
    """Yield the pairs of ``window_mask`` block by block, every query in exactly one block.

    Args:
        queries: Number of queries, Nq.
        keys: Number of keys, Nk.
        window: Radius in tokens.
        prefix: Leading keys that every query sees.
        chunk: Queries that share one window.
        block: Queries of a block; about the window if ``None``, so that the keys of a block are few times its queries.
        device: Device of the indices.

    Yields:
        Blocks; their keys are the prefix and one range, a key of both once.

    Raises:
        ValueError: ``window`` or ``prefix`` is negative, or ``chunk`` or ``block`` is not positive.
    """
    check_window(window, prefix, chunk)
    step = min(512, max(64, window, chunk)) if block is None else block
    if step < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    prefix = min(prefix, keys)
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        low = max(prefix, start // chunk * chunk - window)
        high = min(keys, min((stop - 1) // chunk * chunk + chunk, queries) + window)
        places = torch.arange(max(low, high) - low + prefix, device=device)
        places = torch.where(places < prefix, places, places + (low - prefix))
        rows = torch.arange(start, stop, device=device)
        # The last row starts the latest and the first one ends the earliest: where both see all, every row does.
        first_end = min(start // chunk * chunk + chunk, queries) + window
        dense = (stop - 1) // chunk * chunk - window <= low and first_end >= high
        yield WindowBlock(rows, places, None if dense else _sees(rows, places, queries, window, prefix, chunk))


def window_mask_2d(
    length: int,
    *,
    grids: Sequence[TokenGrid],
    radius: int | tuple[int, int],
    exact_queries: OutsideQueries = "exact",
    query_positions: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which keys a query sees in ``window_attention_2d``.

    Args:
        length: Tokens of the sequence, N.
        grids: Grids of image tokens.
        radius: Reach along rows and columns, in tokens.
        exact_queries: What queries outside every grid see.
        query_positions: ``[n]`` int64, the queries to answer for; ``None`` = all.
        device: Device of the mask; that of ``query_positions`` if given.

    Returns:
        ``[N, N]`` (or ``[n, N]``) bool, True = seen.

    Raises:
        ValueError: Grids, radius or ``exact_queries`` do not fit.
    """
    grids, reach = check_windows_2d(grids, length, radius, exact_queries)
    rows = torch.arange(length, device=device) if query_positions is None else query_positions
    places = torch.arange(length, device=rows.device)
    outside = torch.ones_like(places, dtype=torch.bool)
    seen = torch.zeros(len(rows), length, dtype=torch.bool, device=rows.device)
    from_outside = torch.ones_like(rows, dtype=torch.bool)
    for grid in grids:
        inside = (places >= grid.start) & (places < grid.stop)
        mine = (rows >= grid.start) & (rows < grid.stop)
        near = _near(rows, places, grid, reach)
        seen = seen | (near & mine.unsqueeze(-1) & inside)
        outside, from_outside = outside & ~inside, from_outside & ~mine
    seen = seen | outside
    return seen | from_outside.unsqueeze(-1) if exact_queries == "exact" else seen


def _near(rows: Tensor, places: Tensor, grid: TokenGrid, reach: tuple[int, int]) -> Tensor:
    """Return ``[n, m]`` bool: which tokens of a grid are within reach of which; the others' answers mean nothing."""
    (row, column), (key_row, key_column) = (
        (each // grid.columns, each % grid.columns) for each in (rows - grid.start, places - grid.start)
    )
    near_row = (row.unsqueeze(-1) - key_row).abs() <= reach[0]
    return near_row & ((column.unsqueeze(-1) - key_column).abs() <= reach[1])


def window_blocks_2d(
    length: int,
    *,
    grids: Sequence[TokenGrid],
    radius: int | tuple[int, int],
    exact_queries: OutsideQueries = "exact",
    block: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[WindowBlock]:
    """Yield the pairs of ``window_mask_2d`` block by block, every query in exactly one block.

    Args:
        length: Tokens of the sequence, N.
        grids: Grids of image tokens.
        radius: Reach along rows and columns, in tokens.
        exact_queries: What queries outside every grid see.
        block: Side of a square of queries; about the radius if ``None``.
        device: Device of the indices.

    Yields:
        Squares of each grid, their keys the tokens outside the grids and the square with a halo; then the queries
        outside, at most 512 at a time.

    Raises:
        ValueError: Grids, radius, ``exact_queries`` or ``block`` do not fit.
    """
    grids, reach = check_windows_2d(grids, length, radius, exact_queries)
    side = min(32, max(8, *reach)) if block is None else block
    if side < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    ranges = exact_ranges(grids, length)
    pieces = [torch.arange(start, stop, device=device) for start, stop in ranges]
    outside = torch.cat(pieces) if pieces else torch.arange(0, device=device)
    for grid in grids:
        for top in range(0, grid.rows, side):
            for left in range(0, grid.columns, side):
                yield _square(grid, (top, left), side, reach, outside)
    keys = torch.arange(length, device=device) if exact_queries == "exact" else outside
    for rows in torch.split(outside, 512) if ranges else ():
        yield WindowBlock(rows, keys, None)


def _square(
    grid: TokenGrid, corner: tuple[int, int], side: int, reach: tuple[int, int], outside: Tensor
) -> WindowBlock:
    """Return the block of a square of queries; ``outside`` ``[E]`` are the keys that each of them sees besides."""
    sizes = (grid.rows, grid.columns)
    stops = [min(first + side, size) for first, size in zip(corner, sizes, strict=True)]
    lows = [max(0, first - far) for first, far in zip(corner, reach, strict=True)]
    highs = [min(size, stop + far) for size, stop, far in zip(sizes, stops, reach, strict=True)]
    queries, halo = (
        (
            grid.start
            + torch.arange(begin[0], end[0], device=outside.device).unsqueeze(-1) * grid.columns
            + torch.arange(begin[1], end[1], device=outside.device)
        ).flatten()
        for begin, end in ((corner, stops), (lows, highs))
    )
    keys = torch.cat([outside, halo])
    # The first row of queries reaches the last row of the halo, and the last one the first: then all reach all.
    if all(
        stop - 1 - low <= far and high - 1 - first <= far
        for first, stop, low, high, far in zip(corner, stops, lows, highs, reach, strict=True)
    ):
        return WindowBlock(queries, keys, None)
    keep = torch.ones(len(queries), len(keys), dtype=torch.bool, device=keys.device)
    keep[:, len(outside) :] = _near(queries, halo, grid, reach)
    return WindowBlock(queries, keys, keep)
