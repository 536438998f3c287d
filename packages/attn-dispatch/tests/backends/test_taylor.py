import math
import re
from dataclasses import replace

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionFallback,
    AttentionRouter,
    Backend,
    FidelityProbe,
    LayerKey,
    Route,
    RunObserver,
    SdpaMode,
    StepContext,
)
from attn_dispatch.backends import Reason, TaylorBackend, TaylorBackendConfig
from attn_dispatch.backends import taylor as taylor_module
from attn_dispatch.testing import TinyDiT
from attn_kernels import relative_l2, softmax_attention

QUIET = replace(
    TaylorBackendConfig(),
    P=3,
    sub_head_blocks=1,
    block_size_q=512,
    block_size_k=512,
    early_probe=False,
    fallback_on_negative=False,
    quality_check=False,
    log_shapes=False,
    log_steps=False,
)


def series(call: AttentionCall, config: TaylorBackendConfig) -> torch.Tensor:
    """The truncated series pairwise in float64, block after block, without centring."""
    outs = []
    for q, k, v in zip(
        *(x.double().chunk(config.sub_head_blocks, dim=3) for x in (call.q, call.k, call.v)), strict=True
    ):
        if config.qk_norm_power:
            q, k = (x / (x.norm(dim=-1, keepdim=True) + config.eps) ** config.qk_norm_power for x in (q, k))
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale * math.sqrt(config.sub_head_blocks)
        scores = config.scale_mul * scale * q @ k.transpose(-1, -2)
        weights = sum(scores**degree / math.factorial(degree) for degree in range(config.P))
        if call.key_mask is not None:
            weights = weights * call.key_mask[:, None, None]
        outs.append(weights @ v / weights.sum(-1, keepdim=True))
    return torch.cat(outs, dim=3).float()


