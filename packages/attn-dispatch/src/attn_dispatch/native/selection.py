"""The attention that one name stands for: pick, run, and pick again where a backend refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_dispatch.native.catalog import SDPA, Candidate, candidates
from attn_dispatch.native.faults import Attempt
from attn_dispatch.native.kind import SHORT_TOKENS, CallKind
from attn_dispatch.native.plans import EACH_PLAN, PackedPlan, Plan
from attn_dispatch.native.varlen import PACKED_FORMS, PackedForm, attend_each, check_packed

if TYPE_CHECKING:
    from attn_dispatch.native.dispatcher import Dispatcher


class Selection:
    """The attention that one name stands for: remembers for each kind of call what answers it.

    Made by ``Dispatcher.select``.

    Attributes:
        dispatcher: Knows what works.
        name: The name, aliases resolved.
        quantised: Whether backends of 8 bits or fewer may run.
    """

    def __init__(self, dispatcher: Dispatcher, name: str, quantised: bool = True) -> None:
        self.dispatcher = dispatcher
        self.name = name
        self.quantised = quantised
        self._plans: dict[CallKind | tuple[object, ...], Plan] = {}
        self._packed: dict[CallKind, PackedPlan] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        skip_output_reshape: bool = True,
        **options: object,
    ) -> Tensor:
        """Attend with the best backend that takes such a call; see ``attn_dispatch.default.dispatch_attention``."""
        if options and self.quantised and options.get("low_precision_attention") is False:
            return self.dispatcher.select(self.name, quantised=False)(
                q,
                k,
                v,
                attn_mask,
                dropout_p,
                scale=scale,
                enable_gqa=enable_gqa,
                skip_output_reshape=skip_output_reshape,
                **options,
            )
        shape, key_shape = q.shape, k.shape
        if len(shape) != 4 or len(key_shape) != 4:
            raise ValueError(f"q and k must be [B, H, N, D], got {tuple(shape)} and {tuple(key_shape)}")
        grouped = key_shape[1] != shape[1]
        kind = (
            q.dtype,
            q.device,
            shape[3],
            v.shape[-1],
            attn_mask is not None,
            dropout_p > 0.0,
            (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
            grouped,
            key_shape[2] != shape[2],
            shape[2] <= SHORT_TOKENS,
            False,
        )
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._find(CallKind(*kind))
        if (plan.key == SDPA and not plan.own) or (grouped and not enable_gqa):
            # Heads that differ without enable_gqa are SDPA's to broadcast or to refuse.
            output = scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, False, scale=scale, enable_gqa=enable_gqa
            )
            return output if skip_output_reshape else output.transpose(1, 2).flatten(2)
        tensors = (q, k, v, attn_mask)
        if plan.key == SDPA:
            return _answer(plan, tensors, dropout_p, scale, skip_output_reshape, options)
        with Attempt() as attempt:
            return _answer(plan, tensors, dropout_p, scale, skip_output_reshape, options)
        # Outside the context: inside, the traceback would keep the failed attempt's tensors alive.
        failed = plan.key, attempt.reason or ""
        return self._instead(failed, CallKind(*kind), tensors, dropout_p, scale, skip_output_reshape, options)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_q: int,
        max_kv: int,
        scale: float | None = None,
    ) -> Tensor:
        """Attend over packed sequences; arguments: see ``attn_dispatch.default.dispatch_attention_varlen``."""
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_kv)
        gradient = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
        kind = CallKind(
            q.dtype,
            q.device,
            q.shape[2],
            v.shape[2],
            gradient=gradient,
            grouped=q.shape[1] != k.shape[1],
            varlen=True,
        )
        bounds = cu_seqlens_q, cu_seqlens_kv
        return self._run_packed(kind, (q, k, v), bounds, max_q, max_kv, scale, frozenset())

    def candidates(self, device: torch.device) -> tuple[Candidate, ...]:
        """Return what this name may mean on a device, best first, SDPA left out."""
        named = candidates(self.name, self.dispatcher.arch(device))
        return tuple(one for one in named if self.quantised or not one.quantised)

    def best(self, kind: CallKind) -> Plan:
        """Return what answers calls of a kind. May import, and probe."""
        return self._best(kind, frozenset())[0]

    def typical(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Plan:
        """Return what answers calls of a typical model: the first plan for a common head width that is not SDPA.

        Args:
            dtype: Dtype of the model; the device's best if ``None``.
            device: Where it runs; the host's device, or the default accelerator, if ``None``.
        """
        plans = [self.best(kind) for kind in self.dispatcher.typical_kinds(dtype, device)]
        return next((plan for plan in plans if plan.key != SDPA), plans[0])

    def label(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> str:
        """Say what answers calls of a typical model and, if it is not what was asked for, why; see ``typical``."""
        plan = self.typical(dtype, device)
        if plan.key != SDPA or self.name in ("auto", SDPA):
            return plan.label
        kind = self.dispatcher.typical_kinds(dtype, device)[0]
        found = ((one.key, self.dispatcher.plan(one, kind)) for one in self.candidates(kind.device))
        reasons = "; ".join(f"{key} {one.reason}" for key, one in found if not isinstance(one, Plan))
        return f"{plan.label} ({reasons})"

    def forget(self) -> None:
        """Forget which backend answers which kind of call."""
        self._plans.clear()
        self._packed.clear()

    def _find(self, kind: CallKind) -> Plan:
        plan, lasting = self._best(kind, frozenset())
        if lasting:
            self._plans[kind] = plan
        return plan

    def _best(self, kind: CallKind, failed: frozenset[str]) -> tuple[Plan, bool]:
        """Return the best plan, and whether it would be the same the next time."""
        lasting = True
        for candidate in self.candidates(kind.device):
            if candidate.key in failed:
                continue
            found = self.dispatcher.plan(candidate, kind)
            if isinstance(found, Plan):
                return found, lasting
            lasting = lasting and found.lasting
        return self.dispatcher.sdpa_plan(kind), lasting

    def _instead(
        self,
        failure: tuple[str, str],
        kind: CallKind,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
        dropout_p: float,
        scale: float | None,
        skip_output_reshape: bool,
        options: Mapping[str, object],
    ) -> Tensor:
        """Answer a call that a candidate failed in, with the next that does not fail, and remember who failed."""
        failures = dict([failure])
        while True:
            plan, _ = self._best(kind, frozenset(failures))
            if plan.key == SDPA:
                # Had the call itself been wrong, this would raise too, and nobody would be blamed.
                output = _answer(plan, tensors, dropout_p, scale, skip_output_reshape, options)
                break
            with Attempt() as attempt:
                output = _answer(plan, tensors, dropout_p, scale, skip_output_reshape, options)
                break
            failures[plan.key] = attempt.reason or ""
        for key, reason in failures.items():
            self.dispatcher.remember(key, kind, reason)
        self._plans.pop(kind, None)
        return output

    def _best_packed(self, kind: CallKind, failed: frozenset[str]) -> tuple[PackedPlan, bool]:
        lasting = True
        named: tuple[Candidate | PackedForm, ...] = (*self.candidates(kind.device), *PACKED_FORMS)
        for candidate in named:
            if candidate.key in failed:
                continue
            found = self.dispatcher.packed_plan(candidate, kind)
            if isinstance(found, PackedPlan):
                return found, lasting
            lasting = lasting and found.lasting
        return EACH_PLAN, lasting

    def _run_packed(
        self,
        kind: CallKind,
        tensors: tuple[Tensor, Tensor, Tensor],
        bounds: tuple[Tensor, Tensor],
        max_q: int,
        max_kv: int,
        scale: float | None,
        failed: frozenset[str],
    ) -> Tensor:
        plan = self._packed.get(kind) if not failed else None
        if plan is None:
            plan, lasting = self._best_packed(kind, failed)
            if lasting and not failed:
                self._packed[kind] = plan
        if plan is EACH_PLAN:
            # Bounds that are on the host already stay there.
            return attend_each(*tensors, *bounds, max_q, max_kv, scale)
        cu_q, cu_kv = (one.to(kind.device, torch.int32).contiguous() for one in bounds)
        with Attempt() as attempt:
            return plan.kernel(*tensors, cu_q, cu_kv, max_q, max_kv, scale)
        output = self._run_packed(kind, tensors, bounds, max_q, max_kv, scale, failed | {plan.key})
        self.dispatcher.remember(plan.key, kind, attempt.reason or "")
        self._packed.pop(kind, None)
        return output


def _answer(
    plan: Plan,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    dropout_p: float,
    scale: float | None,
    skip_output_reshape: bool,
    options: Mapping[str, object],
) -> Tensor:
    q, k, v, mask = tensors
    if plan.hosted is not None and (plan.own or options):
        return plan.hosted(q, k, v, mask, scale, skip_output_reshape, options)
    if plan.kernel is None:
        gqa = q.shape[1] != k.shape[1]
        output = scaled_dot_product_attention(q, k, v, mask, dropout_p, False, scale=scale, enable_gqa=gqa)
    else:
        output = plan.kernel(q, k, v, mask, dropout_p, scale)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)
