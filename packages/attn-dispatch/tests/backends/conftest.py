"""What tests of the backends share: calls of realistic logits, and a look at what a Taylor backend does."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionFallback, LayerKey, StepContext
from attn_dispatch.backends import TaylorBackend, TaylorBackendConfig, TaylorStepStats, TuningChoice
from attn_dispatch.backends import taylor as taylor_module
from attn_kernels import Partial, TaylorConfig
from attn_kernels.testing import make_qkv
from torch.overrides import TorchFunctionMode


class MakeCall(Protocol):
    """Makes a call of random queries, keys and values."""

    def __call__(
        self,
        *,
        tokens: int = 160,
        kv_tokens: int | None = None,
        heads: int = 2,
        width: int = 16,
        logit_std: float = 1.0,
        dtype: torch.dtype = torch.float32,
        layer: str | None = "single:3",
        sigma: float | None = 0.5,
        seed: int = 0,
        opposed: int = 0,
    ) -> AttentionCall: ...


@pytest.fixture(scope="session")
def make_call() -> MakeCall:
    def make(
        *,
        tokens: int = 160,
        kv_tokens: int | None = None,
        heads: int = 2,
        width: int = 16,
        logit_std: float = 1.0,
        dtype: torch.dtype = torch.float32,
        layer: str | None = "single:3",
        sigma: float | None = 0.5,
        seed: int = 0,
        opposed: int = 0,
    ) -> AttentionCall:
        q, k, v = make_qkv(
            1, heads, tokens, width, logit_std=logit_std, kv_tokens=kv_tokens, value_width=12, dtype=dtype, seed=seed
        )
        if opposed:
            # One query in so many has scores around -9 with every key, where series with an even P are negative.
            k = k + 1.5
            q = q.clone()
            q[:, :, ::opposed] -= 1.5 * 16 / width
        key = None if layer is None else LayerKey.parse(layer)
        return AttentionCall(q, k, v, layer=key, step=None if sigma is None else StepContext(sigma))

    return make


@dataclass
class Seen:
    """What a Taylor backend did with some calls of one run."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    operator: list[tuple[TaylorConfig, str, torch.dtype]] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)
    steps: list[TaylorStepStats] = field(default_factory=list)
    choices: dict[str, TuningChoice] = field(default_factory=dict)


class Watcher:
    """Runs a backend and notes everything that it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.monkeypatch, self.caplog = monkeypatch, caplog
        self.attend, self.probe = taylor_module.taylor_attention, taylor_module.denominator_probe

    def run(self, config: TaylorBackendConfig, *calls: AttentionCall) -> Seen:
        seen = Seen()

        def attend(q: torch.Tensor, *args: Any, config: TaylorConfig, impl: str, **kwargs: Any) -> Partial:
            seen.operator.append((config, str(impl), q.dtype))
            return self.attend(q, *args, config=config, impl=impl, **kwargs)

        def probe(*args: Any, queries: torch.Tensor, **kwargs: Any) -> Any:
            seen.probed.append(len(queries))
            return self.probe(*args, queries=queries, **kwargs)

        self.monkeypatch.setattr(taylor_module, "taylor_attention", attend)
        self.monkeypatch.setattr(taylor_module, "denominator_probe", probe)
        self.caplog.clear()
        backend = TaylorBackend(config, reserve=lambda size, device: seen.reserved.append(size))
        with self.caplog.at_level(logging.INFO, "attn_dispatch"):
            backend.begin_run()
            for call in calls:
                reason = backend.refuses(call)
                if reason is None:
                    try:
                        seen.outputs.append(backend(call))
                    except AttentionFallback as fallback:
                        reason = fallback.reason
                if reason is not None:
                    seen.reasons.append(reason)
            backend.end_run()
        seen.logs = [record.getMessage() for record in self.caplog.records]
        seen.steps = list(backend.steps)
        seen.choices = {str(layer): choice for layer, choice in backend.tuner.choices.items()}
        return seen


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Watcher:
    return Watcher(monkeypatch, caplog)


class HostReads(TorchFunctionMode):
    """Notes every call by which numbers go from a tensor to Python."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> type[HostReads]:
    return HostReads
