"""Approximate attentions that a router may choose."""

from attn_dispatch.backends.hybrid import HybridBackend
from attn_dispatch.backends.hybrid_config import HybridBackendConfig
from attn_dispatch.backends.near_far import NearFarBackend, NearFarRule
from attn_dispatch.backends.options import NamedOption, Option, check_options, option, options_of
from attn_dispatch.backends.qk_norm import QkNorm
from attn_dispatch.backends.quality import Quality
from attn_dispatch.backends.reasons import Reason
from attn_dispatch.backends.taylor import TaylorBackend
from attn_dispatch.backends.taylor_config import TaylorBackendConfig
from attn_dispatch.backends.taylor_memory import MemoryReserve
from attn_dispatch.backends.taylor_stats import DenominatorStats, TaylorStepStats
from attn_dispatch.backends.taylor_tuning import TaylorTuner, TuningChoice

__all__ = [
    "DenominatorStats",
    "HybridBackend",
    "HybridBackendConfig",
    "MemoryReserve",
    "NamedOption",
    "NearFarBackend",
    "NearFarRule",
    "Option",
    "QkNorm",
    "Quality",
    "Reason",
    "TaylorBackend",
    "TaylorBackendConfig",
    "TaylorStepStats",
    "TaylorTuner",
    "TuningChoice",
    "check_options",
    "option",
    "options_of",
]
