"""What every student of an attention layer is."""

from abc import abstractmethod
from typing import Protocol, Self

import torch
from attn_dispatch import AttentionCall, TokenLayout
from attn_kernels import strided_landmarks
from torch import Tensor, nn


class StudentAttention(nn.Module):
    """Answers the self-attention of one layer, approximately and at less cost.

    Weights stay float32; the output has the dtype of ``v``. A student reads where text and image tokens lie from the
    call's ``TokenLayout`` and refuses calls that it would have to guess about.

    Args:
        heads: Number of heads, H.
        width: Width of a head, D.

    Attributes:
        heads: Number of heads.
        width: Width of a head.
        training_free: Whether the student is of use before any update.
        revision: Rises with every ``train()``, so that whoever keeps a copy of the weights can tell that it is old;
            optimisers that step in one fused kernel leave no other trace.
    """

    training_free: bool = False

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        if heads < 1 or width < 1:
            raise ValueError(f"a student needs at least one head of width one, got heads={heads}, width={width}")
        self.heads = heads
        self.width = width
        self.revision = 0

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; an update has to begin with ``train()``."""
        self.revision += mode
        return super().train(mode)

    @abstractmethod
    def forward(
        self, call: AttentionCall, *, query_positions: Tensor | None = None, selection: Tensor | None = None
    ) -> Tensor:
        """Answer a call.

        Args:
            call: q ``[B, H, Nq, D]``, k ``[B, H, Nk, D]``, v ``[B, H, Nk, Dv]``, after RoPE, with a layout.
            query_positions: ``[Nq]`` int64, which tokens the queries are, when they are only some of them
                (training); ``None`` means all, in order.
            selection: What ``select`` answered for the whole call; ``None`` computes it from this call's queries,
                which then have to be all of them.

        Returns:
            ``[B, H, Nq, Dv]`` in the dtype of v.
        """

    def select(self, call: AttentionCall) -> Tensor | None:
        """Choose what the answer to a whole call depends on beyond single queries; ``None`` if there is no such thing.

        Training keeps it beside the sampled queries of the call.
        """
        del call
        return None

    @abstractmethod
    def flops(self, layout: TokenLayout, batch: int, heads: int, width: int) -> float:
        """Count the floating-point operations of one answer (a multiply-add is two)."""

    def untrained(self) -> dict[str, Tensor] | None:
        """Return the state dict of the training-free form; ``None`` if the student has none."""
        return None

    def refuses(self, call: AttentionCall) -> str | None:
        """Say in one sentence why this student cannot answer the call; ``None`` if it can."""
        layout = call.layout
        if layout is None:
            return "the host does not say where text and image tokens lie"
        if call.attn_bias is not None:
            return "students take no attention bias"
        if call.q.shape[2] != call.k.shape[2]:
            return "students answer self-attention only"
        return self._refuses_shape(call, layout)

    def _refuses_shape(self, call: AttentionCall, layout: TokenLayout) -> str | None:
        if not layout.grids:
            return "the layout has no image grid"
        if layout.length != call.k.shape[2]:
            return f"the layout describes {layout.length} tokens, the call has {call.k.shape[2]}"
        if tuple(call.k.shape[1::2]) != (self.heads, self.width):
            made, got = f"{self.heads} heads of width {self.width}", f"{call.k.shape[1]} of {call.k.shape[3]}"
            return f"the student was made for {made}, the call has {got}"
        device = next(self.parameters()).device
        if call.k.device != device:
            return f"the students are on {device}, the call on {call.k.device}; move the bank with bank.to"
        return None


def required_layout(call: AttentionCall) -> TokenLayout:
    """Return the call's layout.

    Raises:
        ValueError: It has none.
    """
    if call.layout is None:
        raise ValueError("a student needs the call's layout; ask refuses(call) first")
    return call.layout


class LandmarkSettings(Protocol):
    """How many image tokens are landmarks."""

    @property
    def landmark_fraction(self) -> float:
        """Share of them, 0 to 1."""
        ...

    @property
    def landmark_minimum(self) -> int:
        """At least so many."""
        ...

    @property
    def landmark_maximum(self) -> int:
        """At most so many; 0 = no limit."""
        ...


def landmarks_of(layout: TokenLayout, settings: LandmarkSettings) -> Tensor:
    """Return all text and reference tokens of a layout and image tokens at even distances, ``[M]`` int64, sorted."""
    exact = [*layout.text, *((grid.start, grid.stop) for grid in layout.references)]
    return strided_landmarks(
        layout.length,
        exact,
        fraction=settings.landmark_fraction,
        minimum=settings.landmark_minimum,
        maximum=settings.landmark_maximum,
    )


def logit(probability: float) -> float:
    """Map a probability to logit space; at or beyond 0 and 1 the answer is -5 and 5."""
    if probability <= 0.0:
        return -5.0
    if probability >= 1.0:
        return 5.0
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
