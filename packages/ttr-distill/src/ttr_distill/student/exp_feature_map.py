"""A feature map with weights of its own for every head and exponentials as features."""

import math

import torch
from attn_kernels import HedgehogFeatureMap, Partial, feature_map_attention
from torch import Tensor, nn
from torch.nn import functional

from ttr_distill.student.feature_map import StudentFeatureMap

_HALF = (torch.bfloat16, torch.float16)


class ExpFeatureMap(StudentFeatureMap):
    """``phi(x) = [exp(y), exp(-y)]`` with ``y`` one linear layer per head, or two with a SiLU between them.

    After Zhang et al. 2024 ("The Hedgehog & the Porcupine", eq. 6). Queries and keys have weights of their own that
    start equal: ``phi(q) . phi(k) = 2 sum cosh(w (q + k) + 2 b)`` is then larger the better q and k agree.

    Args:
        heads: Number of heads, H.
        head_width: Width of a head, D.
        feature_dim: Number of features, F; even.
        hidden: Width of the first layer; 0 = there is none.
        generator: Draws the initial weights.
    """

    def __init__(
        self,
        heads: int,
        head_width: int,
        feature_dim: int,
        *,
        hidden: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(feature_dim)
        if feature_dim < 2 or feature_dim % 2 or hidden < 0:
            raise ValueError(f"feature_dim must be even and hidden not negative, got {feature_dim} and {hidden}")
        self.query_side = _Side(heads, head_width, feature_dim // 2, hidden, generator)
        self.key_side = _Side(heads, head_width, feature_dim // 2, hidden, generator)
        self.key_side.load_state_dict(self.query_side.state_dict())

    def query(self, q: Tensor) -> Tensor:
        """Map queries ``[B, H, N, D]`` to features ``[B, H, N, F]``; not protected from overflow, ``attend`` is."""
        return self.query_side.features(q)

    def key(self, k: Tensor) -> Tensor:
        """Map keys ``[B, H, N, D]`` to features ``[B, H, N, F]``; not protected from overflow, ``attend`` is."""
        return self.key_side.features(k)

    def flops_per_token(self) -> float:
        """Count the operations of one side."""
        return self.query_side.flops_per_token()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, eps: float) -> Partial:
        """Average the values with weights ``query(q) . key(k)``; no exponent is too large, memory is bounded.

        The shapes are q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]``, v ``[B, H, Nk, Dv]`` and key_mask ``[B, Nk]``; see
        ``StudentFeatureMap.attend``.
        """
        own = next(self.parameters()).dtype
        return feature_map_attention(
            self.query_side.inner(q),
            self.key_side.inner(k),
            v,
            self.query_side.outer(),
            self.key_side.outer(),
            key_mask=key_mask,
            eps=eps,
            map_dtype=own if own in _HALF and q.dtype is not torch.float64 else None,
        )


class _Side(nn.Module):
    """The map of queries or of keys.

    Parameters: ``first [H, hidden, D]`` and ``first_bias [H, 1, hidden]`` where there is a first layer; ``weight
    [H, F / 2, hidden or D]`` and ``bias [H, F / 2]``.
    """

    def __init__(
        self, heads: int, head_width: int, outputs: int, hidden: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()

        def drawn(inputs: int, *shape: int) -> nn.Parameter:
            bound = 1.0 / math.sqrt(inputs)
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

        self.first = drawn(head_width, heads, hidden, head_width) if hidden else None
        self.first_bias = drawn(head_width, heads, 1, hidden) if hidden else None
        self.weight = drawn(hidden or head_width, heads, outputs, hidden or head_width)
        self.bias = nn.Parameter(torch.zeros(heads, outputs))

    def inner(self, x: Tensor) -> Tensor:
        """Apply the first layer to ``[B, H, N, D]``: ``[B, H, N, hidden]`` in the dtype of x, or x itself."""
        if self.first is None or self.first_bias is None:
            return x
        wide = torch.promote_types(x.dtype, self.first.dtype)
        hidden = torch.matmul(x.to(wide), self.first.transpose(-1, -2).to(wide)) + self.first_bias.to(wide)
        return functional.silu(hidden).to(x.dtype)

    def outer(self) -> HedgehogFeatureMap:
        """Return the last layer with its exponentials."""
        return HedgehogFeatureMap(self.weight, self.bias, "exp")

    def features(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.inner(x), self.weight.transpose(-1, -2).to(x.dtype)) + self.bias.unsqueeze(1).to(x.dtype)
        return torch.cat([y.exp(), (-y).exp()], dim=-1)

    def flops_per_token(self) -> float:
        first = 0 if self.first is None else self.first.shape[1] * self.first.shape[2]
        return 2.0 * (first + self.weight.shape[1] * self.weight.shape[2])
