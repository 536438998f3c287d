"""What a host with attention functions of its own offers to the dispatcher. The host itself lives in ``adapters``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from attn_dispatch.native.bindings import DenseKernel


class HostAttention(Protocol):
    """A host's own attention function for one backend."""

    @property
    def masks(self) -> bool:
        """Whether it takes a mask."""
        ...

    @property
    def min_tokens(self) -> int:
        """Fewest queries for which it runs the backend it is named after, and not something else in silence."""
        ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        skip_output_reshape: bool,
        options: Mapping[str, object],
    ) -> Tensor:
        """Attend.

        Args:
            q: ``[B, H, Nq, D]``.
            k: ``[B, Hk, Nk, D]``; ``Hk`` divides ``H``.
            v: ``[B, Hk, Nk, Dv]``.
            mask: Broadcastable to ``[B, H, Nq, Nk]``; bool (True = keep) or float (added to the scaled scores).
            scale: Score scale; ``1 / sqrt(D)`` if ``None``.
            skip_output_reshape: Answer with ``[B, H, Nq, Dv]`` instead of ``[B, Nq, H * Dv]``.
            options: Further keywords of the host's caller, handed on unread.
        """
        ...


class Host(Protocol):
    """A host that may be present in this process."""

    @property
    def name(self) -> str:
        """Name for labels."""
        ...

    def device(self) -> torch.device | None:
        """Return the device that the host runs models on; ``None`` if the host is not present."""
        ...

    def attention(self, key: str) -> HostAttention | None:
        """Return the host's own function for a candidate of the catalog; ``None`` if it has none or is not present."""
        ...

    def guest(self, kernel: DenseKernel) -> HostAttention | None:
        """Give a kernel the host's signature, so that what the host hooks into attention reaches it too.

        Returns ``None`` if the host is not present.
        """
        ...
