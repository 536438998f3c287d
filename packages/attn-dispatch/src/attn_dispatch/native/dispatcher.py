"""Pick a backend for a kind of call, run it, remember what failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from threading import RLock

import torch
from torch import Tensor

from attn_dispatch.native.arch import Arch, default_device, detect_arch, precision_of
from attn_dispatch.native.bindings import Kernels
from attn_dispatch.native.catalog import SDPA, Candidate, canonical_name
from attn_dispatch.native.faults import Attempt, is_out_of_memory
from attn_dispatch.native.host import Host, HostAttention
from attn_dispatch.native.kind import SHORT_TOKENS, CallKind
from attn_dispatch.native.plans import SDPA_LABEL, PackedPlan, Plan, Refusal
from attn_dispatch.native.probe import probe_dense, probe_varlen
from attn_dispatch.native.selection import Selection
from attn_dispatch.native.varlen import PackedForm

logger = logging.getLogger(__name__)

_TYPICAL_WIDTHS = (128, 64)


class Dispatcher:
    """Knows which candidates work here: imports each at most once, probes it once per kind, remembers failures.

    One object may serve all threads. It decides nothing before it is asked.

    Args:
        lookup: Imports a module by name, as ``importlib.import_module`` does.
        host: A host with attention functions of its own; ``None`` = none.
        detect: Describes a device.
    """

    def __init__(
        self,
        lookup: Callable[[str], object] = import_module,
        host: Host | None = None,
        detect: Callable[[torch.device], Arch] = detect_arch,
    ) -> None:
        self.host = host
        self._lookup = lookup
        self._detect = detect
        self._kernels: dict[str, Kernels | Refusal] = {}
        self._verdicts: dict[tuple[str, CallKind], str | None] = {}
        self._selections: dict[tuple[str, bool], Selection] = {}
        # Whoever asks first imports and probes; others wait for the answer.
        self._lock = RLock()

    def select(self, name: str, *, quantised: bool = True) -> Selection:
        """Return the attention that a name stands for; the same object for the same name.

        Args:
            name: ``"auto"``, a group, a backend, the key of a candidate, or an alias of one; see ``catalog``.
            quantised: Whether backends of 8 bits or fewer may run.

        Raises:
            ValueError: There is no such backend.
        """
        name = canonical_name(name)
        with self._lock:
            return self._selections.setdefault((name, quantised), Selection(self, name, quantised))

    def forget(self) -> None:
        """Forget every probe and failure, as after installing a package; what is imported stays imported."""
        with self._lock:
            self._verdicts.clear()
            self._kernels = {key: one for key, one in self._kernels.items() if isinstance(one, Kernels)}
            for selection in self._selections.values():
                selection.forget()

    def arch(self, device: torch.device) -> Arch:
        """Describe a device."""
        return self._detect(device)

    def device(self) -> torch.device:
        """Return the device that models run on: the host's, else the default accelerator."""
        hosted = None if self.host is None else self.host.device()
        return default_device() if hosted is None else hosted

    def precision(self, device: torch.device | None = None) -> torch.dtype:
        """Return the dtype that inference runs best in on a device; on ``device()`` if ``None``."""
        return precision_of(self.arch(self.device() if device is None else device))

    def typical_kinds(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> list[CallKind]:
        """Return the kinds that a label is made for: self-attention of long sequences, common head widths."""
        device = self.device() if device is None else device
        dtype = self.precision(device) if dtype is None else dtype
        return [CallKind(dtype, device, width, width) for width in _TYPICAL_WIDTHS]

    def plan(self, candidate: Candidate, kind: CallKind) -> Plan | Refusal:
        """Say how a candidate answers calls of a kind, or why it does not. May import, and probe."""
        with self._lock:
            kernels = self._ready(candidate, kind)
            if isinstance(kernels, Refusal):
                return kernels
            if kind.masked and not kernels.masks:
                return Refusal("takes no mask")
            refusal = self._judge(candidate, kind, lambda: probe_dense(kernels.dense, *_terms(candidate, kind)))
            if refusal is not None:
                return refusal
            label = kernels.label or candidate.label
            own = None if self.host is None else self.host.attention(candidate.key)
            # A host's functions have no dropout, and what they compile has no gradient.
            if self.host is None or own is None or kind.dropout or kind.gradient or (kind.masked and not own.masks):
                guest = None if self.host is None or kind.dropout else self.host.guest(kernels.dense)
                return Plan(candidate.key, candidate.backend, label, kernels.dense, guest)
            if kind.short and own.min_tokens > SHORT_TOKENS:
                return Refusal(f"{self.host.name} keeps it for more than {SHORT_TOKENS:,} tokens")
            refusal = self._judge(candidate, kind, lambda: _probe_hosted(own, *_terms(candidate, kind)), "hosted ")
            label = f"{label}, by {self.host.name}"
            return refusal or Plan(candidate.key, candidate.backend, label, kernels.dense, own, own=True)

    def packed_plan(self, candidate: Candidate | PackedForm, kind: CallKind) -> PackedPlan | Refusal:
        """Say how a candidate answers packed calls of a kind, or why it does not. May import, and probe."""
        with self._lock:
            if isinstance(candidate, PackedForm):
                reason = candidate.refuses(kind, self.arch(kind.device))
                if reason is not None:
                    return Refusal(reason)
                backend, label, kernel = SDPA, candidate.label, candidate.kernel
            else:
                kernels = self._ready(candidate, kind)
                if isinstance(kernels, Refusal):
                    return kernels
                if kernels.varlen is None:
                    return Refusal("has no form for packed sequences")
                backend, label, kernel = candidate.backend, kernels.label or candidate.label, kernels.varlen
            probe = probe_varlen
            refusal = self._judge(candidate, kind, lambda: probe(kernel, *_terms(candidate, kind)))
            return refusal or PackedPlan(candidate.key, backend, label, kernel)

    def sdpa_plan(self, kind: CallKind) -> Plan:
        """Say how SDPA, which is always there, answers calls of a kind."""
        own = None if self.host is None or kind.dropout else self.host.attention(SDPA)
        if self.host is None or own is None:
            return Plan(SDPA, SDPA, SDPA_LABEL, None)
        return Plan(SDPA, SDPA, f"{SDPA_LABEL}, by {self.host.name}", None, own, own=True)

    def remember(self, key: str, kind: CallKind, reason: str) -> None:
        """Remember that a candidate failed in a call of this kind: this dtype, this head width, on this device."""
        with self._lock:
            known = self._verdicts.get((key, kind.any_length())) is not None
            self._verdicts[key, kind.any_length()] = f"failed: {reason}"
        if not known:
            logger.warning(
                "attention backend %s failed for %s of width %d and is left out for such calls: %s",
                key,
                str(kind.dtype).removeprefix("torch."),
                kind.width,
                reason,
            )

    def _ready(self, candidate: Candidate, kind: CallKind) -> Kernels | Refusal:
        """Return the candidate's kernels if what is known of it without running it allows such calls."""
        reason = candidate.refuses_device(self.arch(kind.device)) or candidate.refuses_kind(kind)
        if reason is None:
            reason = self._verdicts.get((candidate.key, kind.any_length()))
        if reason is not None:
            return Refusal(reason)
        if candidate.key not in self._kernels:
            self._kernels[candidate.key] = self._bind(candidate)
        return self._kernels[candidate.key]

    def _bind(self, candidate: Candidate) -> Kernels | Refusal:
        with Attempt() as attempt:
            return candidate.bind(self._lookup(candidate.module))
        package = candidate.module.partition(".")[0]
        if attempt.missing == package:
            return Refusal(f"package {package} is not installed")
        return Refusal(f"cannot be imported: {attempt.reason}")

    def _judge(
        self, candidate: Candidate | PackedForm, kind: CallKind, probe: Callable[[], str | None], route: str = ""
    ) -> Refusal | None:
        """Probe a candidate, or tell what a probe of this kind found before."""
        verdict = (f"{route}{candidate.key}", kind.probed())
        if verdict not in self._verdicts:
            if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return Refusal("cannot be probed while a CUDA graph is captured", lasting=False)
            try:
                self._verdicts[verdict] = probe()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return Refusal("there was no memory to probe it", lasting=False)
        reason = self._verdicts[verdict]
        return None if reason is None else Refusal(reason)


def _terms(candidate: Candidate | PackedForm, kind: CallKind) -> tuple[CallKind, float]:
    return kind.probed(), candidate.tolerance


def _probe_hosted(hosted: HostAttention, kind: CallKind, tolerance: float) -> str | None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
        return hosted(q, k, v, mask, scale, True, {})

    return probe_dense(kernel, kind, tolerance, hosted.min_tokens)
