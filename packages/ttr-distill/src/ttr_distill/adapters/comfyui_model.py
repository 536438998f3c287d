"""What students need to know of a ComfyUI model: its attention layers, their shape, and which model it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from attn_dispatch import LayerKey
from attn_dispatch.adapters.comfyui_blocks import names_blocks
from torch import Tensor

Streams = Literal["single", "all"]

_NORM_PARTS = ("query_norm", "key_norm", "norm_q", "norm_k", "q_norm", "k_norm")
_EMBEDDERS = ("img_in", "x_embedder", "patch_embedding")
_SAMPLED = 256


@dataclass(frozen=True)
class ComfyModel:
    """A model as students see it.

    Attributes:
        family: Class name of the network.
        layers: Attention layers in running order.
        heads: Number of heads, H.
        width: Width of a head, D.
        fingerprint: Identity of the weights; the same after a restart, and with or without LoRAs.
    """

    family: str
    layers: tuple[LayerKey, ...]
    heads: int
    width: int
    fingerprint: str

    def range(self, first: int = -1, last: int = -1, streams: Streams = "single") -> tuple[LayerKey, ...]:
        """Choose layers.

        Args:
            first: Lowest index within the stream; negative = no limit.
            last: Highest index within the stream, included; negative = no limit.
            streams: ``"single"``: single-stream blocks where the model has them, else all; ``"all"``: every block.

        Raises:
            ValueError: No layer is left.
        """
        names = {layer.stream for layer in self.layers}
        wanted = {"single"} if streams == "single" and "single" in names else names
        chosen = tuple(
            layer
            for layer in self.layers
            if layer.stream in wanted and layer.index >= first and (last < 0 or layer.index <= last)
        )
        if not chosen:
            counts = [f"{sum(one.stream == name for one in self.layers)} {name}" for name in sorted(names)]
            raise ValueError(
                f"no block of {self.family} lies in the layers {first} to {last}; it has {', '.join(counts)} blocks"
            )
        return chosen


def describe_model(patcher: Any) -> ComfyModel:
    """Read the attention layers of a model that names its blocks.

    Args:
        patcher: ComfyUI's ``ModelPatcher``.

    Raises:
        ValueError: The model's family has no named blocks, in this version of ComfyUI or at all.
    """
    network = getattr(patcher.model, "diffusion_model", None)
    family = type(network).__name__
    found = None if network is None else _blocks(network)
    if found is None or not names_blocks(network):
        raise ValueError(
            f"students need the name of the attention layer that calls, and this ComfyUI does not name the blocks of "
            f"{family}; use a Flux, Flux2, Chroma, HunyuanVideo, Qwen-Image, Z-Image or Wan model in a newer ComfyUI, "
            "or a node that needs no training"
        )
    streams, heads, width = found
    layers = tuple(LayerKey(stream, index) for stream, count in streams for index in range(count))
    return ComfyModel(family, layers, heads, width, _fingerprint(patcher, network, layers, heads, width))


def _blocks(network: Any) -> tuple[tuple[tuple[str, int], ...], int, int] | None:
    """Streams with their number of blocks, heads and head width; ``None`` for an unknown family."""
    if hasattr(network, "double_blocks") and hasattr(network, "single_blocks"):
        streams = (("double", len(network.double_blocks)), ("single", len(network.single_blocks)))
        heads = int(network.num_heads)
        return streams, heads, int(network.hidden_size) // heads
    if hasattr(network, "transformer_blocks") and len(network.transformer_blocks):
        attention: Any = getattr(network.transformer_blocks[0], "attn", None)
        if hasattr(attention, "heads") and hasattr(attention, "dim_head"):
            return (("double", len(network.transformer_blocks)),), int(attention.heads), int(attention.dim_head)
    if hasattr(network, "layers") and len(network.layers):
        attention = getattr(network.layers[0], "attention", None)
        if hasattr(attention, "n_local_heads") and hasattr(attention, "head_dim"):
            return (("double", len(network.layers)),), int(attention.n_local_heads), int(attention.head_dim)
    if hasattr(network, "blocks") and hasattr(network, "num_heads") and hasattr(network, "dim"):
        return (("double", len(network.blocks)),), int(network.num_heads), int(network.dim) // int(network.num_heads)
    return None


def _fingerprint(patcher: Any, network: Any, layers: tuple[LayerKey, ...], heads: int, width: int) -> str:
    """Hash the structure, the norms of queries and keys, and some weights of the input embedder.

    Hashing all weights would read tens of gigabytes. The chosen ones are small, rarely quantised, and are taken as they
    were before LoRAs changed them.
    """
    digest = hashlib.sha256(f"{type(network).__name__} {layers} {heads} {width}".encode())
    backup = getattr(patcher, "backup", {})
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        if not any(part in (*_NORM_PARTS, *_EMBEDDERS) for part in parts):
            continue
        saved = backup.get(f"diffusion_model.{name}")
        weight = parameter if saved is None else saved.weight
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_sample(weight))
    return digest.hexdigest()


def _sample(weight: Tensor) -> bytes:
    """Bytes of at most 256 evenly spread values, in bfloat16."""
    flat = weight.detach().flatten()
    if flat.is_meta:
        return b""
    step = max(1, flat.numel() // _SAMPLED)
    return flat[::step][:_SAMPLED].to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
