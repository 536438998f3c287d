"""Feature maps of students: what turns queries and keys into non-negative features, as modules."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from attn_kernels import MlpFeatureMap, Partial, feature_map_attention, kernel_regression, merge_partials
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ttr_distill.student.feature_map_gradient import ROW_VALUES, mlp_features, mlp_features_alone, native_products
from ttr_distill.student.key_draw import KeyDraw, KeyParts, weighted

MapDtype = Literal["float32", "bfloat16", "float16"]
"""Dtype of the matrix products in a feature map that serves."""
TrainingDtype = Literal["auto", "float32", "bfloat16"]
"""Dtype of the matrix products in a feature map that learns; ``auto`` = bfloat16 where the device multiplies it."""
_HALF = (torch.bfloat16, torch.float16)


def validate_feature_dim(feature_dim: int) -> int:
    """Check the number of features of ``KernelFeatureMap``: a positive multiple of 256.

    Raises:
        ValueError: It is not.
    """
    if feature_dim < 256 or feature_dim % 256:
        raise ValueError(f"feature_dim must be a multiple of 256 and at least 256, got {feature_dim}")
    return feature_dim


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Make a ``Linear`` with torch's default distribution, drawn from ``generator`` instead of the global one."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


class StudentFeatureMap(nn.Module):
    """A learned pair of feature maps, one for queries and one for keys.

    A custom map implements ``query``, ``key`` and ``flops_per_token``; ``attend`` may be left as it is, and then holds
    the features of all tokens in memory.

    Args:
        features: Number of features, F.

    Attributes:
        half_products: Whether a map whose weights are cast to half precision keeps features and sums over tokens in the
            dtype of float32 queries and keys, so that only its products lose precision.
        key_draw: While an update runs, which keys teach it; ``None`` = all. A map may leave it unread.
    """

    half_products: bool = False
    key_draw: KeyDraw | None = None

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    @abstractmethod
    def query(self, q: Tensor) -> Tensor:
        """Map queries ``[B, H, N, D]`` to features ``[B, H, N, F]``, none negative."""

    @abstractmethod
    def key(self, k: Tensor) -> Tensor:
        """Map keys ``[B, H, N, D]`` to features ``[B, H, N, F]``, none negative."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Count the operations of one side for one token of one head (a multiply-add is two)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, eps: float) -> Partial:
        """Average the values with weights ``query(q) . key(k)``.

        Args:
            q: ``[B, H, Nq, D]``, after RoPE.
            k: ``[B, H, Nk, D]``, after RoPE.
            v: ``[B, H, Nk, Dv]``.
            key_mask: ``[B, Nk]`` bool, True = keep.
            eps: Smallest denominator.

        Returns:
            ``Partial`` whose ``lse`` is the logarithm of the denominator; differentiable in the weights.
        """
        return kernel_regression(self.query(q), self.key(k), v, key_mask=key_mask, eps=eps)

    def learns(self) -> bool:
        """Tell whether an answer now would be differentiated with respect to the weights."""
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())


@contextmanager
def drawing_keys(student: nn.Module, draw: KeyDraw | None) -> Iterator[None]:
    """Within this context the feature maps of a student learn from the keys that are drawn."""
    maps = [module for module in student.modules() if isinstance(module, StudentFeatureMap)]
    for one in maps:
        one.key_draw = draw
    try:
        yield
    finally:
        for one in maps:
            one.key_draw = None


