"""The streaming path of the blocked form: each chunk of features is summed over all keys, then read by all queries.

Memory is that of one chunk of features, one chunk of tokens and one accumulator of answers, whatever the number of
features. The indices of the monomials are computed on the device for each chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.taylor.buffers import gather_monomials
from attn_kernels.taylor.features import constant_counts, monomial_count, split_weights, unrank_multisets
from attn_kernels.taylor.heads import Heads
from attn_kernels.taylor.plan import Plan


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Buffers of one size of chunk.

    Attributes:
        x: ``[G, D + 1, n]``, tokens behind a row of ones.
        rows: ``[G, F, n]``, some monomials.
        scratch: ``[G, F, n]``.
        values: ``[G, E, n]``, weighted values and, for the first value columns, the weights.
        products: ``[G, g * E, n]``, values times coordinates, or sums before the last factor.
    """

    x: Tensor
    rows: Tensor
    scratch: Tensor
    values: Tensor
    products: Tensor

    def narrow(self, heads: int, tokens: int) -> "_Chunk":
        """The buffers of fewer heads and tokens, on the same memory."""
        if (heads, tokens) == (self.x.shape[0], self.x.shape[-1]):
            return self
        parts = (self.x, self.rows, self.scratch, self.values, self.products)
        return _Chunk(*(part[:heads, ..., :tokens] for part in parts))


@dataclass(frozen=True, eq=False)
class _Features:
    """A chunk of features: monomials times coordinates.

    Attributes:
        first: First coordinate.
        last: Behind the last coordinate.
        indices: ``[F, P - 2]``, of the monomials.
        weights: ``[last - first, F]``.
    """

    first: int
    last: int
    indices: Tensor
    weights: Tensor


