"""The learned feature map of kernel regression: small networks that turn queries and keys into positive features."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def validate_feature_dim(feature_dim: int) -> int:
    """Check the number of features: a positive multiple of 256.

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


class KernelFeatureMap(nn.Module):
    """``phi(x) = normalise(elu(net(x)) + 1)`` with one three-layer network for queries and one for keys.

    The networks are shared by all heads. ELU plus one is the positive feature of Katharopoulos et al. 2020
    ("Transformers are RNNs", eq. 7), here behind a learned network.

    Args:
        head_width: Width of a head, D.
        feature_dim: Number of features, F; see ``validate_feature_dim``.
        split_qk: Two networks; otherwise one serves queries and keys.
        qk_norm: Divide the features of a token by their L2 norm.
        eps: Added to that norm.
        dtype: Compute in this dtype; in that of the weights if ``None``. The weights themselves are never cast.
        generator: Draws the initial weights.
    """

    def __init__(
        self,
        head_width: int,
        feature_dim: int,
        *,
        split_qk: bool = True,
        qk_norm: bool = True,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim = validate_feature_dim(feature_dim)
        self.hidden = max(head_width, 2 * feature_dim)
        self.qk_norm = qk_norm
        self.eps = eps
        self.dtype = dtype
        self.phi_net_q = self._net(head_width, generator)
        self.phi_net_k = self._net(head_width, generator) if split_qk else self.phi_net_q

    def query(self, q: Tensor) -> Tensor:
        """Map queries ``[..., D]`` to features ``[..., F]``."""
        return self._features(self.phi_net_q, q)

    def key(self, k: Tensor) -> Tensor:
        """Map keys ``[..., D]`` to features ``[..., F]``."""
        return self._features(self.phi_net_k, k)

    def _net(self, head_width: int, generator: torch.Generator | None) -> nn.Sequential:
        return nn.Sequential(
            seeded_linear(head_width, self.hidden, generator),
            nn.SiLU(),
            seeded_linear(self.hidden, self.hidden, generator),
            nn.SiLU(),
            seeded_linear(self.hidden, self.feature_dim, generator),
        )

    def _features(self, net: nn.Sequential, x: Tensor) -> Tensor:
        for layer in net:
            if isinstance(layer, nn.Linear):
                dtype = self.dtype or layer.weight.dtype
                x = functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
            else:
                x = layer(x)
        features = functional.elu(x) + 1.0
        if self.qk_norm:
            features = features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + self.eps)
        return features
