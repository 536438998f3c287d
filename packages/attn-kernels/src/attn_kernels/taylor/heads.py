"""Some heads of one batch row, as the blocked form meets them: chunks of keys in, chunks of answers out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.taylor.centring import Centring, centre, key_covariance
from attn_kernels.taylor.coefficients import hermite_factors, logit_variance
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.readout import normalise


@dataclass(frozen=True, eq=False)
class Heads:
    """G heads of one batch row.

    Attributes:
        q: ``[G, Nq, D]``.
        k: ``[G, Nk, D]``.
        v: ``[G, Nk, Dv]``.
        keep: ``[Nk]`` bool, or ``None``.
        out: ``[G, Nq, Dv]``, written.
        lse: ``[G, Nq]``, written.
        terms: P.
        scale: Score scale.
        config: How the series is expanded.
        centring: Of these queries and keys.
        covariance: ``[G, D, D]`` of the keys, or ``None`` if the coefficients are those of Taylor.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    out: Tensor
    lse: Tensor
    terms: int
    scale: float
    config: TaylorConfig
    centring: Centring
    covariance: Tensor | None

    @classmethod
    def prepare(
        cls,
        tensors: tuple[Tensor, Tensor, Tensor],
        keep: Tensor | None,
        answer: tuple[Tensor, Tensor],
        *,
        terms: int,
        scale: float,
        config: TaylorConfig,
        chunk: int,
    ) -> "Heads":
        """Centre q, k and v, ``chunk`` tokens at a time.

        Args:
            tensors: q ``[G, Nq, D]``, k ``[G, Nk, D]``, v ``[G, Nk, Dv]``.
            keep: ``[Nk]`` bool, True = keep; ``None`` = all.
            answer: Where the answer goes: out ``[G, Nq, Dv]`` and lse ``[G, Nq]``.
            terms: P.
            scale: Score scale.
            config: Settings of the operator.
            chunk: Tokens centred at a time.
        """
        q, k, v = tensors
        centring = centre(q, k, scale=scale, keep=keep, enabled=config.centre, chunk=chunk)
        fitted = config.coefficients == "hermite"
        covariance = key_covariance(k, centring, keep=keep, chunk=chunk) if fitted else None
        return cls(q, k, v, keep, *answer, terms, scale, config, centring, covariance)

    def load_keys(self, some: slice, x: Tensor) -> None:
        """Write the centred keys of some tokens, zero where masked, to ``x`` ``[G, D, n]``."""
        torch.sub(self.k[:, some].transpose(1, 2), self.centring.key_mean.transpose(1, 2), out=x)
        if self.keep is not None:
            x.masked_fill_(~self.keep[some], 0)

    def load_values(self, some: slice, columns: slice, values: Tensor) -> None:
        """Write the weighted values of some tokens to ``values`` ``[G, C (+ 1), n]``; a last row gets the weights."""
        weights = self.centring.weights[:, None, some]
        chosen = self.v[:, some, columns].transpose(1, 2)
        rows = chosen.shape[1]
        torch.mul(chosen, weights, out=values[:, :rows])
        if self.keep is not None:
            values[:, :rows].masked_fill_(~self.keep[some], 0)
        if values.shape[1] > rows:
            values[:, rows:] = weights

    def load_queries(self, some: slice, x: Tensor) -> None:
        """Write the centred queries of some tokens to ``x`` ``[G, D, n]``."""
        torch.sub(self.q[:, some].transpose(1, 2), self.centring.query_mean.transpose(1, 2), out=x)

    def coefficients(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Factors ``[G, P, n]`` and logarithm of the gain ``[G, n]`` for centred queries ``x`` ``[G, D, n]``."""
        if self.covariance is None:
            return None, None
        return hermite_factors(logit_variance(x, self.covariance, self.scale), self.terms, self.config.hermite_limit)

    def normalise(self, some: slice, x: Tensor, denominator: Tensor, log_gain: Tensor | None) -> Tensor:
        """Write ``lse`` of some queries, and return the factors ``[G, n]`` of their sums.

        Args:
            some: Queries.
            x: ``[G, D, n]``, the centred queries.
            denominator: ``[G, n]``.
            log_gain: As from ``coefficients``.
        """
        offset = torch.baddbmm(self.centring.shift.unsqueeze(-1), self.centring.key_mean, x, alpha=self.scale)[:, 0]
        if log_gain is not None:
            offset += log_gain
        factor, self.lse[:, some] = normalise(denominator, self.centring.total, offset, self.config.eps)
        return factor

    def write(self, some: slice, columns: slice, sums: Tensor, factor: Tensor) -> None:
        """Write the answers of some queries.

        Args:
            some: Queries.
            columns: Columns of the values.
            sums: ``[G, C, n]``, overwritten.
            factor: ``[G, n]``.
        """
        sums.mul_(factor.unsqueeze(1))
        if self.keep is not None:
            # Without keys the answer is 0 even for a query of NaN.
            sums.masked_fill_((self.centring.total == 0).unsqueeze(-1), 0)
        self.out[:, some, columns] = sums.transpose(1, 2)
