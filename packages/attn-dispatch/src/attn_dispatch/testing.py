"""Small stand-ins for tests and examples: a transformer with joint attention and a handler that remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from attn_dispatch.call import AttentionCall, NativeAttention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of ``q, k, v`` ``[B, H, N, D]`` with a mask, answered with ``[B, H, Nq, Dv]``."""


@dataclass
class RecordingHandler:
    """An ``AttentionHandler`` that answers natively and remembers every call.

    Attributes:
        calls: The calls in order; they keep their tensors alive.
        begun: How often ``begin_run`` was called.
        ended: How often ``end_run`` was called.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    begun: int = 0
    ended: int = 0

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Remember ``call`` and answer ``native(call)``, ``[B, H, Nq, Dv]``."""
        self.calls.append(call)
        return native(call)

    def begin_run(self) -> None:
        """Count."""
        self.begun += 1

    def end_run(self) -> None:
        """Count."""
        self.ended += 1


class TinyAttention(nn.Module):
    """Joint attention over text and image tokens by ``scaled_dot_product_attention``, with rotary positions.

    Args:
        heads: Number of heads.
        head_dim: Head width, a multiple of 4.
        joint: Give text tokens projections of their own.
    """

    def __init__(self, heads: int, head_dim: int, *, joint: bool) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        self.heads = heads
        self.head_dim = head_dim
        width = heads * head_dim
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.text_qkv = nn.Linear(width, 3 * width) if joint else None
        self.text_out = nn.Linear(width, width) if joint else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        angles: Tensor,
        mask: Tensor | None,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over text and image together.

        Args:
            hidden_states: ``[B, N, C]`` image tokens, or text and image tokens of a single-stream block.
            encoder_hidden_states: ``[B, T, C]`` text tokens of a double-stream block.
            angles: ``[T + N, head_dim / 2]`` rotary angles.
            mask: Attention mask as ``scaled_dot_product_attention`` takes it.
            attend: Computes the attention of ``q, k, v, mask`` ``[B, H, N, D]``; ``scaled_dot_product_attention`` if
                ``None``.

        Returns:
            Image and text parts; the text part is empty in a single-stream block.
        """
        qkv = self.to_qkv(hidden_states)
        words = 0
        if encoder_hidden_states is not None and self.text_qkv is not None:
            words = encoder_hidden_states.shape[1]
            qkv = torch.cat([self.text_qkv(encoder_hidden_states), qkv], dim=1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, angles), _rotate(k, angles)
        if attend is None:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = attend(q, k, v, mask)
        out = out.transpose(1, 2).flatten(2)
        text, image = out[:, :words], out[:, words:]
        return self.to_out(image), text if self.text_out is None else self.text_out(text)


class TinyBlock(nn.Module):
    """A transformer block: attention in ``attn``, then an MLP.

    Args:
        heads: Number of heads.
        head_dim: Head width.
        joint: Double-stream block.
    """

    def __init__(self, heads: int, head_dim: int, *, joint: bool) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm = nn.LayerNorm(width)
        self.attn = TinyAttention(heads, head_dim, joint=joint)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self, image: Tensor, text: Tensor | None, angles: Tensor, mask: Tensor | None, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return new image ``[B, N, C]`` and text ``[B, T, C]`` tokens; arguments as ``TinyAttention.forward``."""
        words = None if text is None else self.norm(text)
        image_out, text_out = self.attn(self.norm(image), words, angles, mask, attend)
        image = image + image_out
        image = image + self.mlp(image)
        return image, text_out if text is None else text + text_out


class TinyDiT(nn.Module):
    """A small diffusion transformer with the block names and inputs of Flux, in plain torch.

    Weights are scaled so that logits spread as in a trained model (standard deviation about 2).

    Args:
        heads: Number of heads.
        head_dim: Head width, a multiple of 4.
        double: Number of double-stream blocks.
        single: Number of single-stream blocks.
        channels: Channels of an image token.
        text_channels: Channels of a text token.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        heads: int = 2,
        head_dim: int = 16,
        double: int = 2,
        single: int = 3,
        channels: int = 4,
        text_channels: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.head_dim = head_dim
        self.channels = channels
        self.text_channels = text_channels
        self.x_embedder = nn.Linear(channels, width)
        self.context_embedder = nn.Linear(text_channels, width)
        self.time_embed = nn.Linear(1, width)
        self.transformer_blocks = nn.ModuleList(TinyBlock(heads, head_dim, joint=True) for _ in range(double))
        self.single_transformer_blocks = nn.ModuleList(TinyBlock(heads, head_dim, joint=False) for _ in range(single))
        self.proj_out = nn.Linear(width, channels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    gain = 1.4 if "qkv" in name else 0.7
                    parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5, generator=generator)
                elif "norm" not in name:
                    parameter.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict a velocity.

        Args:
            hidden_states: ``[B, N, channels]`` image tokens.
            encoder_hidden_states: ``[B, T, text_channels]``.
            timestep: ``[B]`` noise levels.
            img_ids: ``[N, 3]`` image number, row and column of each token.
            txt_ids: ``[T, 3]``.
            mask: Attention mask as ``scaled_dot_product_attention`` takes it.

        Returns:
            ``[B, N, channels]``.
        """
        words = encoder_hidden_states.shape[1]
        image = self.x_embedder(hidden_states) + self.time_embed(timestep.reshape(-1, 1, 1).to(hidden_states.dtype))
        text = self.context_embedder(encoder_hidden_states)
        angles = self.angles(torch.cat([txt_ids, img_ids])).to(image.dtype)
        for block in self.transformer_blocks:
            image, text = block(image, text, angles, mask)
        joined = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joined, _ = block(joined, None, angles, mask)
        out: Tensor = self.proj_out(joined[:, words:])
        return out

    def angles(self, ids: Tensor) -> Tensor:
        """Return the rotary angles ``[N, head_dim / 2]`` of tokens with these ids ``[N, 3]``."""
        rates = 100.0 ** -torch.linspace(0, 1, self.head_dim // 4, device=ids.device)
        return (ids[:, 1:3].float()[:, :, None] * rates).flatten(1)

    def example(self, rows: int, columns: int, *, words: int = 5, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
        """Make inputs for ``forward``: random tokens, ``timestep`` 0.75 and raster ids."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(rows * columns, 3)
        ids[:, 1] = torch.arange(rows).repeat_interleave(columns)
        ids[:, 2] = torch.arange(columns).repeat(rows)
        return {
            "hidden_states": torch.randn(batch, rows * columns, self.channels, generator=generator),
            "encoder_hidden_states": torch.randn(batch, words, self.text_channels, generator=generator),
            "timestep": torch.full((batch,), 0.75),
            "img_ids": ids,
            "txt_ids": torch.zeros(words, 3),
        }


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