def test_it_is_a_backend_that_watches_runs() -> None:
    backend: Backend = TaylorBackend()
    assert backend.name == "taylor"
    assert isinstance(backend, RunObserver)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"P": 5},
        {"sub_head_blocks": 2},
        {"sub_head_blocks": 4, "P": 4},
        {"scale_mul": 0.6},
        {"qk_norm_power": 0.5},
        {"qk_norm_power": 0.5, "sub_head_blocks": 2, "scale_mul": 1.3},
        {"denom_fp32": False, "force_fp32": True},
        {"fused_kernel": True, "fused_feature_chunk_size": 128},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_answers_are_the_truncated_series(changes: dict[str, object], masked: bool, make_call) -> None:
    call = make_call(kv_tokens=143)
    if masked:
        keep = torch.rand(1, 143, generator=torch.Generator().manual_seed(4)) > 0.3
        hidden = call.k.masked_fill(~keep[:, None, :, None], float("nan"))
        call = replace(call, key_mask=keep, k=hidden)
    config = replace(QUIET, centre=False, **changes)  # type: ignore[arg-type]
    expected = series(replace(call, k=call.k.nan_to_num()), config)
    torch.testing.assert_close(TaylorBackend(config)(call), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_scale_of_the_call_is_kept(blocks: int, make_call) -> None:
    call = replace(make_call(), scale=0.11)
    config = replace(QUIET, centre=False, sub_head_blocks=blocks)
    torch.testing.assert_close(TaylorBackend(config)(call), series(call, config), rtol=2e-4, atol=2e-5)
    assert relative_l2(TaylorBackend(config)(call), TaylorBackend(config)(replace(call, scale=None))) > 0.01


def test_more_terms_are_nearer_to_attention_and_sub_heads_never_are(make_call) -> None:
    call = make_call(logit_std=0.7)
    exact = softmax_attention(call.q, call.k, call.v).out
    error = {
        (terms, blocks): float(relative_l2(TaylorBackend(replace(QUIET, P=terms, sub_head_blocks=blocks))(call), exact))
        for terms in (3, 5)
        for blocks in (1, 4)
    }
    assert error[5, 1] < 0.5 * error[3, 1] < 0.2
    assert min(error[3, 4], error[5, 4]) > 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_dtype_of_the_call_comes_back(dtype: torch.dtype, blocks: int, make_call) -> None:
    call = make_call(dtype=dtype)
    for changes in ({}, {"force_fp32": True}, {"denom_fp32": False}):
        config = replace(QUIET, centre=False, sub_head_blocks=blocks, **changes)
        output = TaylorBackend(config)(call)
        assert output.dtype is dtype
        assert relative_l2(output.float(), series(call, config)) < 0.02


def test_rounded_denominators_are_those_of_the_dtype(make_call) -> None:
    call = make_call(dtype=torch.bfloat16)
    config = replace(QUIET, centre=False, force_fp32=False)
    exact, rounded = (TaylorBackend(replace(config, denom_fp32=on))(call).float() for on in (True, False))
    factor = (rounded / exact).nanmedian(dim=3).values
    scores = call.q.double() @ call.k.double().transpose(-1, -2) / 4
    den = (1 + scores + scores**2 / 2).sum(-1)
    expected = den / den.to(torch.bfloat16).double()
    # The answers themselves are rounded to bfloat16, whence the tolerance and the median.
    torch.testing.assert_close(factor.double(), expected, rtol=4e-3, atol=0)
    assert (expected - 1).abs().max() > 2e-3


REASONS = [
    ({}, {"q": torch.zeros(1, 160, 16)}, Reason.Q_SHAPE),
    ({}, {"v": torch.zeros(1, 2, 12)}, Reason.KV_SHAPE),
    ({}, {name: torch.zeros(1, 160, 32) for name in "qkv"}, Reason.QKV_SHAPE),
    ({}, {"k": torch.zeros(1, 1, 160, 16)}, Reason.HEADS),
    ({}, {"q": torch.zeros(3, 2, 160, 16)}, Reason.BATCH),
    ({}, {"q": torch.zeros(1, 2, 160, 8)}, Reason.HEAD_DIM),
    ({}, {"v": torch.zeros(1, 2, 159, 16)}, Reason.KV_DIM),
    ({"allow_cross_attention": False}, {"q": torch.zeros(1, 2, 9, 16)}, Reason.CROSS),
    ({"min_tokens": 161}, {}, Reason.MIN_TOKENS),
    ({}, {"attn_bias": torch.zeros(160)}, Reason.MASK_VALUES),
    ({}, {"key_mask": torch.ones(1, 99, dtype=torch.bool)}, Reason.MASK_SHAPE),
    ({}, {"attn_bias": torch.zeros(160, 160)}, Reason.MASK_PER_QUERY),
    ({}, {"attn_bias": torch.zeros(2, 1, 160)}, Reason.MASK_PER_HEAD),
    ({"sub_head_blocks": 3}, {}, Reason.SUB_HEADS),
    ({"sub_head_blocks": 8}, {}, Reason.SUB_HEADS),
    ({"max_head_dim": 15}, {}, Reason.HEAD_DIM_LARGE),
    ({"max_feature_dim_R": 152}, {}, Reason.FEATURE_DIM_LARGE),
    ({"taylor_sigma_max": 0.4}, {}, Reason.SIGMA),
    ({"taylor_layer_start": 4}, {}, Reason.LAYER),
    ({"early_probe": True}, {"q": torch.full((1, 2, 160, 16), float("nan"))}, Reason.DENOMINATOR_INVALID),
    ({"fallback_on_negative": True}, {"q": torch.full((1, 2, 160, 16), float("inf"))}, Reason.DENOMINATOR_INVALID),
]


@pytest.mark.parametrize(("options", "change", "reason"), REASONS, ids=[str(case[2]) for case in REASONS])
def test_every_reason_is_counted_once_and_native_answers(options, change, reason, make_call) -> None:
    call = replace(make_call(), **change)
    router = AttentionRouter([Route(TaylorBackend(replace(QUIET, **options)))])
    answer = torch.zeros(call.q.shape)
    assert router(call, lambda asked: answer) is answer
    ((counted, times),) = router.report.declines().items()
    assert counted.startswith(f"{reason}: ")
    assert times == 1
    assert router.report.counts() == {"native": 1}


def test_denominators_that_are_too_small_are_a_reason(make_call) -> None:
    call = make_call(opposed=4)
    even = replace(QUIET, P=4, centre=False)
    assert TaylorBackend(even)(call).isnan().all(dim=3).float().mean() == pytest.approx(0.4, abs=0.05)
    for checks in ({"fallback_on_negative": True}, {"fallback_on_negative": True, "early_probe": True}):
        router = AttentionRouter([Route(TaylorBackend(replace(even, **checks)))])
        router(call, lambda asked: asked.q)
        ((reason, times),) = router.report.declines().items()
        assert re.fullmatch(r"denominator_too_small: denominator below eps in (3|4)\d(\.\d+)?% of queries", reason)
        assert times == 1
    odd = replace(even, P=3, early_probe=True, fallback_on_negative=True)
    assert TaylorBackend(odd)(call).isfinite().all()


def test_blocks_make_narrow_heads(make_call) -> None:
    config = replace(QUIET, sub_head_blocks=4, max_head_dim=4, max_feature_dim_R=15)
    assert TaylorBackend(config).refuses(make_call()) is None
    assert TaylorBackend(replace(config, max_head_dim=3)).refuses(make_call()) == (
        "head_dim_too_large: 4 is more than max_head_dim=3"
    )
    assert TaylorBackend(replace(config, max_feature_dim_R=14)).refuses(make_call()) == (
        "feature_dim_too_large: R=15 is more than max_feature_dim_R=14 (head_dim=4, P=3, sub_head_blocks=4)"
    )


def test_a_masked_key_that_is_not_a_number_is_not_to_blame(make_call) -> None:
    call = make_call(opposed=4)
    keep = torch.arange(160)[None] < 100
    call = replace(call, key_mask=keep, k=call.k.masked_fill(~keep[:, None, :, None], float("nan")))
    with pytest.raises(AttentionFallback, match="denominator_too_small"):
        TaylorBackend(replace(QUIET, P=4, centre=False, fallback_on_negative=True))(call)


def test_a_backend_can_be_switched_off(make_call) -> None:
    backend = TaylorBackend(QUIET)
    call = make_call()
    assert backend.refuses(call) is None
    backend.enabled = False
    assert backend.refuses(call) == "disabled: the backend is switched off"


def test_the_early_probe_spares_the_values(make_call, watcher) -> None:
    even = replace(QUIET, P=4, centre=False, early_probe=True, fallback_on_negative=True)
    seen = watcher.run(even, make_call(opposed=4))
    assert seen.probed == [16]
    assert seen.operator == []
    assert seen.reasons[0].startswith("denominator_too_small: ")
    assert len(watcher.run(even, make_call()).operator) == 1


def test_the_early_probe_tolerates_what_is_allowed_and_only_looks_without_fallback(make_call, watcher) -> None:
    even = replace(QUIET, P=4, centre=False, early_probe=True)
    assert watcher.run(even, make_call(opposed=4)).reasons == []
    tolerant = replace(even, fallback_on_negative=True, denom_fallback_frac_limit=0.6)
    assert watcher.run(tolerant, make_call(opposed=4)).reasons == []


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_tolerated_share_of_bad_denominators_is_answered_exactly(blocks: int, make_call) -> None:
    call = make_call(opposed=10)
    bare = replace(QUIET, P=4, centre=False, sub_head_blocks=blocks)
    series_alone = TaylorBackend(bare)(call)
    bad = series_alone.isnan().any(dim=3)
    assert 0 < bad.float().mean() < 0.5
    repaired = TaylorBackend(replace(bare, fallback_on_negative=True, denom_fallback_frac_limit=0.5))(call)
    exact = softmax_attention(call.q, call.k, call.v).out
    torch.testing.assert_close(repaired[bad], exact[bad], rtol=1e-4, atol=1e-5)
    assert torch.equal(repaired[~bad], series_alone[~bad])


def test_without_a_check_a_bad_denominator_is_never_a_number(make_call) -> None:
    call = make_call(opposed=4)
    output = TaylorBackend(replace(QUIET, P=4, centre=False))(call)
    scores = call.q.double() @ call.k.double().transpose(-1, -2) / 4
    den = (1 + scores + scores**2 / 2 + scores**3 / 6).sum(-1)
    assert torch.equal(output.isnan().all(dim=3), den < 0)


def test_masked_keys_may_hold_anything_in_checks_too(make_call) -> None:
    call = make_call()
    keep = torch.arange(160)[None] < 100
    k = call.k.masked_fill(~keep[:, None, :, None], float("nan"))
    config = replace(QUIET, early_probe=True, fallback_on_negative=True, quality_check=True)
    clean = TaylorBackend(config)(replace(call, key_mask=keep))
    assert torch.equal(TaylorBackend(config)(replace(call, k=k, key_mask=keep)), clean)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, 0),
        ({"quality_check": True, "log_steps": True, "sub_head_blocks": 4}, 0),
        ({"early_probe": True}, 1),
        ({"fallback_on_negative": True}, 1),
        ({"early_probe": True, "fallback_on_negative": True}, 2),
    ],
)
def test_the_device_is_read_only_for_the_checks_that_were_asked_for(changes, reads: int, make_call, host_reads) -> None:
    backend = TaylorBackend(replace(QUIET, **changes))
    call = make_call()
    with host_reads() as mode:
        assert backend.refuses(call) is None
        backend(call)
    assert len(mode.seen) == reads


