"""Taylor attention: ``exp`` as its truncated series, in time linear in the tokens."""

from attn_kernels.taylor.api import taylor_attention
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import taylor_feature_count
from attn_kernels.taylor.memory import taylor_memory
from attn_kernels.taylor.probe import DenominatorProbe, denominator_probe

__all__ = [
    "DenominatorProbe",
    "TaylorConfig",
    "denominator_probe",
    "taylor_attention",
    "taylor_feature_count",
    "taylor_memory",
]
