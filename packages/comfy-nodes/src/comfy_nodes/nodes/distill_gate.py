"""Whether a student would be faster than exact attention."""

from attn_dispatch import AttentionCall, Guard, PaysOff
from attn_dispatch.backends import NearFarBackend
from attn_kernels import NearFarConfig
from attn_kernels.cost import exact_flops
from ttr_distill import StudentBank
from ttr_distill.student import HkrConfig

from ..approximation import SPEED_UP

NETWORK_COST = 1.25
"""How long an operation of a ``hkr`` student takes, in operations of exact attention: most of them are in networks."""

JOINT_COST = 4.0
"""The same of students that join windows, landmarks and features under one denominator, many small steps."""


class FewerOperations:
    """A guard that allows calls for which a student's operations take less time than those of exact attention.

    Args:
        bank: The students.
        cost: How long one of their operations takes, in operations of exact attention; on a CPU no student took longer
            than its constant here says.
    """

    def __init__(self, bank: StudentBank, cost: float) -> None:
        self.bank = bank
        self.cost = cost

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call does not pay off, or ``None``."""
        if call.layer is None or call.layout is None or call.layer not in self.bank:
            return "the cost of this call is not known"
        batch, heads, tokens, width = call.q.shape
        exact = exact_flops(batch, heads, tokens, call.k.shape[2], width, call.v.shape[3])
        speed_up = exact / (self.cost * self.bank[call.layer].flops(call.layout, batch, heads, width))
        if speed_up > 1.0:
            return None
        return f"predicted {speed_up:.2g} times as fast as exact attention at {tokens} keys"


def faster(bank: StudentBank) -> Guard:
    """Make the guard: near-far students are judged by the rates of the device, others by their operations."""
    settings = bank.config.settings
    if isinstance(settings, NearFarConfig):
        return PaysOff(NearFarBackend(settings).work, speed_up=SPEED_UP)
    return FewerOperations(bank, NETWORK_COST if isinstance(settings, HkrConfig) else JOINT_COST)
