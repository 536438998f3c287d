"""Token layouts of ComfyUI's diffusion transformers, read from what the network is called with.

Every reader gives the layout of the *joint self-attention* of its network, or ``None`` where the arguments do not fix
it. A layout is used for an attention call only if its length is the number of queries and keys of that call, so
refiners and cross attentions never get it. Sizes are read from shapes alone; nothing waits for the device.

========================  ==============================================================================
network                   order of the tokens
========================  ==============================================================================
Flux, Flux2               text, image, reference images
Chroma, ChromaRadiance    text, image
Qwen-Image                text, frames of the image, frames of the reference images
Lumina 2, Z-Image         texts, features, reference images, image; each of them filled up with padding
Wan, Wan Camera, VACE     reference image, frames, frames of in-context references
HunyuanVideo, -Image      text, reference image, frames; before ComfyUI 0.14: reference image, frames, text
========================  ==============================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from attn_kernels import TokenGrid

from attn_dispatch.call import TokenLayout

Arguments = Mapping[str, Any]
"""What a network's ``forward`` is called with, by name, keywords it does not name included."""

LayoutReader = Callable[[Any, Arguments], TokenLayout | None]
"""Reads the layout of one model call from the network and its arguments; ``None`` = not known."""

_Kind = Literal["text", "image", "reference"]
_Part = tuple[_Kind, int, int]


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def named_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of one model call, defaults included.

    Args:
        function: What is called; a bound method is named without ``self``.
        args: Positional arguments.
        kwargs: Keyword arguments; those the function takes by ``**`` stand beside the others.

    Raises:
        TypeError: They do not fit the function.
    """
    plain = getattr(function, "__func__", function)
    signature = _signature(plain)
    owner = () if plain is function else (None,)
    bound = signature.bind(*owner, *args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[len(owner) :]:
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(bound.arguments[name])
        else:
            found[name] = bound.arguments[name]
    return found


@lru_cache(maxsize=256)
def _lay_out(parts: tuple[_Part, ...]) -> TokenLayout:
    """Put the parts one behind the other."""
    start = 0
    text: list[tuple[int, int]] = []
    grids: list[TokenGrid] = []
    references: list[TokenGrid] = []
    for kind, rows, columns in parts:
        stop = start + rows * columns
        if stop > start:
            if kind != "text":
                (grids if kind == "image" else references).append(TokenGrid(start, rows, columns))
            elif text and text[-1][1] == start:
                text[-1] = (text[-1][0], stop)
            else:
                text.append((start, stop))
        start = stop
    return TokenLayout(start, tuple(text), tuple(grids), tuple(references))


def _text(tokens: int) -> tuple[_Part, ...]:
    return (("text", tokens, 1),)


def _frames(kind: _Kind, tensor: Any, patch: Sequence[int]) -> tuple[_Part, ...]:
    """One grid per frame of ``[B, C, T, height, width]``, or one of ``[B, C, height, width]``.

    Args:
        kind: What the grids are.
        tensor: Anything of this shape.
        patch: Edges of a patch, the last two being height and width; an unfinished patch is filled up.
    """
    count = -(-tensor.shape[2] // patch[0]) if tensor.ndim == 5 else 1
    return ((kind, -(-tensor.shape[-2] // patch[-2]), -(-tensor.shape[-1] // patch[-1])),) * count


def _flux(network: Any, given: Arguments) -> TokenLayout | None:
    patch = (1, network.patch_size, network.patch_size)
    parts = _text(given["context"].shape[1]) + _frames("image", given["x"], patch)
    for one in given.get("ref_latents") or ():
        parts += _frames("reference", one, patch)
    return _lay_out(parts)


def _chroma(network: Any, given: Arguments) -> TokenLayout | None:
    patch = (1, network.patch_size, network.patch_size)
    return _lay_out(_text(given["context"].shape[1]) + _frames("image", given["x"], patch))


def _lumina(network: Any, given: Arguments) -> TokenLayout | None:
    patch = (1, network.patch_size, network.patch_size)
    image = _frames("image", given["x"], patch)
    if not hasattr(network, "pad_tokens_multiple"):
        # Before Z-Image, texts of different lengths were packed: the image then starts elsewhere in each row.
        return None if given.get("attention_mask") is not None else _lay_out(_text(given["num_tokens"]) + image)
    multiple = network.pad_tokens_multiple or 1
    references = given.get("ref_latents") or ()
    contexts = given.get("ref_contexts") or ()

    def padded(tokens: int) -> int:
        return tokens + -tokens % multiple

    def filled(grid: tuple[_Part, ...]) -> tuple[_Part, ...]:
        tokens = grid[0][1] * grid[0][2]
        return grid + _text(padded(tokens) - tokens)

    words = padded(given["context"].shape[1])
    if not references:
        return _lay_out(_text(words) + filled(image))
    # A reference image without a text of its own has one multiple of padding for text, and the same of features.
    lengths = [one.shape[1] for one in contexts] + [multiple] * (len(references) - len(contexts))
    words += sum(padded(length) for length in lengths)
    if getattr(network, "siglip_embedder", None) is not None:
        features = [one.shape[1] * one.shape[2] for one in (given.get("siglip_feats") or ())[: len(references)]]
        features += [multiple] * (len(references) + 1 - len(features))
        words += sum(padded(length) for length in features)
    parts = _text(words)
    for one in references:
        parts += filled(_frames("reference", one, patch))
    return _lay_out(parts + filled(image))


def _wan(network: Any, given: Arguments) -> TokenLayout | None:
    patch = network.patch_size
    parts: tuple[_Part, ...] = ()
    image = given.get("reference_latent")
    if getattr(network, "ref_conv", None) is not None and image is not None:
        # A strided convolution without padding: an unfinished patch is dropped.
        parts = (("reference", image.shape[-2] // patch[1], image.shape[-1] // patch[2]),)
    parts += _frames("image", given["x"], patch)
    further = given.get("time_dim_concat")
    if further is not None:
        parts += _frames("image", further, patch)
    for one in given.get("context_latents") or ():
        parts += _frames("reference", one, patch)
    layout = _lay_out(parts)
    # Where a cross attention has as many keys as the self-attention, nothing tells the two apart.
    clip = given.get("clip_fea")
    crossed = (given["context"].shape[1], None if clip is None else clip.shape[-2])
    return None if layout.length in crossed else layout


def _hunyuan_video(network: Any, given: Arguments) -> TokenLayout | None:
    text_first = _text_first(network)
    if text_first is None:
        return None
    words = given["context"].shape[1]
    if getattr(network, "byt5_in", None) is not None and given.get("txt_byt5") is not None:
        words += given["txt_byt5"].shape[1]
    if given.get("clip_fea") is not None:
        words += given["clip_fea"].shape[1]
    image = given.get("ref_latent")
    parts = () if image is None else _frames("reference", image, network.patch_size)
    parts += _frames("image", given["x"], network.patch_size)
    return _lay_out(_text(words) + parts if text_first else parts + _text(words))


def _text_first(network: Any) -> bool | None:
    """Whether this HunyuanVideo puts the text before the image; ``None`` if its code is not the class's own.

    The releases that put it first are those whose blocks are told ``img_slice``.
    """
    function = getattr(network.forward_orig, "__func__", None)
    if function is None or function.__module__ != type(network).__module__:
        return None
    return "img_slice" in function.__code__.co_consts


LAYOUTS: Mapping[str, LayoutReader] = MappingProxyType(
    {
        "Flux": _flux,
        "Chroma": _chroma,
        "ChromaRadiance": _chroma,
        "QwenImageTransformer2DModel": _flux,
        "NextDiT": _lumina,
        "NextDiTPixelSpace": _lumina,
        "WanModel": _wan,
        "CameraWanModel": _wan,
        "VaceWanModel": _wan,
        "HunyuanVideo": _hunyuan_video,
    }
)
"""Reader by class name of the network; exact names, as a subclass may order its tokens anew."""

SHARED_NAMES = frozenset({"VaceWanModel"})
"""Networks in which attentions of different weights run under one block name, so that no layer is named."""

CROSS_ATTENDING = frozenset({"WanModel", "CameraWanModel"})
"""Networks whose cross attention runs under the name of its block; told apart by length, so only with a layout."""

BINARY_MASKS = frozenset({"QwenImageTransformer2DModel", "HunyuanVideo"})
"""Networks that turn an integer mask into an additive one of zero and the lowest number."""
