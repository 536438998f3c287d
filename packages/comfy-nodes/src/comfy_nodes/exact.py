"""The native dispatcher as something that a router may choose."""

from attn_dispatch.call import AttentionCall
from attn_dispatch.masks import join_mask
from attn_dispatch.native import Dispatcher, Selection
from attn_dispatch.native.catalog import backend_names
from torch import Tensor

BACKENDS = ("auto", *(name for name in backend_names() if name != "auto"))
"""What a user may choose, ``auto`` first."""


class ExactBackend:
    """Answers every call by an exact attention of the native dispatcher, or one of 8 bits that was asked for.

    Args:
        selection: Which attention.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.name = selection.typical().backend

    def refuses(self, call: AttentionCall) -> str | None:
        """Nothing is refused: where the chosen attention cannot answer, the dispatcher takes the next that can."""
        return None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]``."""
        mask = join_mask(call.key_mask, call.attn_bias, call.q.dtype)
        return self.selection(call.q, call.k, call.v, mask, scale=call.scale)


def exact_backend(name: str) -> ExactBackend:
    """Make the backend for a name, with a dispatcher of its own that asks ComfyUI's functions first.

    Raises:
        ValueError: There is no such backend.
    """
    from attn_dispatch.adapters.comfyui_native import ComfyUIHost

    return ExactBackend(Dispatcher(host=ComfyUIHost()).select(name))