def test_a_run_can_be_repeated(make_call, watcher) -> None:
    config = replace(QUIET, quality_check=True, log_steps=True)
    backend = TaylorBackend(config)
    for _ in range(2):
        backend.begin_run()
        backend(make_call())
        backend.end_run()
    first, second = backend.steps
    assert first.quality_raw == second.quality_raw
    assert first.diag == second.diag


def test_reasons_are_logged_once_a_run(make_call, watcher) -> None:
    seen = watcher.run(replace(QUIET, min_tokens=1000), make_call(), make_call(), make_call(tokens=99))
    assert [line for line in seen.logs if "exact attention" in line] == [
        "Taylor attention leaves calls to exact attention: below_min_tokens: 160 tokens are fewer than 1000"
    ]


def test_effective_is_the_call_that_is_approximated(make_call) -> None:
    call = make_call(logit_std=0.5)
    config = replace(QUIET, P=7, qk_norm_power=0.5, scale_mul=0.8)
    changed = TaylorBackend(config).effective(call)
    exact = softmax_attention(changed.q, changed.k, changed.v, scale=changed.scale).out
    torch.testing.assert_close(TaylorBackend(config)(call), exact, rtol=1e-3, atol=1e-4)
    assert TaylorBackend(replace(config, sub_head_blocks=4)).effective(call) is call


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_probe_measures_it_in_both_ways(blocks: int, make_call) -> None:
    config = replace(QUIET, P=5, scale_mul=0.5, sub_head_blocks=blocks)
    probe = FidelityProbe(AttentionRouter([Route(TaylorBackend(config))]))
    probe.begin_run()
    probe(make_call(), lambda asked: softmax_attention(asked.q, asked.k, asked.v, scale=asked.scale).out)
    probe.end_run()
    (row,) = probe.rows()
    if blocks == 1:
        assert row.effective_relative_l2 < 0.2 * row.relative_l2
    else:
        assert row.effective_relative_l2 == row.relative_l2


