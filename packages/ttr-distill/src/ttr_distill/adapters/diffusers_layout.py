"""Where a diffusers transformer's tokens lie, read from what it is called with; what cannot be read is left open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from attn_dispatch import TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor

_IMAGE_FIRST = ("SD3Transformer2DModel",)
"""Models without position ids whose joint attention takes the image's tokens before those of the text."""


class LayoutReader:
    """Reads token layouts from the inputs of one transformer. Position ids are read once per tensor.

    Args:
        model: Class name of the transformer.
        patch: Latent pixels along the side of a token, for models that take the latent as an image.
        latent_size: Rows and columns of the latent that is sampled, if the caller knows them.
    """

    def __init__(self, model: str, patch: int | None, latent_size: tuple[int, int] | None) -> None:
        self._image_first = model in _IMAGE_FIRST
        self._patch = patch
        self._latent_size = latent_size
        self._read: tuple[Tensor, tuple[TokenGrid, ...]] | None = None

    def forget(self) -> None:
        """Let go of the position ids read last."""
        self._read = None

    def layouts(self, inputs: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
        """Return the layouts that attention of this forward may have, each of another length.

        Args:
            inputs: The transformer's arguments by name.

        Raises:
            ValueError: The latent size does not fit the tokens.
        """
        image, text, ids = (inputs.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_ids"))
        words = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        if isinstance(image, Tensor) and image.ndim == 4:
            return self._of_image(image, words)
        if not isinstance(image, Tensor) or not isinstance(ids, Tensor) or image.ndim != 3:
            return ()
        return (self._of_ids(image.shape[1], words, ids),)

    def _of_ids(self, tokens: int, words: int, ids: Tensor) -> TokenLayout:
        if self._read is None or self._read[0] is not ids:
            self._read = (ids, read_grids(ids))
        grids = self._read[1]
        if sum(grid.tokens for grid in grids) != tokens:
            grids = ()
        if self._latent_size is not None:
            grids = (latent_grid(self._latent_size, grids[0].tokens if grids else tokens), *grids[1:])
        placed = tuple(TokenGrid(words + grid.start, grid.rows, grid.columns) for grid in grids)
        spans = ((0, words),) if words else ()
        return TokenLayout(words + tokens, spans, placed[:1], placed[1:])

    def _of_image(self, image: Tensor, words: int) -> tuple[TokenLayout, ...]:
        """A latent ``[B, C, H, W]`` that the transformer cuts into patches in raster order."""
        height, width = image.shape[2:]
        if self._patch is None or height % self._patch or width % self._patch:
            return ()
        grid = TokenGrid(0, height // self._patch, width // self._patch)
        alone = TokenLayout(grid.tokens, (), (grid,))
        if not words or not self._image_first:
            return (alone,)
        total = grid.tokens + words
        return (alone, TokenLayout(total, ((grid.tokens, total),), (grid,)))


def read_grids(ids: Tensor) -> tuple[TokenGrid, ...]:
    """Read position ids ``[N, 3]`` (image, row, column) as grids from token 0 on; empty if one is no raster."""
    table = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] < 3:
        return ()
    _, counts = torch.unique_consecutive(table[:, 0], return_counts=True)
    grids: list[TokenGrid] = []
    start = 0
    for count in counts.tolist():
        part = table[start : start + count]
        rows, columns = (len(torch.unique(part[:, axis])) for axis in (1, 2))
        if rows * columns != count:
            return ()
        raster = part[:, 1:3].reshape(rows, columns, 2)
        if not bool((raster[:, :, 0] == raster[:, :1, 0]).all() & (raster[:, :, 1] == raster[:1, :, 1]).all()):
            return ()
        grids.append(TokenGrid(start, rows, columns))
        start += count
    return tuple(grids)


def latent_grid(latent_size: tuple[int, int], tokens: int) -> TokenGrid:
    """Find the token grid of a latent whose tokens are square patches."""
    rows, columns = latent_size
    patch = math.isqrt(rows * columns // tokens) if tokens else 0
    if patch < 1 or rows % patch or columns % patch or rows * columns != tokens * patch * patch:
        raise ValueError(
            f"latent_size {latent_size} does not fit {tokens} image tokens; "
            "give rows and columns of the latent that is sampled, or leave it out"
        )
    return TokenGrid(0, rows // patch, columns // patch)
