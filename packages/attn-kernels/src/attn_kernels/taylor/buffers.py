"""Buffers that the blocked form fills anew for every chunk of tokens.

Feature-major, ``[G, rows, n]`` for G heads and n tokens: every operation then runs along n, and the products of whole
rows need no index. The views of a buffer are made once per chunk size; making them again for every chunk would take
as long as the arithmetic.
"""

import torch
from torch import Tensor

from attn_kernels.taylor.features import monomial_count


class MonomialBuffer:
    """All monomials of one degree in the constant and D coordinates, computed from prefixes of the degree below.

    Attributes:
        x: ``[G, D + 1, n]``, the tokens behind a row of ones; whoever fills the buffer writes ``x[:, 1:]`` first.
        rows: ``[G, C(D + degree, degree), n]``, the monomials in colexicographic order.
    """

    def __init__(self, x: Tensor, degree: int, storage: list[Tensor] | None = None) -> None:
        """Allocate the rows.

        Args:
            x: ``[G, D + 1, n]``.
            degree: 0 or more.
            storage: Rows of degree 2 to ``degree`` to use instead of new ones.
        """
        heads, variables, tokens = x.shape
        if storage is None:
            storage = [x.new_empty(heads, monomial_count(variables, p), tokens) for p in range(2, degree + 1)]
        self.x = x
        self.rows = (x[:, :1], x)[degree] if degree < 2 else storage[-1]
        self._storage = storage
        self._degree = degree
        self._products: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        for degree_below, (below, block) in enumerate(zip([x, *storage], storage, strict=False), 1):
            products, start = [], 1
            for i in range(1, variables):
                count = monomial_count(i + 1, degree_below)
                products.append((below[:, :count], x[:, i : i + 1], block[:, start : start + count]))
                start += count
            self._products.append(products)

    def narrow(self, heads: int, tokens: int) -> "MonomialBuffer":
        """Return the buffer of the first heads and tokens, on the same memory."""
        storage = [block[:heads, :, :tokens] for block in self._storage]
        return MonomialBuffer(self.x[:heads, :, :tokens], self._degree, storage)

    def fill(self, factors: Tensor | None = None) -> None:
        """Compute the rows from ``x``.

        Args:
            factors: ``[G, P, n]``, by how often the constant stands in a monomial, as of ``hermite_factors``. A
                monomial begins as a power of the constant, so a factor there is in every monomial built on it.
        """
        for degree, products in enumerate(self._products, 2):
            self._storage[degree - 2][:, 0] = 1 if factors is None else factors[:, degree]
            for below, x, out in products:
                torch.mul(below, x, out=out)


def gather_monomials(x: Tensor, indices: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Write chosen monomials, each the product of the rows that its indices name.

    Args:
        x: ``[G, D + 1, n]``.
        indices: ``[F, degree]`` int64.
        out: ``[G, F, n]``, written.
        scratch: ``[G, F, n]``, overwritten.
    """
    if indices.shape[-1] == 0:
        out.fill_(1)
        return
    torch.index_select(x, 1, indices[:, 0], out=out)
    for position in range(1, indices.shape[-1]):
        torch.index_select(x, 1, indices[:, position], out=scratch)
        out.mul_(scratch)
