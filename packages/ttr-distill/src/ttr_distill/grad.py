"""The one place that leaves inference mode.

Hosts sample under ``torch.inference_mode()``. Tensors made there can never take part in autograd, so everything that
learns while sampling runs inside ``training_mode`` and copies what it was given with ``plain``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def training_mode() -> Iterator[None]:
    """Leave inference mode and enable gradients until the block ends, whatever the caller had set."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def plain(tensor: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Copy a tensor into one that autograd may save.

    Call it inside ``training_mode``; outside of it the copy of an inference tensor is an inference tensor again.

    Args:
        tensor: Any tensor, also one made in inference mode.
        dtype: Data type of the copy; that of ``tensor`` if ``None``.
        device: Device of the copy; that of ``tensor`` if ``None``.

    Returns:
        A contiguous copy without history.
    """
    copy = tensor.detach().to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.detach()
