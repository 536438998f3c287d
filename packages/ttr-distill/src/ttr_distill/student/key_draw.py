"""Which keys of a call teach a feature map in an update: all, or some drawn at random."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class KeyParts(NamedTuple):
    """The keys of a call in two parts.

    Attributes:
        drawn: ``[n]`` int64, positions of the keys that teach.
        rest: ``[Nk - n]`` int64, all others.
        weight: What the gradient of a drawn key counts, ``Nk / n``.
    """

    drawn: Tensor
    rest: Tensor
    weight: float


@dataclass(frozen=True)
class KeyDraw:
    """Draws the keys through which an update's gradient reaches the weights of a feature map.

    The answer, its loss and the gradient of the queries' side take all keys. The gradient of the keys' side is a sum
    over the keys; it is estimated from ``count`` of them, drawn without replacement, each weighted so that the expected
    gradient is that of all keys (the Horvitz-Thompson estimate of a sum, 1952). The backward pass of the keys' network,
    two thirds of an update, shrinks by that factor.

    Attributes:
        count: Token positions that teach, the same for every batch row and head.
        generator: Draws them, on the CPU.
    """

    count: int
    generator: torch.Generator

    def split(self, keys: int, device: torch.device) -> KeyParts | None:
        """Draw for a call with so many keys; ``None`` where all of them teach."""
        if keys <= self.count:
            return None
        order = torch.randperm(keys, generator=self.generator).to(device)
        return KeyParts(order[: self.count], order[self.count :], keys / self.count)


def weighted(x: Tensor, weight: float) -> Tensor:
    """Return x of any shape ``[...]`` itself; gradients flow through it multiplied by ``weight``, none if that is 0."""
    if weight == 1.0:
        return x
    return torch.lerp(x.detach(), x, weight) if weight else x.detach()