class KernelFeatureMap(StudentFeatureMap):
    """``phi(x) = normalise(elu(net(x)) + 1)`` with one network for queries and one for keys, shared by all heads.

    ELU plus one is the positive feature of Katharopoulos et al. 2020 ("Transformers are RNNs", eq. 7), here behind a
    learned network of two or three layers with SiLU between them.

    Args:
        head_width: Width of a head, D.
        feature_dim: Number of features, F; see ``validate_feature_dim``.
        layers: 3, with ``max(D, 2 F)`` hidden values, or 2, with ``max(D, F)``.
        split_qk: Two networks; otherwise one serves queries and keys.
        qk_norm: Divide the features of a token by their L2 norm.
        eps: Added to that norm.
        query_norm: Whether ``attend`` needs the norm of a query's features for the ``lse`` that it answers. It cancels
            in ``out``, so that a caller who does not read the ``lse`` saves it.
        dtype: Dtype of the products where no gradient is wanted; that of the weights if ``None``. The weights
            themselves are never cast.
        training_dtype: Dtype of the products in ``train()`` mode with a gradient. Weights, features, sums over tokens
            and gradients stay float32. Float64 inputs are computed in float64.
        workspace_bytes: What the networks may hold at once; a larger call is computed in parts, and in training each
            part once more in the backward pass.
        generator: Draws the initial weights.
    """

    def __init__(
        self,
        head_width: int,
        feature_dim: int,
        *,
        layers: Literal[2, 3] = 3,
        split_qk: bool = True,
        qk_norm: bool = True,
        eps: float = 1e-6,
        query_norm: bool = True,
        dtype: torch.dtype | None = None,
        training_dtype: TrainingDtype = "float32",
        workspace_bytes: int = 512 * 2**20,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(validate_feature_dim(feature_dim))
        self.layers = layers
        self.half_products = layers == 3
        self.hidden = max(head_width, (layers - 1) * feature_dim)
        self.head_width = head_width
        self.qk_norm = qk_norm
        self.eps = eps
        self.query_norm = query_norm
        self.dtype = dtype
        self.training_dtype = training_dtype
        self.workspace_bytes = workspace_bytes
        self.phi_net_q = self._net(head_width, generator)
        self.phi_net_k = self._net(head_width, generator) if split_qk else self.phi_net_q

    def query(self, q: Tensor) -> Tensor:
        """Map queries ``[..., D]`` to features ``[..., F]``."""
        return self._features(self.phi_net_q, q)

    def key(self, k: Tensor) -> Tensor:
        """Map keys ``[..., D]`` to features ``[..., F]``."""
        return self._features(self.phi_net_k, k)

    def flops_per_token(self) -> float:
        """Count the operations of one network."""
        middle = (self.layers - 2) * self.hidden * self.hidden
        return 2.0 * (self.head_width * self.hidden + middle + self.hidden * self.features)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, eps: float) -> Partial:
        """Average the values with weights ``query(q) . key(k)`` in memory bounded by ``workspace_bytes``.

        The shapes are q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]``, v ``[B, H, Nk, Dv]`` and key_mask ``[B, Nk]``; see
        ``StudentFeatureMap.attend``.
        """
        draws = self.layers == 3 and self.training and self.learns() and k.dtype is self.phi_net_k[0].weight.dtype
        draw = self.key_draw if draws else None
        keys = None if draw is None else draw.split(k.shape[2], k.device)
        rest = 0 if keys is None else keys.rest.numel()
        taught, features = q.shape[2] + k.shape[2] - rest, self.features
        size = 4 * q.shape[0] * (taught * (ROW_VALUES * self.hidden + 3 * features) + 2 * rest * features)
        if self.learns() and size * q.shape[1] <= self.workspace_bytes:
            if keys is not None:
                return self._attend_drawn(q, k, v, key_mask, eps, keys)
            return kernel_regression(self.query(q), self.key(k), v, key_mask=key_mask, eps=eps)
        if self.layers == 3:
            return self._attend_chunked(q, k, v, key_mask, eps, keys)
        parts = [self._part(q, k, v, key_mask, eps, heads) for heads in self._head_groups(size, q.shape[1])]
        return Partial(torch.cat([part.out for part in parts], dim=1), torch.cat([part.lse for part in parts], dim=1))

    def _attend_drawn(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, eps: float, keys: KeyParts
    ) -> Partial:
        net, products = tuple(self.phi_net_k.parameters()), self._training_dtype(k)
        x = k.index_select(2, keys.rest)
        constant = mlp_features_alone(x, net, normalise=self.qk_norm, norm_eps=self.eps, products=products)
        drawn = weighted(self.key(k.index_select(2, keys.drawn)), keys.weight)
        queries, parts = self.query(q), []
        for features, index in ((drawn, keys.drawn), (constant, keys.rest)):
            mask = None if key_mask is None else key_mask.index_select(1, index)
            parts.append(kernel_regression(queries, features, v.index_select(2, index), key_mask=mask, eps=eps))
        return merge_partials(*parts)

    def _attend_chunked(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, eps: float, keys: KeyParts | None
    ) -> Partial:
        products = self._training_dtype(q) if self.learns() and self.training else self._serving_dtype(q)
        answer = partial(feature_map_attention, eps=eps, map_dtype=products)
        map_q = self._as_map(self.phi_net_q, self.query_norm)
        if keys is None:
            return answer(q, k, v, map_q, self._as_map(self.phi_net_k), key_mask=key_mask)
        parts = []
        for index, weight in ((keys.drawn, keys.weight), (keys.rest, 0.0)):
            map_k = self._as_map(self.phi_net_k, weight=weight)
            mask = None if key_mask is None else key_mask.index_select(1, index)
            parts.append(answer(q, k.index_select(2, index), v.index_select(2, index), map_q, map_k, key_mask=mask))
        return merge_partials(*parts)

    def _part(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, eps: float, heads: slice) -> Partial:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
            return kernel_regression(self.query(q), self.key(k), v, key_mask=key_mask, eps=eps)

        call = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False) if self.learns() else run
        return call(q[:, heads], k[:, heads], v[:, heads])

    def _head_groups(self, size: int, heads: int) -> Iterator[slice]:
        group = max(1, self.workspace_bytes // max(1, size))
        for first in range(0, heads, group):
            yield slice(first, min(heads, first + group))

    def _as_map(self, net: nn.Sequential, norm: bool = True, weight: float = 1.0) -> MlpFeatureMap:
        w1, b1, w2, b2, w3, b3 = (weighted(parameter, weight) for parameter in net.parameters())
        return MlpFeatureMap(w1, b1, w2, b2, w3, b3, self.qk_norm and norm, self.eps)

    def _serving_dtype(self, x: Tensor) -> torch.dtype | None:
        own = next(self.parameters()).dtype
        return None if x.dtype is torch.float64 else self.dtype or (own if own in _HALF else None)

    def _net(self, head_width: int, generator: torch.Generator | None) -> nn.Sequential:
        widths = [head_width, *[self.hidden] * (self.layers - 1), self.features]
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            modules += [seeded_linear(inputs, outputs, generator), nn.SiLU()]
        return nn.Sequential(*modules[:-1])

    def _features(self, net: nn.Sequential, x: Tensor) -> Tensor:
        own = next(net.parameters()).dtype
        if self.learns() and self.layers == 3 and x.dtype in (torch.float32, torch.float64) and x.dtype is own:
            products = self._training_dtype(x) if self.training else self._serving_dtype(x)
            weights = tuple(net.parameters())
            return mlp_features(x, weights, normalise=self.qk_norm, norm_eps=self.eps, products=products)
        dtype = self.dtype or own
        for layer in net:
            if isinstance(layer, nn.Linear):
                x = functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
            else:
                x = layer(x)
        features = functional.elu(x) + 1.0
        if self.qk_norm:
            features = features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + self.eps)
        return features

    def _training_dtype(self, x: Tensor) -> torch.dtype | None:
        if x.dtype is torch.float64 or self.training_dtype == "float32":
            return None
        return native_products(x.device) if self.training_dtype == "auto" else torch.bfloat16
