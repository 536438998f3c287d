"""What was decided: who answers calls of one kind, or why a candidate does not."""

from __future__ import annotations

from dataclasses import dataclass

from attn_dispatch.native.bindings import DenseKernel, VarlenKernel
from attn_dispatch.native.catalog import SDPA
from attn_dispatch.native.host import HostAttention
from attn_dispatch.native.varlen import attend_each

SDPA_LABEL = "PyTorch SDPA"
"""Label of the last resort."""

EACH_LABEL = "PyTorch SDPA, one sequence after the other"
"""Label of the last resort for packed sequences."""


@dataclass(frozen=True)
class Refusal:
    """Why a candidate does not run.

    Attributes:
        reason: One sentence.
        lasting: It will be the same the next time; False for want of memory and the like.
    """

    reason: str
    lasting: bool = True


@dataclass(frozen=True)
class Plan:
    """What answers calls of one kind.

    Attributes:
        key: Key of the candidate.
        backend: Name of the backend.
        label: What runs, in words.
        kernel: Runs it without a host; ``None`` is SDPA.
        hosted: The host's own function for it, or the kernel behind the host's signature; ``None`` without a host.
        own: ``hosted`` is the host's own function and runs every call; else it runs calls with host options.
    """

    key: str
    backend: str
    label: str
    kernel: DenseKernel | None
    hosted: HostAttention | None = None
    own: bool = False


@dataclass(frozen=True)
class PackedPlan:
    """What answers packed calls of one kind.

    Attributes:
        key: Key of the candidate or form.
        backend: Name of the backend.
        label: What runs, in words.
        kernel: Runs it.
    """

    key: str
    backend: str
    label: str
    kernel: VarlenKernel


EACH_PLAN = PackedPlan("each", SDPA, EACH_LABEL, attend_each)
"""What answers packed calls where nothing better runs."""
