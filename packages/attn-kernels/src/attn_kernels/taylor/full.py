"""The full path of the blocked form: the sums of all features are held, keys and queries are passed once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.taylor.buffers import MonomialBuffer
from attn_kernels.taylor.features import feature_weights, split_weights, unrank_multisets
from attn_kernels.taylor.heads import Heads
from attn_kernels.taylor.plan import Plan


@dataclass(eq=False)
class _Group:
    """Features that are products of a prefix of the monomials with the coordinates ``first`` to ``last - 1``.

    Attributes:
        first: First coordinate; the constant is 0.
        last: Behind the last coordinate.
        sums: ``[G, last - first, E, rows]``, the sums over the keys; without the values if these are stored apart.
        stored: ``[G, last - first, Dv, rows]`` bfloat16, the values' part of the sums, or ``None``.
    """

    first: int
    last: int
    sums: Tensor
    stored: Tensor | None = None

    @property
    def rows(self) -> int:
        """Length of the prefix."""
        return self.sums.shape[-1]

    def close(self, weights: Tensor, store: torch.dtype) -> None:
        """Apply ``weights`` ``[last - first, rows]`` and round the values' part to the dtype of storage."""
        self.sums *= weights.unsqueeze(1)
        if store is not torch.float32:
            self.stored = self.sums[:, :, :-1].to(store)
            self.sums = self.sums[:, :, -1:].clone()

    def matrix(self, scratch: Tensor | None) -> Tensor:
        """The sums as ``[G, (last - first) * E, rows]``, in ``scratch`` if they are stored apart."""
        if self.stored is None or scratch is None:
            return self.sums.flatten(1, 2)
        heads, factors, columns, rows = self.stored.shape
        whole = scratch[: heads * factors * (columns + 1) * rows].view(heads, factors, columns + 1, rows)
        whole[:, :, :columns] = self.stored
        whole[:, :, columns:] = self.sums
        return whole.flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Buffers of one size of chunk.

    Attributes:
        buffer: The monomials.
        values: ``[G, E, n]``, the weighted values and weights, or the sums that queries read.
        products: ``[G, g * E, n]``, values times coordinates, or sums before the last factor; ``None`` if there is
            no factor.
    """

    buffer: MonomialBuffer
    values: Tensor
    products: Tensor | None

    @classmethod
    def allocate(cls, heads: Heads, plan: Plan) -> "_Chunk":
        """Allocate the buffers of a full chunk."""
        count, columns = plan.heads, heads.v.shape[-1] + 1
        x = heads.centring.weights.new_empty(count, heads.k.shape[-1] + 1, plan.tokens)
        x[:, 0] = 1
        values = x.new_empty(count, columns, plan.tokens)
        products = x.new_empty(count, plan.group * columns, plan.tokens) if plan.group else None
        return cls(MonomialBuffer(x, plan.degree), values, products)

    def narrow(self, heads: int, tokens: int) -> "_Chunk":
        """The buffers of fewer heads and tokens, on the same memory."""
        if (heads, tokens) == (self.values.shape[0], self.values.shape[-1]):
            return self
        products = None if self.products is None else self.products[:heads, :, :tokens]
        return _Chunk(self.buffer.narrow(heads, tokens), self.values[:heads, :, :tokens], products)


class FullPath:
    """Attends groups of heads of equal shape one after another, on one set of buffers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._chunk: _Chunk | None = None

    def attend(self, heads: Heads) -> None:
        """Answer all queries of some heads."""
        if self._chunk is None:
            self._chunk = _Chunk.allocate(heads, self._plan)
        constant, groups = self._sum_keys(heads, self._chunk)
        self._weigh(heads, groups)
        self._answer(heads, self._chunk, constant, groups)

    def _sum_keys(self, heads: Heads, buffers: _Chunk) -> tuple[Tensor, list[_Group]]:
        """Sum weighted values ``[G, E]``, and values times features in groups."""
        values = buffers.values
        count, columns = heads.k.shape[0], values.shape[1]
        constant = values.new_zeros(count, columns)
        groups = [
            _Group(first, last, values.new_zeros(count, last - first, columns, rows))
            for first, last, rows in self._plan.groups()
        ]
        for start in range(0, heads.k.shape[1], self._plan.tokens):
            some = slice(start, min(start + self._plan.tokens, heads.k.shape[1]))
            chunk = buffers.narrow(count, some.stop - start)
            buffer = chunk.buffer
            heads.load_keys(some, buffer.x[:, 1:])
            heads.load_values(some, slice(None), chunk.values)
            buffer.fill()
            if chunk.products is None:
                groups[0].sums[:, 0].baddbmm_(chunk.values, buffer.rows.transpose(1, 2))
                continue
            constant += chunk.values.sum(dim=-1)
            for group in groups:
                factors = group.last - group.first
                product = chunk.products[:, : factors * columns]
                coordinates = buffer.x[:, group.first : group.last, None]
                torch.mul(coordinates, chunk.values[:, None], out=product.view(count, factors, columns, -1))
                group.sums.flatten(1, 2).baddbmm_(product, buffer.rows[:, : group.rows].transpose(1, 2))
        return constant, groups

    def _weigh(self, heads: Heads, groups: list[_Group]) -> None:
        """Apply the weights of the features to their sums."""
        store = getattr(torch, heads.config.store)
        for group in groups:
            dtype, device = group.sums.dtype, group.sums.device
            ranks = torch.arange(group.rows, device=device)
            indices = unrank_multisets(ranks, heads.k.shape[-1] + 1, self._plan.degree)
            if self._plan.group:
                factors = torch.arange(group.first, group.last, device=device)
                weights = split_weights(indices, factors, heads.scale, dtype)
            else:
                weights = feature_weights(indices, heads.scale, dtype).unsqueeze(0)
            group.close(weights, store)

    def _answer(self, heads: Heads, buffers: _Chunk, constant: Tensor, groups: list[_Group]) -> None:
        """Read the answers of all queries from the sums."""
        scratch = None
        if groups and groups[0].stored is not None:
            columns = buffers.values.shape[1]
            scratch = constant.new_empty(max(group.sums.numel() for group in groups) * columns)
        for start in range(0, heads.q.shape[1], self._plan.tokens):
            some = slice(start, min(start + self._plan.tokens, heads.q.shape[1]))
            chunk = buffers.narrow(heads.q.shape[0], some.stop - start)
            buffer, sums = chunk.buffer, chunk.values
            queries = buffer.x[:, 1:]
            heads.load_queries(some, queries)
            factors, log_gain = heads.coefficients(queries)
            buffer.fill(factors)
            if chunk.products is None:
                torch.bmm(groups[0].matrix(scratch), buffer.rows, out=sums)
            else:
                torch.mul(constant.unsqueeze(-1), _last_row(factors, buffer.x), out=sums)
                for group in groups:
                    matrix, rows = group.matrix(scratch), buffer.rows[:, : group.rows]
                    product = chunk.products[:, : matrix.shape[1]]
                    torch.bmm(matrix, rows, out=product)
                    for factor, part in enumerate(product.chunk(group.last - group.first, dim=1), group.first):
                        sums.addcmul_(part, buffer.x[:, factor : factor + 1])
            factor_of_sums = heads.normalise(some, queries, sums[:, -1], log_gain)
            heads.write(some, slice(None), sums[:, :-1], factor_of_sums)


def _last_row(factors: Tensor | None, x: Tensor) -> Tensor:
    """The factor of the constant feature, ``[G, 1, n]``."""
    return x[:, :1] if factors is None else factors[:, -1:]
