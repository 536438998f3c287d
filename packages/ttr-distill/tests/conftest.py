"""Attention calls that look like those of an image model: smooth over the grid, logits of realistic spread."""

import math
from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid, softmax_attention
from torch import Tensor

HEADS, WIDTH, TEXT, ROWS, COLUMNS = 2, 16, 7, 9, 11
TOKENS = TEXT + ROWS * COLUMNS

CallMaker = Callable[..., AttentionCall]


def make_layout(text: int = TEXT, rows: int = ROWS, columns: int = COLUMNS) -> TokenLayout:
    return TokenLayout(text + rows * columns, ((0, text),), (TokenGrid(text, rows, columns),))


def smooth_tokens(
    generator: torch.Generator, batch: int, text: int, rows: int, columns: int, channels: int, noise: float
) -> Tensor:
    """Random smooth fields over the grid and independent text tokens, ``[B, N, C]``, standard deviation 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    waves = 6
    frequency = torch.rand(batch, channels, waves, 2, generator=generator) * 2 * math.pi * 1.5
    phase = torch.rand(batch, channels, waves, generator=generator) * 2 * math.pi
    angle = frequency[..., 0, None, None] * y + frequency[..., 1, None, None] * x + phase[..., None, None]
    image = (angle.cos().sum(2) * math.sqrt(2 / waves)).flatten(2).transpose(1, 2)
    image = image + noise * torch.randn(image.shape, generator=generator)
    words = torch.randn(batch, text, channels, generator=generator)
    return torch.cat([words, image], dim=1)


@pytest.fixture
def make_call() -> CallMaker:
    """Calls of one imagined layer: projections fixed by the layer, tokens drawn by ``seed``."""

    def make(
        seed: int = 0,
        *,
        layer: LayerKey | None = LayerKey("single", 0),  # noqa: B008 - a frozen value
        step: StepContext | None = StepContext(0.6, 3.0),  # noqa: B008 - a frozen value
        batch: int = 1,
        heads: int = HEADS,
        width: int = WIDTH,
        text: int = TEXT,
        rows: int = ROWS,
        columns: int = COLUMNS,
        logit_std: float = 2.0,
        noise: float = 0.2,
        dtype: torch.dtype = torch.float32,
        key_mask: Tensor | None = None,
    ) -> AttentionCall:
        index = 0 if layer is None else layer.index
        fixed = torch.Generator().manual_seed(1000 + index)
        channels = 8
        weights = [torch.randn(heads, channels, width, generator=fixed) / math.sqrt(channels) for _ in range(3)]
        tokens = smooth_tokens(torch.Generator().manual_seed(seed), batch, text, rows, columns, channels, noise)
        q, k, v = (torch.einsum("bnc,hcd->bhnd", tokens, weight) for weight in weights)
        logits = q @ k.transpose(-1, -2) / math.sqrt(width)
        q = q * (logit_std / logits.std())
        return AttentionCall(
            q=q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            key_mask=key_mask,
            layer=layer,
            step=step,
            layout=make_layout(text, rows, columns),
        )

    return make


@pytest.fixture
def native() -> Callable[[AttentionCall], Tensor]:
    def answer(call: AttentionCall) -> Tensor:
        return softmax_attention(call.q, call.k, call.v, scale=call.scale, key_mask=call.key_mask).out

    return answer