def test_gradients_flow_where_they_are_wanted(make_call) -> None:
    call = make_call(tokens=40)
    q = call.q.clone().requires_grad_()
    config = replace(QUIET, min_tokens=1)
    with torch.enable_grad():
        TaylorBackend(config)(replace(call, q=q)).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_a_model_runs_with_it_end_to_end() -> None:
    model = TinyDiT()
    inputs = model.example(12, 12)
    layers = iter([LayerKey("double", 0), LayerKey("double", 1), *(LayerKey("single", index) for index in range(3))])
    backend = TaylorBackend(replace(QUIET, P=5, taylor_layer_start=1, log_steps=True))
    router = AttentionRouter([Route(backend)])
    with torch.no_grad():
        exact = model(**inputs)
        router.begin_run()
        with SdpaMode(router, describe=lambda q, k: (next(layers), StepContext(0.75), None)):
            output = model(**inputs)
        router.end_run()
    assert router.report.counts() == {"native": 2, "taylor": 3}
    assert router.report.declines() == {
        "skipped_by_layer: layer double:0 is outside 1..": 1,
        "skipped_by_layer: layer single:0 is outside 1..": 1,
    }
    assert 0 < relative_l2(output, exact) < 0.4
    (step,) = backend.steps
    assert (step.calls, step.taylor_calls, step.fallback_reasons) == (5, 3, {"skipped_by_layer": 2})


def test_other_errors_pass(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(taylor_module, "taylor_attention", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        TaylorBackend(QUIET)(make_call())
    with pytest.raises(AttentionFallback):
        TaylorBackend(replace(QUIET, early_probe=True))(replace(make_call(), q=make_call().q * float("nan")))
