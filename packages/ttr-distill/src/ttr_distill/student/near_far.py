"""The ``near_far`` student: near-far attention, of use untrained, with two learned scalars per head."""

import torch
from attn_dispatch import AttentionCall, TokenLayout
from attn_kernels import NearFarConfig, NearFarCorrections, near_far_attention, near_far_keys, select_tiles
from torch import Tensor, nn

from ttr_distill.student.attention import StudentAttention, required_layout


class NearFarStudent(StudentAttention):
    """Exact near tiles, chosen far tiles, text and references; pooled tiles for the rest; one softmax.

    The scores of pooled tiles become ``temperature * score + bias + log n`` with one temperature and one bias per
    head. They start at 1 and 0, which is the training-free operator.

    Args:
        config: Settings of the operator.
        heads: Number of heads, H.
        width: Width of a head, D.
    """

    training_free = True

    def __init__(self, config: NearFarConfig, heads: int, width: int) -> None:
        super().__init__(heads, width)
        self.config = config
        self.temperature = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))

    def forward(
        self, call: AttentionCall, *, query_positions: Tensor | None = None, selection: Tensor | None = None
    ) -> Tensor:
        """Answer a call; see ``StudentAttention``."""
        return near_far_attention(
            call.q,
            call.k,
            call.v,
            grids=required_layout(call).grids,
            config=self.config,
            scale=call.scale,
            key_mask=call.key_mask,
            corrections=NearFarCorrections(self.temperature, self.bias),
            selection=selection,
            query_positions=query_positions,
            impl="auto" if query_positions is None else "reference",
        ).out

    def select(self, call: AttentionCall) -> Tensor | None:
        """Choose the far tiles of every head and query tile, ``[B, H, T, top_k]`` int64."""
        return select_tiles(
            call.q,
            call.k,
            grids=required_layout(call).grids,
            config=self.config,
            scale=call.scale,
            key_mask=call.key_mask,
        )

    def flops(self, layout: TokenLayout, batch: int, heads: int, width: int) -> float:
        """Count operations: scores and values over the mean number of keys of a query."""
        keys = near_far_keys(layout.grids, layout.length, self.config)
        return 4.0 * batch * heads * layout.length * keys * width

    def untrained(self) -> dict[str, Tensor] | None:
        """Return temperature 1 and bias 0."""
        return {"temperature": torch.ones_like(self.temperature), "bias": torch.zeros_like(self.bias)}
