"""Whatever ComfyUI asks: no error that it would not have had itself, and not one bit changed where we decline."""

from dataclasses import fields
from typing import Any

import torch
from attn_dispatch import AttentionRouter, FiniteBackend, NativeHandler, Route
from attn_dispatch.backends import (
    HybridBackend,
    HybridBackendConfig,
    NearFarBackend,
    TaylorBackend,
    TaylorBackendConfig,
    options_of,
)
from attn_kernels import NearFarConfig
from hypothesis import event, given, settings
from hypothesis import strategies as st

from .host_calls import HostCall, host_calls, same

NEVER = (lambda call: "not today",)

near_far_configs = st.builds(
    NearFarConfig,
    # Small: settings that keep everything exact are declined.
    tile=st.integers(1, 3) | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    radius=st.sampled_from((0, 0, 1, 2)),
    top_k=st.integers(0, 2),
    exact_queries=st.sampled_from(("exact", "pooled")),
)


@st.composite
def configurations(draw: st.DrawFn, kind: Any, preferred: dict[str, st.SearchStrategy[Any]]) -> Any:
    """An option dictionary with everything in its range; ranges that make no sense are drawn again."""
    chosen: dict[str, Any] = {}
    for name, default, known in options_of(kind):
        if name in preferred:
            chosen[name] = draw(preferred[name])
        elif not draw(st.booleans()):
            continue
        elif isinstance(default, bool):
            chosen[name] = draw(st.booleans())
        elif isinstance(default, str):
            chosen[name] = draw(st.sampled_from(known.choices))
        elif isinstance(default, int):
            chosen[name] = draw(st.integers(int(known.minimum or 0), int(min(known.maximum or 64, 4096))))
        else:
            chosen[name] = draw(st.floats(known.minimum or 0.0, known.maximum or 1.0))
    try:
        return kind(**chosen)
    except ValueError:
        return kind(**{name: value for name, value in chosen.items() if name in preferred})


SMALL = {
    "min_tokens": st.just(0),
    "P": st.integers(1, 4),
    # Nothing is written to disk, nothing said.
    "log_shapes": st.just(False),
    "log_fallbacks": st.just(False),
    "log_steps": st.just(False),
}
taylor_configs = configurations(TaylorBackendConfig, SMALL)
hybrid_configs = configurations(
    HybridBackendConfig,
    {
        name: strategy
        for name, strategy in {**SMALL, "log_quality_stats": st.just(False)}.items()
        if name in {field.name for field in fields(HybridBackendConfig)}
    },
)


@given(call=host_calls())
@settings(settings.get_profile("hardening"))
def test_declining_changes_no_bit_and_no_error(call: HostCall) -> None:
    expected = call.natively()
    event("native raises" if isinstance(expected, Exception) else "native answers")
    backends = (NearFarBackend(), TaylorBackend(TaylorBackendConfig.recommended()), HybridBackend())
    for handler in (
        AttentionRouter(()),
        NativeHandler(),
        AttentionRouter([Route(backend, NEVER) for backend in backends]),
    ):
        assert same(call.routed(handler), expected)


def check(call: HostCall, router: AttentionRouter) -> None:
    """No error of ours; the native bits where native answered; and an answer of the right form where it did not."""
    expected, got = call.natively(), call.routed(router)
    if isinstance(expected, Exception):
        event("native raises")
        return
    assert not isinstance(got, Exception), repr(got)
    counts = router.report.counts()
    if set(counts) <= {"native"}:
        event("declined")
        assert same(got, expected)
    else:
        event("approximated")
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@given(call=host_calls(), config=near_far_configs)
@settings(settings.get_profile("hardening"))
def test_near_far_answers_or_declines(call: HostCall, config: NearFarConfig) -> None:
    check(call, AttentionRouter([Route(NearFarBackend(config))]))


@given(call=host_calls(), config=taylor_configs)
@settings(settings.get_profile("hardening"))
def test_taylor_with_any_options_answers_or_declines(call: HostCall, config: TaylorBackendConfig) -> None:
    check(call, AttentionRouter([Route(TaylorBackend(config))]))


@given(call=host_calls(), config=hybrid_configs)
@settings(settings.get_profile("hardening"))
def test_hybrid_with_any_options_answers_or_declines(call: HostCall, config: HybridBackendConfig) -> None:
    check(call, AttentionRouter([Route(HybridBackend(config))]))


@given(call=host_calls(), terms=st.sampled_from((2, 3, 4)))
@settings(settings.get_profile("hardening"))
def test_nothing_that_is_not_finite_leaves_where_native_is_finite(call: HostCall, terms: int) -> None:
    """An even number of terms without its denominator check is the worst that a user can set."""
    config = TaylorBackendConfig(P=terms, min_tokens=0, sub_head_blocks=1, fallback_on_negative=False, centre=False)
    expected = call.natively()
    got = call.routed(AttentionRouter([Route(FiniteBackend(TaylorBackend(config)))]))
    if not isinstance(expected, Exception) and bool(torch.isfinite(expected).all()):
        assert not isinstance(got, Exception), repr(got)
        assert bool(torch.isfinite(got).all())
