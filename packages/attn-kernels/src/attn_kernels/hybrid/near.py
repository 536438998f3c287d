"""Which keys hybrid attention takes exactly: a window in one dimension or in two."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl
from attn_kernels.partial import Partial
from attn_kernels.window import (
    WindowBlock,
    window_attention,
    window_attention_2d,
    window_blocks,
    window_blocks_2d,
    window_mask,
    window_mask_2d,
)
from attn_kernels.window.spans import OutsideQueries, check_window, check_windows_2d


@dataclass(frozen=True)
class Near:
    """A window.

    Attributes:
        queries: Number of queries, Nq.
        keys: Number of keys, Nk.
        window: Radius in tokens of a window in one dimension; ``None`` = two dimensions.
        prefix: Leading keys that every query sees, in one dimension.
        chunk: Queries that share a window, in one dimension.
        grids: Grids of image tokens, in two dimensions.
        radius: Reach along rows and columns in tokens, in two dimensions.
        exact_queries: What queries outside every grid see, in two dimensions.
    """

    queries: int
    keys: int
    window: int | None
    prefix: int
    chunk: int
    grids: Sequence[TokenGrid]
    radius: int | tuple[int, int] | None
    exact_queries: OutsideQueries

    def __post_init__(self) -> None:
        if (self.window is None) == (self.radius is None):
            raise ValueError(
                f"give window (one dimension) or grids and radius (two), got window={self.window} and "
                f"radius={self.radius}"
            )
        if self.window is not None:
            if self.grids or self.exact_queries != "exact":
                raise ValueError("grids and exact_queries belong to a window in two dimensions; give radius")
            check_window(self.window, self.prefix, self.chunk)
            return
        if self.prefix or self.chunk != 1:
            raise ValueError("prefix and chunk belong to a window in one dimension; give window")
        if self.queries != self.keys:
            raise ValueError(f"a 2-D window needs a query per key, got {self.queries} queries and {self.keys} keys")
        check_windows_2d(self.grids, self.keys, self.reach, self.exact_queries)

    @property
    def reach(self) -> int | tuple[int, int]:
        """The radius of a window in two dimensions."""
        return 0 if self.radius is None else self.radius

    def seen(self, positions: Tensor) -> Tensor:
        """Return for queries at ``positions`` ``[n]`` which keys are near, ``[n, Nk]`` bool."""
        if self.window is None:
            return window_mask_2d(
                self.keys,
                grids=self.grids,
                radius=self.reach,
                exact_queries=self.exact_queries,
                query_positions=positions,
            )
        return window_mask(
            self.queries,
            self.keys,
            window=self.window,
            prefix=self.prefix,
            chunk=self.chunk,
            query_positions=positions,
        )

    def blocks(self, device: torch.device) -> Iterator[WindowBlock]:
        """Return the near pairs block by block, every query in one block."""
        if self.window is None:
            return window_blocks_2d(
                self.keys, grids=self.grids, radius=self.reach, exact_queries=self.exact_queries, device=device
            )
        return window_blocks(
            self.queries, self.keys, window=self.window, prefix=self.prefix, chunk=self.chunk, device=device
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, key_mask: Tensor | None, impl: Impl | str
    ) -> Partial:
        """Attend to the near keys only.

        Args:
            q: ``[B, H, Nq, D]``.
            k: ``[B, H, Nk, D]``.
            v: ``[B, H, Nk, Dv]``.
            scale: Score scale.
            key_mask: ``[B, Nk]`` bool or ``None``.
            impl: As in ``window_attention``.
        """
        if self.window is None:
            return window_attention_2d(
                q,
                k,
                v,
                grids=self.grids,
                radius=self.reach,
                exact_queries=self.exact_queries,
                scale=scale,
                key_mask=key_mask,
                impl=impl,
            )
        return window_attention(
            q,
            k,
            v,
            window=self.window,
            prefix=self.prefix,
            chunk=self.chunk,
            scale=scale,
            key_mask=key_mask,
            impl=impl,
        )