class StreamingPath:
    """Attends groups of heads of equal shape one after another, on one set of buffers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._buffers: _Chunk | None = None

    def attend(self, heads: Heads) -> None:
        """Answer all queries of some heads."""
        wide = heads.centring.weights
        width = heads.v.shape[-1]
        factors, log_gain = self._coefficients(heads)
        factor_of_sums = wide.new_empty(0)
        for start in range(0, max(width, 1), max(self._plan.columns, 1)):
            columns = slice(start, min(start + self._plan.columns, width))
            # The weights, whose sum is the denominator, go with the first columns only.
            extended = columns.stop - start + (start == 0)
            chunk = self._allocate(heads, extended)
            sums = self._begin(heads, chunk, columns, factors)
            if heads.terms > 1:
                for features in self._features(heads):
                    state = self._sum_keys(heads, chunk, columns, features)
                    self._read(heads, chunk, features, state, sums, factors)
            if start == 0:
                factor_of_sums = self._normalise(heads, chunk, sums[:, -1], log_gain)
                sums = sums[:, :-1]
            for some in self._chunks(heads.q):
                heads.write(some, columns, sums[..., some], factor_of_sums[:, some])

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        """Chunks of the tokens of ``x`` ``[G, N, D]``."""
        for start in range(0, x.shape[1], self._plan.tokens):
            yield slice(start, min(start + self._plan.tokens, x.shape[1]))

    def _allocate(self, heads: Heads, extended: int) -> _Chunk:
        """Buffers of full chunks for values of ``extended`` rows, those of the call before where they fit."""
        plan, wide = self._plan, heads.centring.weights
        if self._buffers is None:
            columns = min(plan.columns, heads.v.shape[-1]) + 1
            x = wide.new_empty(plan.heads, plan.variables, plan.tokens)
            x[:, 0] = 1
            rows, scratch = (wide.new_empty(plan.heads, plan.rows, plan.tokens) for _ in range(2))
            values = wide.new_empty(plan.heads, columns, plan.tokens)
            products = wide.new_empty(plan.heads, plan.group * columns, plan.tokens)
            self._buffers = _Chunk(x, rows, scratch, values, products)
        whole = self._buffers
        return _Chunk(whole.x, whole.rows, whole.scratch, whole.values[:, :extended], whole.products)

    def _coefficients(self, heads: Heads) -> tuple[Tensor | None, Tensor | None]:
        """Factors ``[G, P, Nq]`` and logarithm of the gain ``[G, Nq]`` of all queries."""
        if heads.covariance is None:
            return None, None
        count, queries, width = heads.q.shape
        wide = heads.centring.weights
        factors, log_gain = wide.new_empty(count, heads.terms, queries), wide.new_empty(count, queries)
        x = wide.new_empty(count, width, self._plan.tokens)
        for some in self._chunks(heads.q):
            part = x[..., : some.stop - some.start]
            heads.load_queries(some, part)
            factors_of_part, gain_of_part = heads.coefficients(part)
            if factors_of_part is not None and gain_of_part is not None:
                factors[..., some], log_gain[:, some] = factors_of_part, gain_of_part
        return factors, log_gain

    def _begin(self, heads: Heads, buffers: _Chunk, columns: slice, factors: Tensor | None) -> Tensor:
        """The answers ``[G, E, Nq]`` of the constant feature alone."""
        count = heads.q.shape[0]
        constant = buffers.values.new_zeros(count, buffers.values.shape[1], 1)
        for some in self._chunks(heads.k):
            values = buffers.narrow(count, some.stop - some.start).values
            heads.load_values(some, columns, values)
            constant += values.sum(dim=-1, keepdim=True)
        sums = constant.new_empty(count, constant.shape[1], heads.q.shape[1])
        sums.copy_(constant)
        return sums if factors is None else sums.mul_(factors[:, -1:])

    def _features(self, heads: Heads) -> Iterator[_Features]:
        """All features but the constant, a chunk at a time."""
        plan, device = self._plan, heads.k.device
        for first in range(1, plan.variables, plan.group):
            last = min(first + plan.group, plan.variables)
            coordinates = torch.arange(first, last, device=device)
            rows = monomial_count(last, plan.degree)
            for start in range(0, rows, plan.rows):
                ranks = torch.arange(start, min(start + plan.rows, rows), device=device)
                indices = unrank_multisets(ranks, last, plan.degree)
                weights = split_weights(indices, coordinates, heads.scale, heads.centring.weights.dtype)
                yield _Features(first, last, indices, weights)

    def _sum_keys(self, heads: Heads, buffers: _Chunk, columns: slice, features: _Features) -> Tensor:
        """Weighted sums of a chunk of features over all keys, ``[G, g * E, F]``."""
        count, extended = heads.k.shape[0], buffers.values.shape[1]
        factors, rows = features.weights.shape
        state = buffers.x.new_zeros(count, factors * extended, rows)
        for some in self._chunks(heads.k):
            chunk = buffers.narrow(count, some.stop - some.start)
            heads.load_keys(some, chunk.x[:, 1:])
            heads.load_values(some, columns, chunk.values)
            gather_monomials(chunk.x, features.indices, chunk.rows[:, :rows], chunk.scratch[:, :rows])
            product = chunk.products[:, : factors * extended]
            coordinates = chunk.x[:, features.first : features.last, None]
            torch.mul(coordinates, chunk.values[:, None], out=product.view(count, factors, extended, -1))
            state.baddbmm_(product, chunk.rows[:, :rows].transpose(1, 2))
        whole = state.view(count, factors, extended, rows)
        whole *= features.weights.unsqueeze(1)
        store = getattr(torch, heads.config.store)
        if store is not torch.float32:
            stored = whole[:, :, : columns.stop - columns.start]
            stored.copy_(stored.to(store))
        return state

    def _read(
        self,
        heads: Heads,
        buffers: _Chunk,
        features: _Features,
        state: Tensor,
        sums: Tensor,
        coefficients: Tensor | None,
    ) -> None:
        """Add to ``sums`` ``[G, E, Nq]`` what all queries read from a chunk of features."""
        factors, rows = features.weights.shape
        constants = constant_counts(features.indices)
        for some in self._chunks(heads.q):
            chunk = buffers.narrow(heads.q.shape[0], some.stop - some.start)
            heads.load_queries(some, chunk.x[:, 1:])
            made, scratch = chunk.rows[:, :rows], chunk.scratch[:, :rows]
            gather_monomials(chunk.x, features.indices, made, scratch)
            if coefficients is not None:
                torch.index_select(coefficients[..., some], 1, constants, out=scratch)
                made.mul_(scratch)
            product = chunk.products[:, : state.shape[1]]
            torch.bmm(state, made, out=product)
            for factor, part in enumerate(product.chunk(factors, dim=1), features.first):
                sums[..., some].addcmul_(part, chunk.x[:, factor : factor + 1])

    def _normalise(self, heads: Heads, buffers: _Chunk, denominator: Tensor, log_gain: Tensor | None) -> Tensor:
        """Write ``lse`` of all queries, and return the factors ``[G, Nq]`` of their sums."""
        factor = torch.empty_like(denominator)
        for some in self._chunks(heads.q):
            queries = buffers.narrow(heads.q.shape[0], some.stop - some.start).x[:, 1:]
            heads.load_queries(some, queries)
            gain = None if log_gain is None else log_gain[:, some]
            factor[:, some] = heads.normalise(some, queries, denominator[:, some], gain)
        return factor
