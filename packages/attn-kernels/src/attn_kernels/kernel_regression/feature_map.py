"""Feature maps as plain weights: what turns queries and keys into non-negative features."""

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class MlpFeatureMap:
    """A three-layer network shared by all heads: ``elu(w3 silu(w2 silu(w1 x + b1) + b2) + b3) + 1``.

    ELU plus one is the positive feature of Katharopoulos et al. 2020 ("Transformers are RNNs", eq. 7), here behind a
    learned network. Weights lie as in ``torch.nn.Linear``, so those of a module can be passed as they are.

    Attributes:
        w1: ``[hidden, D]``.
        b1: ``[hidden]``.
        w2: ``[hidden, hidden]``.
        b2: ``[hidden]``.
        w3: ``[F, hidden]``.
        b3: ``[F]``.
        normalise: Divide the features of a token by their L2 norm.
        norm_eps: Added to that norm.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    normalise: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        hidden, count = self.w1.shape[0], self.w3.shape[0]
        expected = {
            "w1": (hidden, self.w1.shape[-1]),
            "b1": (hidden,),
            "w2": (hidden, hidden),
            "b2": (hidden,),
            "w3": (count, hidden),
            "b3": (count,),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {tuple(getattr(self, name).shape)}")
        if self.norm_eps < 0.0:
            raise ValueError(f"norm_eps must not be negative, got {self.norm_eps}")

    @property
    def width(self) -> int:
        """Width of the inputs, D."""
        return self.w1.shape[1]

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return self.w1.shape[0]

    @property
    def features(self) -> int:
        """Number of features, F."""
        return self.w3.shape[0]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All tensors of the map."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name[0] in "wb")

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """Cast or move all weights; no copy where nothing changes. Done once, it saves a cast in every call."""
        return replace(self, **{name: getattr(self, name).to(target) for name in ("w1", "b1", "w2", "b2", "w3", "b3")})


@dataclass(frozen=True, eq=False)
class HedgehogFeatureMap:
    """One linear layer per head with both signs of its output in an exponential.

    ``y = weight x + bias`` gives the 2 G features ``[exp(y), exp(-y)]``, or ``[softmax(y), softmax(-y)]`` with
    each half normalised for itself (Zhang et al. 2024, "The Hedgehog & the Porcupine", eq. 6 and section 4).

    Attributes:
        weight: ``[H, G, D]``.
        bias: ``[H, G]`` or ``None``.
        kind: ``"exp"`` or ``"softmax"``.
    """

    weight: Tensor
    bias: Tensor | None = None
    kind: Literal["exp", "softmax"] = "softmax"

    def __post_init__(self) -> None:
        if self.weight.ndim != 3:
            raise ValueError(f"weight must be [H, G, D], got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:2]:
            raise ValueError(f"bias must be [H, G] = {tuple(self.weight.shape[:2])}, got {tuple(self.bias.shape)}")
        if self.kind not in ("exp", "softmax"):
            raise ValueError(f"kind must be 'exp' or 'softmax', got {self.kind!r}")

    @property
    def width(self) -> int:
        """Width of the inputs, D."""
        return self.weight.shape[2]

    @property
    def features(self) -> int:
        """Number of features, F = 2 G."""
        return 2 * self.weight.shape[1]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All tensors of the map."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """Cast or move all weights; no copy where nothing changes. Done once, it saves a cast in every call."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))


FeatureMap = MlpFeatureMap | HedgehogFeatureMap


def check_map(name: str, feature_map: FeatureMap, x: Tensor) -> None:
    """Check that a feature map fits queries or keys ``x`` ``[B, H, N, D]``.

    Raises:
        ValueError: Width, heads, dtype or device do not fit.
    """
    if feature_map.width != x.shape[-1]:
        raise ValueError(f"{name} takes head width {feature_map.width}, the tensors have {x.shape[-1]}")
    if isinstance(feature_map, HedgehogFeatureMap) and feature_map.weight.shape[0] != x.shape[1]:
        raise ValueError(f"{name} has weights of {feature_map.weight.shape[0]} heads, the tensors have {x.shape[1]}")
    for tensor in feature_map.weights:
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, the tensors are on {x.device}; move it with .to(device)")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must hold floating-point weights, got {tensor.dtype}")


def exponents(feature_map: HedgehogFeatureMap, x: Tensor, map_dtype: torch.dtype | None) -> Tensor:
    """Return ``[y, -y]`` with ``y = weight x + bias``.

    Args:
        feature_map: The map.
        x: ``[B, H, N, D]``.
        map_dtype: Dtype of the product; that of ``x`` if ``None``.

    Returns:
        ``[B, H, N, F]`` in the dtype of ``x``.
    """
    inner = x.to(map_dtype or x.dtype)
    y = inner @ feature_map.weight.to(inner.dtype).transpose(-1, -2)
    if feature_map.bias is not None:
        y = y + feature_map.bias.to(inner.dtype).unsqueeze(-2)
    return torch.cat([y, -y], dim=-1).to(x.dtype)


def map_features(
    feature_map: FeatureMap,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    map_dtype: torch.dtype | None = None,
) -> Tensor:
    """Evaluate a feature map.

    Args:
        feature_map: The map.
        x: ``[B, H, N, D]`` in float32 or float64.
        shift: ``[B, H, N, F]`` or broadcastable, subtracted from the exponents of an ``"exp"`` map.
        map_dtype: Dtype of the linear layers and of what lies between them; that of ``x`` if ``None``.

    Returns:
        ``[B, H, N, F]`` in the dtype of ``x``; an ``"exp"`` map's features are divided by ``exp(shift)``.
    """
    if isinstance(feature_map, HedgehogFeatureMap):
        y = exponents(feature_map, x, map_dtype)
        if feature_map.kind == "softmax":
            return torch.cat([half.softmax(dim=-1) for half in y.chunk(2, dim=-1)], dim=-1)
        return (y if shift is None else y - shift).exp()
    inner = x.to(map_dtype or x.dtype)
    w1, b1, w2, b2, w3, b3 = (tensor.to(inner.dtype) for tensor in feature_map.weights)
    inner = F.silu(F.linear(F.silu(F.linear(inner, w1, b1)), w2, b2))
    features = F.elu(F.linear(inner, w3, b3).to(x.dtype)) + 1.0
    if not feature_map.normalise:
        return features
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / (norm + feature_map.norm_eps)
