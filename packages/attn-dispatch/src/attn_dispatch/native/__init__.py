"""Exact attention by whatever is installed: pick a backend for a kind of call, run it, remember what failed.

Nothing here knows a host. A ``Dispatcher`` is given what it may ask: a function that imports modules, one that
describes a device, and optionally a ``Host`` with attention functions of its own.
"""

from attn_dispatch.native.arch import Arch, Tier, auto_detect_precision, default_device, detect_arch
from attn_dispatch.native.dispatcher import Dispatcher
from attn_dispatch.native.explain import Explanation, ExplanationRow
from attn_dispatch.native.host import Host, HostAttention
from attn_dispatch.native.selection import Selection

__all__ = [
    "Arch",
    "Dispatcher",
    "Explanation",
    "ExplanationRow",
    "Host",
    "HostAttention",
    "Selection",
    "Tier",
    "auto_detect_precision",
    "default_device",
    "detect_arch",
]
