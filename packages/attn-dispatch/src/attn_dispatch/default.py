"""The process's own choice of exact attention: ``set_backend`` and ``dispatch_attention``.

One default serves the whole process, threads that run already included; ``attention_backend`` replaces it for a block
of code, in the thread or task that runs the block. Nothing is decided, imported or probed before the first call, the
dispatcher itself included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attn_dispatch.native.dispatcher import Dispatcher
    from attn_dispatch.native.explain import Explanation
    from attn_dispatch.native.selection import Selection


class _Choice:
    """What attends: ``selection``. The choice of the process is the one that has no ``process`` above it."""

    def __init__(self, selection: Selection | None = None, process: _Choice | None = None) -> None:
        self.selection = selection
        self.process = process


# The default value is one object for every thread and task, so what set_backend changes in it is seen by all of them;
# a value set in a context hides it there alone.
_choice: ContextVar[_Choice] = ContextVar("attn_dispatch_choice", default=_Choice())  # noqa: B039


def _selection() -> Selection:
    choice = _choice.get()
    return _start(choice) if choice.selection is None else choice.selection


def _process() -> _Choice:
    choice = _choice.get()
    return choice if choice.process is None else choice.process


def _start(choice: _Choice) -> Selection:
    """Make the dispatcher of the process; until someone chooses, SDPA attends."""
    from attn_dispatch.adapters.comfyui_native import ComfyUIHost
    from attn_dispatch.native.dispatcher import Dispatcher

    # Two threads may come here at once; the later object wins and the other is never used again.
    choice.selection = Dispatcher(host=ComfyUIHost()).select("sdpa")
    return choice.selection


def _dispatcher() -> Dispatcher:
    return _selection().dispatcher


def set_backend(name: str) -> str:
    """Choose the attention of the process, for all its threads.

    Forgets earlier failures, so a backend that was left out gets another chance.

    Args:
        name: ``"auto"`` (the fastest that works on the device), ``"sage"`` (``"sage3"`` or ``"sage2"``),
            ``"flash_attn"`` (``"flash"`` or ``"flash4"``), ``"flash_fp8"``, ``"ck_int8"``, ``"xformers"``, ``"flex"``,
            ``"sdpa"`` or one of its kernels (``"sdpa_flash"``, ``"sdpa_cudnn"``, ``"sdpa_efficient"``,
            ``"sdpa_math"``), ``"flash2"`` or ``"flash3"`` for one FlashAttention.

    Returns:
        Label of what will run for a typical model; see ``get_backend_label``.

    Raises:
        ValueError: There is no backend of this name. One that cannot run is no error: SDPA runs, and the label says
            why.
    """
    dispatcher = _dispatcher()
    selection = dispatcher.select(name)
    dispatcher.forget()
    _process().selection = selection
    return selection.label()


def get_backend() -> str:
    """Return the name of the backend that runs here for a typical model, ``"sdpa"`` before any choice."""
    return _selection().typical().backend


def get_backend_label() -> str:
    """Say in words what runs here for a typical model: head width 128 (or 64), the device's best dtype, no mask.

    Where that is not the backend that was asked for, the label says why. For other calls ask ``explain``.
    """
    return _selection().label()


def auto_select(device: torch.device | None = None) -> str:
    """Return the name of the fastest backend that works, without choosing it.

    Args:
        device: Where; the host's device, or the default accelerator, if ``None``.
    """
    return _dispatcher().select("auto").typical(device=device).backend


def auto_detect_precision(device: torch.device | None = None) -> torch.dtype:
    """Return the dtype that inference runs best in: bfloat16, float16 or float32.

    Args:
        device: Where; the host's device, or the default accelerator, if ``None``.
    """
    return _dispatcher().precision(device)


@contextmanager
def attention_backend(name: str) -> Iterator[str]:
    """Choose the attention for a block of code, in this thread or task and in tasks started inside.

    Blocks nest. ``set_backend`` inside a block still chooses for the process and not for the block.

    Args:
        name: As of ``set_backend``.

    Yields:
        Label of what runs for a typical model.

    Raises:
        ValueError: There is no backend of this name.
    """
    selection = _dispatcher().select(name)
    token = _choice.set(_Choice(selection, _process()))
    try:
        yield selection.label()
    finally:
        _choice.reset(token)


def dispatch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    skip_output_reshape: bool = True,
    **host_options: object,
) -> Tensor:
    """Attend with the chosen backend; where it does not take such a call, with the next that does, SDPA at last.

    The first call of a kind (dtype, device, head widths, mask, ...) picks a backend by a small probe and waits for the
    device once; all others go straight to it. A backend that fails is left out for such calls from then on, and the
    call is answered by the next. Out of memory and interrupts are nobody's failure and reach the caller.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``; ``[B, Hk, Nk, D]`` with ``enable_gqa``.
        v: ``[B, H, Nk, Dv]``; ``[B, Hk, Nk, Dv]`` with ``enable_gqa``.
        attn_mask: Broadcastable to ``[B, H, Nq, Nk]``; bool (True = keep) or float (added to the scaled scores).
        dropout_p: Probability of dropping a weight.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        enable_gqa: k and v have ``Hk`` heads, each for ``H / Hk`` neighbouring heads of q.
        skip_output_reshape: Answer with ``[B, H, Nq, Dv]``; if False with ``[B, Nq, H * Dv]``.
        **host_options: In ComfyUI ``transformer_options`` and whatever else the caller was given: an override in them
            is honoured, ``low_precision_attention=False`` keeps quantised backends away, the rest is handed on. Without
            a host there is nobody to hand them to.

    Returns:
        ``[B, H, Nq, Dv]``, or ``[B, Nq, H * Dv]``.

    Raises:
        ValueError: q or k has not four axes.
    """
    choice = _choice.get()
    selection = choice.selection or _start(choice)
    return selection(
        q,
        k,
        v,
        attn_mask,
        dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        skip_output_reshape=skip_output_reshape,
        **host_options,
    )


def dispatch_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_q: int,
    max_kv: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend within each of many packed sequences, with the chosen backend where it has a form for them.

    Without one, torch's own forms are tried and at last SDPA for each sequence, which copies the bounds to the host
    once a call. Nothing of the size of tokens times tokens is ever made. Queries without keys get zeros.

    Args:
        q: ``[Tq, H, D]``, sequence after sequence.
        k: ``[Tkv, Hk, D]``; ``Hk`` divides ``H``.
        v: ``[Tkv, Hk, Dv]``.
        cu_seqlens_q: ``[S + 1]`` of int32, where each sequence of queries starts, and where the last one ends.
        cu_seqlens_kv: ``[S + 1]`` of int32, the same for keys and values.
        max_q: Most queries of a sequence.
        max_kv: Most keys of a sequence.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.

    Returns:
        ``[Tq, H, Dv]``.

    Raises:
        ValueError: Shapes do not fit, or the bounds are seen not to rise from 0 to the number of tokens.
    """
    return _selection().varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, scale)


def explain(
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    *,
    keys: int | None = None,
    masked: bool = False,
) -> Explanation:
    """Say what would run for calls of a shape and why the rest would not; ``print`` it.

    Args:
        shape: Shape of q, ``(B, H, Nq, D)``; that of Flux at one megapixel if ``None``.
        dtype: Dtype of q, k and v; the device's best if ``None``.
        device: Their device; the host's, or the default accelerator, if ``None``.
        keys: Number of keys; as many as queries if ``None``.
        masked: There is a mask.
    """
    from attn_dispatch.native.explain import explain as explain_selection

    return explain_selection(_selection(), shape, dtype, device, keys=keys, masked=masked)
