"""Whether a student would be faster than exact attention."""

from attn_dispatch import AttentionCall, Guard, PaysOff
from attn_dispatch.backends import NearFarBackend
from attn_kernels import NearFarConfig
from attn_kernels.cost import exact_flops
from ttr_distill import StudentBank


class FewerOperations:
    """A guard that allows calls for which a student needs fewer operations than exact attention.

    Args:
        bank: The students.
    """

    def __init__(self, bank: StudentBank) -> None:
        self.bank = bank

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call does not pay off, or ``None``."""
        if call.layer is None or call.layout is None or call.layer not in self.bank:
            return "the cost of this call is not known"
        batch, heads, tokens, width = call.q.shape
        exact = exact_flops(batch, heads, tokens, call.k.shape[2], width, call.v.shape[3])
        ratio = self.bank[call.layer].flops(call.layout, batch, heads, width) / exact
        if ratio < 1.0:
            return None
        return f"the student takes {ratio:.2g} times the operations of exact attention at {tokens} tokens"


def faster(bank: StudentBank) -> Guard:
    """Make the guard: near-far students are judged by the rates of the device, others by their operations."""
    settings = bank.config.settings
    if isinstance(settings, NearFarConfig):
        return PaysOff(NearFarBackend(settings).work)
    return FewerOperations(bank)
