"""Attention calls as ComfyUI's models may make them, and some that none makes; drawn by hypothesis."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attn_dispatch import AttentionHandler, StepContext, TokenLayout
from attn_dispatch.adapters.comfyui_fake import overridable, plain_attention
from attn_dispatch.adapters.comfyui_override import FACTS, INSTALLED, OVERRIDE, ComfyOverride, ModelFacts
from attn_kernels import TokenGrid
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HostCall:
    """Arguments of one attention call, its options apart.

    Attributes:
        args: Positional arguments.
        named: Keyword arguments.
        options: What stands in ``transformer_options`` beside an installation.
        facts: What the wrappers of an installation would have found out.
    """

    args: tuple[Any, ...]
    named: dict[str, Any]
    options: dict[str, Any]
    facts: ModelFacts | None

    def natively(self) -> Any:
        """What the host computes without any installation: a tensor, or the exception."""
        return outcome(lambda: overridable(plain_attention)(*self.args, **self.named, transformer_options=self.options))

    def routed(self, handler: AttentionHandler) -> Any:
        """What the host computes with a handler installed: a tensor, or the exception."""
        override = ComfyOverride(handler)
        found = {} if self.facts is None else {FACTS: {INSTALLED: self.facts}}
        options = {**self.options, **found, OVERRIDE: override, INSTALLED: {INSTALLED: override}}
        return outcome(lambda: overridable(plain_attention)(*self.args, **self.named, transformer_options=options))


def outcome(function: Callable[[], Any]) -> Any:
    """The result, or the exception that came instead."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001
        return error


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are the same to the last bit, or the same exception with the same words."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return type(one) is type(other) and str(one) == str(other)
    return (one.shape, one.dtype) == (other.shape, other.dtype) and bool(
        torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))
        and torch.equal(one.isnan(), other.isnan())
    )


def rarely(draw: st.DrawFn) -> bool:
    """True about once in twelve."""
    return draw(st.integers(0, 11)) == 11


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    """Text, an image and perhaps a reference image, in this order."""
    words = draw(st.integers(0, 6))
    image = TokenGrid(words, draw(st.integers(1, 9)), draw(st.integers(3, 9)))
    grids, references = (image,), ()
    if draw(st.booleans()):
        references = (TokenGrid(image.stop, draw(st.integers(1, 4)), draw(st.integers(1, 4))),)
    length = references[0].stop if references else image.stop
    text = ((0, words),) if words else ()
    return TokenLayout(length, text=text, grids=grids, references=references)


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """No mask, a fitting one, or one that fits nothing."""
    axes = draw(st.sampled_from((0, 0, 0, 2, 3, 4)))
    if axes == 0:
        return None
    sizes = {2: (queries, keys), 3: (batch, queries, keys), 4: (batch, heads, queries, keys)}[axes]
    sizes = tuple(draw(st.sampled_from((size, size, 1))) for size in sizes)
    if rarely(draw):
        sizes = (*sizes[:-1], sizes[-1] + 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    kind = draw(st.sampled_from(("bool", "bool", "added", "zero and lowest", "integer", "nothing seen")))
    chance = torch.rand(sizes, generator=generator)
    if kind == "bool":
        return chance > 0.3
    if kind == "added":
        return 2 * chance - 1
    if kind == "zero and lowest":
        return torch.zeros(sizes).masked_fill(chance < 0.3, torch.finfo(torch.float32).min)
    return (chance > 0.5).long() if kind == "integer" else torch.zeros(sizes, dtype=torch.bool)


@st.composite
def host_calls(draw: st.DrawFn) -> HostCall:
    """A call: mostly lawful self-attention with a layout, sometimes crossed, misshapen or mad."""
    batch, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((4, 7, 16, 33)))
    layout = None if rarely(draw) else draw(layouts())
    queries = layout.length if layout is not None else draw(st.integers(1, 40))
    keys = draw(st.integers(1, 40)) if rarely(draw) else queries
    value_width = draw(st.integers(1, 20)) if rarely(draw) else width
    dtype = draw(st.sampled_from((torch.float32, *DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    spread = draw(st.sampled_from((0.3, 1.0, 2.0, 12.0)))
    q = spread * torch.randn(batch, heads, queries, width, generator=generator)
    k = torch.randn(batch, heads, keys, width, generator=generator)
    v = torch.randn(batch, heads, keys, value_width, generator=generator)
    if rarely(draw):
        v[:, :, -1] = draw(st.sampled_from((math.nan, math.inf)))
    if rarely(draw):
        # Not keys alone: torch reads beyond the end where keys and values differ in number, and answers anything.
        fewer = draw(st.integers(0, keys))
        k, v = k[:, :, :fewer], v[:, :, :fewer]
    tensors = [tensor.to(dtype) for tensor in (q, k, v)]
    if rarely(draw):
        tensors[1] = tensors[1].to(draw(st.sampled_from(DTYPES)))
    named: dict[str, Any] = {"skip_output_reshape": draw(st.booleans())}
    if draw(st.booleans()):
        named["skip_reshape"] = True
    else:
        tensors = [tensor.transpose(1, 2).flatten(2) for tensor in tensors]
    named |= draw(st.fixed_dictionaries({}, optional=KEYWORDS))
    mask = draw(masks(batch, heads, queries, keys))
    if mask is not None and mask.is_floating_point() and not rarely(draw):
        mask = mask.to(dtype)
    given_heads = heads + 1 if rarely(draw) else heads
    args: tuple[Any, ...] = (*tensors, given_heads)
    if draw(st.booleans()):
        args = (*args, mask)
    elif mask is not None or draw(st.booleans()):
        named["mask"] = mask
    step = draw(st.none() | st.builds(StepContext, st.floats(0, 1), st.sampled_from((1.0, 3.5))))
    facts = None if rarely(draw) else ModelFacts(step, layout, draw(st.booleans()), draw(st.booleans()))
    options = draw(OPTIONS)
    if "img_slice" in options and layout is not None and not rarely(draw):
        # As the host announces it; what contradicts the layout takes the layout away.
        options["img_slice"] = [layout.text[0][1] if layout.text else 0, layout.length]
    return HostCall(args, named, options, facts)


KEYWORDS = {
    "scale": st.sampled_from((None, 0.1, 1.0)),
    "attn_precision": st.sampled_from((None, torch.float32)),
    "low_precision_attention": st.sampled_from((True,) * 9 + (False,)),
    "a_keyword_of_tomorrow": st.just(1),
}

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "block_type": st.sampled_from(("double", "single", "middle", None)),
        "block_index": st.integers(0, 60) | st.none(),
        "img_slice": st.lists(st.integers(0, 60), min_size=2, max_size=2),
        "cond_or_uncond": st.lists(st.integers(0, 1), max_size=4),
        "sigmas": st.sampled_from((torch.tensor([0.5]), torch.tensor([0.5, 0.7]), None)),
        "sample_sigmas": st.just(torch.tensor([1.0, 0.5, 0.0])),
        "patches": st.just({}),
        "an option of another pack": st.just(object()),
    },
)
"""What stands in ``transformer_options``."""
