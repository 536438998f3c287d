"""Which feature maps there are, by name: an object that a caller extends and hands on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from ttr_distill.student.exp_feature_map import ExpFeatureMap
from ttr_distill.student.feature_map import KernelFeatureMap, MapDtype, StudentFeatureMap, TrainingDtype


@dataclass(frozen=True)
class MapRequest:
    """What a student asks of its feature map.

    Attributes:
        heads: Number of heads, H.
        width: Width of a head, D.
        feature_dim: Number of features, F.
        hidden: Width of a hidden layer, where the map has one to choose.
        qk_norm: Divide the features of a token by their L2 norm, where the map knows how.
        eps: Added to that norm.
        map_dtype: Dtype of the products that serve.
        training_dtype: Dtype of the products that learn.
        workspace_bytes: What the map may hold at once.
        generator: Draws the initial weights.
    """

    heads: int
    width: int
    feature_dim: int
    hidden: int = 0
    qk_norm: bool = False
    eps: float = 1e-6
    map_dtype: MapDtype = "float32"
    training_dtype: TrainingDtype = "auto"
    workspace_bytes: int = 512 * 2**20
    generator: torch.Generator | None = None


MapMaker = Callable[[MapRequest], StudentFeatureMap]


def make_mlp(request: MapRequest) -> KernelFeatureMap:
    """Make the three-layer network of the ``hkr`` student, shared by all heads."""
    return KernelFeatureMap(
        request.width,
        request.feature_dim,
        qk_norm=request.qk_norm,
        eps=request.eps,
        dtype=None if request.map_dtype == "float32" else getattr(torch, request.map_dtype),
        training_dtype=request.training_dtype,
        workspace_bytes=request.workspace_bytes,
        generator=request.generator,
    )


def make_exp(request: MapRequest) -> ExpFeatureMap:
    """Make the exponentials with weights per head."""
    return ExpFeatureMap(
        request.heads, request.width, request.feature_dim, hidden=request.hidden, generator=request.generator
    )


@dataclass(frozen=True)
class FeatureMaps:
    """Feature maps by name.

    Attributes:
        makers: Name to maker; ``"mlp"`` and ``"exp"`` unless told otherwise.
    """

    makers: Mapping[str, MapMaker] = field(default_factory=lambda: MappingProxyType({"mlp": make_mlp, "exp": make_exp}))

    def with_map(self, name: str, maker: MapMaker) -> "FeatureMaps":
        """Return these maps and one more.

        Args:
            name: What ``JointConfig.feature_map`` calls it; checkpoints name it too, so loading needs it again.
            maker: Makes the map of one layer.

        Raises:
            ValueError: The name is taken.
        """
        if name in self.makers:
            raise ValueError(f"there is a feature map {name!r} already; they are {', '.join(sorted(self.makers))}")
        return FeatureMaps(MappingProxyType({**self.makers, name: maker}))

    def make(self, name: str, request: MapRequest) -> StudentFeatureMap:
        """Make a map.

        Raises:
            ValueError: Unknown name; the message lists the known ones.
        """
        if name not in self.makers:
            known = ", ".join(sorted(self.makers))
            raise ValueError(f"feature map must be one of {known}, got {name!r}; add it with FeatureMaps.with_map")
        return self.makers[name](request)
