"""Bases of few dimensions in which the dot products of queries and keys are kept as well as possible."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask

Method = Literal["bilinear", "pca"]


@dataclass(frozen=True, eq=False)
class Projection:
    """A basis for queries and one for keys, per head: ``q . k`` is about ``(q q_basis) . (k k_basis)``.

    Fitted to the queries and keys of one layer; those of another layer need their own.

    Attributes:
        q_basis: ``[H, D, r]``.
        k_basis: ``[H, D, r]``.
        captured: ``[H]``, share of the variance of the centred dot products that the bases keep, 0 to 1.
    """

    q_basis: Tensor
    k_basis: Tensor
    captured: Tensor

    def __post_init__(self) -> None:
        if self.q_basis.ndim != 3 or self.q_basis.shape != self.k_basis.shape:
            raise ValueError(
                f"bases must both be [H, D, r], got {tuple(self.q_basis.shape)} and {tuple(self.k_basis.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of dimensions, r."""
        return self.q_basis.shape[2]

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Project queries ``[B, H, Nq, D]`` and keys ``[B, H, Nk, D]``, in float32 or wider.

        Returns:
            ``[B, H, Nq, r]`` and ``[B, H, Nk, r]``.

        Raises:
            ValueError: Heads, width or device do not fit.
        """
        self.check(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.to(wide) @ self.q_basis.to(wide), k.to(wide) @ self.k_basis.to(wide)

    def check(self, q: Tensor) -> None:
        """Check that queries ``[B, H, Nq, D]`` are those of the layer that this was fitted to, as far as sizes say.

        Raises:
            ValueError: Heads, width or device do not fit.
        """
        if self.q_basis.shape[:2] != (q.shape[1], q.shape[3]) or self.q_basis.device != q.device:
            raise ValueError(
                f"the projection is for {self.q_basis.shape[0]} heads of width {self.q_basis.shape[1]} on "
                f"{self.q_basis.device}, the tensors have {q.shape[1]} of {q.shape[3]} on {q.device}"
            )


def fit_projection(
    q: Tensor,
    k: Tensor,
    *,
    rank: int,
    method: Method = "bilinear",
    key_mask: Tensor | None = None,
) -> Projection:
    """Fit bases to queries and keys of one layer, each head for itself, over all batch items and tokens.

    ``"bilinear"`` finds the matrix M of the given rank with the least mean of ``(q M k - q k)^2`` over all pairs of
    centred queries and keys. With their covariances ``Cq`` and ``Ck`` that is the best approximation of
    ``Cq^1/2 Ck^1/2`` (Eckart & Young 1936), whose singular vectors ``U S V`` give the bases ``Ck^1/2 V S^-1/2`` and
    ``Cq^1/2 U S^-1/2``, without the inverse of a covariance. ``"pca"`` takes the directions in which queries and keys
    together vary most, as one basis for both; it keeps what is large, not what meets.

    Deterministic: no random draw, and the signs are fixed. Computed in float64; it waits for the device, so fit outside
    of the path that has to be fast.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        rank: r, dimensions to keep, 1 to D.
        method: ``"bilinear"`` or ``"pca"``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked keys may hold anything.

    Returns:
        Bases in float32 (float64 for float64). Beyond the rank of the data they are zero.

    Raises:
        ValueError: Shapes do not fit, or rank or method is out of range.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must be [B, H, N, D] of equal B, H, D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if not 1 <= rank <= q.shape[-1]:
        raise ValueError(f"rank must be in 1..{q.shape[-1]}, got {rank}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    check_key_mask(key_mask, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        q_covariance, k_covariance = _moments(q, None)[2], _moments(k, key_mask)[2]
        q_root, k_root = _root(q_covariance), _root(k_covariance)
        left, values, right = torch.linalg.svd(q_root @ k_root)
        total = values.square().sum(dim=-1)
        if method == "bilinear":
            kept = values[:, None, :rank]
            # Directions beyond the rank of the data carry nothing: zeros instead of the inverse of rounding errors.
            real = kept > 1e-12 * values[:, None, :1]
            inverse = torch.where(real, kept, 1).rsqrt() * real
            q_basis = k_root @ right.mT[..., :rank] * inverse
            k_basis = q_root @ left[..., :rank] * inverse
        else:
            # The covariance of queries and keys together: of each about its mean, and of the two means.
            _, vectors = torch.linalg.eigh(_joint_covariance(q, k, key_mask))
            q_basis = k_basis = vectors.flip(-1)[..., :rank]
        # The basis whose sign is not defined by the data gets its largest entry positive.
        largest = q_basis.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(q_basis.gather(1, largest) < 0, -1.0, 1.0)
        q_basis, k_basis = q_basis * sign, k_basis * sign
        rest = q_root @ (q_basis @ k_basis.mT - torch.eye(q.shape[-1], dtype=q_root.dtype, device=q.device)) @ k_root
        missed = rest.square().sum(dim=(-2, -1)) / torch.where(total > 0, total, 1)
    return Projection(q_basis.to(wide), k_basis.to(wide), (1 - missed).clamp(0, 1).to(wide))


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of unmasked tokens, their mean ``[H, 1, D]`` and covariance ``[H, D, D]``, in float64."""
    tokens = x.transpose(0, 1).to(torch.float64)
    kept = tokens.new_ones(1, *tokens.shape[1:3], 1)
    if mask is not None:
        kept = mask.to(torch.float64)[None, :, :, None]
        tokens = tokens.masked_fill(~mask[None, :, :, None], 0)
    tokens, kept = tokens.flatten(1, 2), kept.flatten(1, 2)
    count = kept.sum().clamp(min=1)
    mean = tokens.sum(dim=1, keepdim=True) / count
    tokens = (tokens - mean) * kept
    return count, mean, tokens.mT @ tokens / count


def _joint_covariance(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the covariance ``[H, D, D]`` of queries and unmasked keys as one set of tokens."""
    (q_count, q_mean, q_covariance), (k_count, k_mean, k_covariance) = _moments(q, None), _moments(k, key_mask)
    q_share = q_count / (q_count + k_count)
    apart = q_mean - k_mean
    return q_share * q_covariance + (1 - q_share) * k_covariance + q_share * (1 - q_share) * apart.mT @ apart


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of covariances ``[H, D, D]``."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    return root
