import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, Backend, LayerKey, Route, SdpaMode, StepContext, TokenLayout
from attn_dispatch.backends import HybridBackend, HybridBackendConfig, Reason, options_of
from attn_dispatch.backends import hybrid as hybrid_module
from attn_dispatch.testing import TinyDiT
from attn_kernels import TokenGrid, relative_l2, softmax_attention
from attn_kernels.cost import AttentionShape, exact_work
from attn_kernels.testing import make_qkv

TEXT_FIRST = TokenLayout(7 + 144, ((0, 7),), (TokenGrid(7, 12, 12),))
TEXT_LAST = TokenLayout(144 + 7, ((144, 151),), (TokenGrid(0, 12, 12),))
BASE = HybridBackendConfig(local_window=16, local_chunk=4, global_dim=6, global_P=3, global_weight=0.7, log_steps=False)
GRID = replace(BASE, radius=2, global_weight=1.0)


def grid_call(layout: TokenLayout = TEXT_FIRST, *, seed: int = 0, batch: int = 1) -> AttentionCall:
    """Queries and keys that vary smoothly over the image, as those of real models do."""
    q, k, v = make_qkv(
        batch, 2, layout.length, 16, dtype=torch.float32, seed=seed, logit_std=1.0, smooth_grid=layout.grids[0]
    )
    return AttentionCall(q, k, v, layer=LayerKey("single", 3), step=StepContext(0.5), layout=layout)


def exactly(call: AttentionCall) -> torch.Tensor:
    return softmax_attention(call.q, call.k, call.v, scale=call.scale, key_mask=call.key_mask).out


class Seen:
    """What a backend asked of the operators, and what came of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fitted: list[tuple[int, int, str]] = []
        self.outputs: list[torch.Tensor] = []
        self.low: list[torch.dtype] = []
        self.reasons: list[str] = []
        self.logs: list[str] = []
        self.record: dict[str, Any] = {}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    operators = {
        name: getattr(hybrid_module, name)
        for name in ("hybrid_attention", "window_attention", "window_attention_2d", "fit_projection")
    }

    def run(config: HybridBackendConfig, *calls: AttentionCall) -> Seen:
        seen = Seen()

        def spy(name: str):
            def operator(*args: Any, **kwargs: Any) -> Any:
                plain = {key: value for key, value in kwargs.items() if key not in ("low", "key_mask")}
                seen.asked.append((name, plain))
                if "low" in kwargs:
                    seen.low.append(kwargs["low"][0].dtype)
                return operators[name](*args, **kwargs)

            return operator

        def fit(q: torch.Tensor, k: torch.Tensor, **kwargs: Any) -> Any:
            seen.fitted.append((q.shape[2], k.shape[2], kwargs["method"]))
            return operators["fit_projection"](q, k, **kwargs)

        for name in ("hybrid_attention", "window_attention", "window_attention_2d"):
            monkeypatch.setattr(hybrid_module, name, spy(name))
        monkeypatch.setattr(hybrid_module, "fit_projection", fit)
        caplog.clear()
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        backend = HybridBackend(config, record_path=path)
        with caplog.at_level(logging.INFO, "attn_dispatch"):
            backend.begin_run()
            for call in calls:
                reason = backend.refuses(call)
                if reason is None:
                    seen.outputs.append(backend(call))
                else:
                    seen.reasons.append(reason)
            backend.end_run()
        seen.logs = [record.getMessage() for record in caplog.records]
        seen.record = json.loads(path.read_text()) if path.exists() else {}
        return seen

    return run


RAMP = {"local_window_sigma_high": 1.0, "local_window_min": 8, "local_window_max": 40}
PLAIN, LAID = {}, {"layout": TEXT_FIRST}
CASES = [
    ("local_window", BASE, 20, PLAIN, "outputs"),
    ("local_window_min", replace(BASE, **RAMP), 20, PLAIN, "outputs"),
    ("local_window_max", replace(BASE, **RAMP), 20, PLAIN, "outputs"),
    ("local_window_sigma_low", replace(BASE, **RAMP), 0.4, PLAIN, "outputs"),
    ("local_window_sigma_high", replace(BASE, **RAMP), 2.0, PLAIN, "outputs"),
    ("local_chunk", BASE, 16, PLAIN, "outputs"),
    ("prefix_tokens", BASE, 9, PLAIN, "outputs"),
    ("global_dim", BASE, 3, PLAIN, "outputs"),
    ("global_P", BASE, 4, PLAIN, "outputs"),
    ("global_weight", BASE, 0.3, PLAIN, "outputs"),
    ("global_sigma_low", replace(BASE, global_sigma_high=1.0), 0.3, PLAIN, "outputs"),
    ("global_sigma_high", BASE, 1.0, PLAIN, "outputs"),
    ("global_scale_mul", BASE, 0.5, PLAIN, "outputs"),
    ("global_norm_power", BASE, 0.5, PLAIN, "outputs"),
    ("global_norm_clip", BASE, 0.5, PLAIN, "outputs"),
    ("use_pca", BASE, False, PLAIN, "outputs"),
    ("pca_samples", BASE, 50, PLAIN, "fitted"),
    ("allow_cross_attention", BASE, False, {"q": torch.zeros(1, 2, 9, 16)}, "reasons"),
    ("layer_start", BASE, 4, PLAIN, "reasons"),
    ("layer_end", BASE, 2, PLAIN, "reasons"),
    ("eps", replace(BASE, global_norm_power=0.5), 1e-2, PLAIN, "outputs"),
    ("force_fp32", BASE, False, {"dtype": torch.bfloat16}, "low"),
    ("log_steps", BASE, True, PLAIN, "logs"),
    ("log_quality_stats", BASE, True, PLAIN, "record"),
    ("combine", BASE, "additive", PLAIN, "outputs"),
    ("basis", BASE, "pca", PLAIN, "outputs"),
    ("radius", BASE, 2, LAID, "outputs"),
    ("keep_text", BASE, False, LAID, "outputs"),
]


def shaped(call: AttentionCall, change: dict[str, Any]) -> AttentionCall:
    dtype = change.get("dtype", torch.float32)
    call = replace(call, **{"layout": None, **{key: value for key, value in change.items() if key != "dtype"}})
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def test_no_option_is_forgotten() -> None:
    assert [case[0] for case in CASES] == [one.name for one in options_of(HybridBackendConfig)]


@pytest.mark.parametrize(("name", "config", "value", "change", "where"), CASES, ids=[case[0] for case in CASES])
def test_an_option_changes_what_it_says(name, config, value, change, where, watch) -> None:
    assert getattr(config, name) != value
    call = shaped(grid_call(), change)
    seen, again, other = (watch(one, call) for one in (config, config, replace(config, **{name: value})))
    first, repeated, changed = (getattr(one, where) for one in (seen, again, other))
    assert same(first, repeated), "the observation itself is not repeatable"
    assert not same(first, changed)


def same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def test_it_is_a_backend() -> None:
    backend: Backend = HybridBackend()
    assert backend.name == "hybrid"


@pytest.mark.parametrize("layout", [TEXT_FIRST, TEXT_LAST], ids=["text first", "text last"])
def test_one_denominator_is_nearer_to_attention_than_adding_and_than_the_window_alone(layout: TokenLayout) -> None:
    call = grid_call(layout)
    configs = {
        "shared": GRID,
        "additive": replace(GRID, combine="additive", global_weight=0.1),
        "alone": replace(GRID, global_weight=0.0),
    }
    error = {name: float(relative_l2(HybridBackend(one)(call), exactly(call))) for name, one in configs.items()}
    assert error["shared"] < 0.5 * min(error["additive"], error["alone"])


def test_more_neighbours_are_nearer_to_attention() -> None:
    call = grid_call()
    errors = [float(relative_l2(HybridBackend(replace(GRID, radius=r))(call), exactly(call))) for r in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.75 * errors[0]


def test_without_weight_the_window_alone_answers(watch) -> None:
    seen = watch(replace(BASE, global_weight=0.0), grid_call())
    assert [name for name, _ in seen.asked] == ["window_attention"]
    assert not seen.fitted
    seen = watch(replace(GRID, global_sigma_high=0.5), grid_call())
    assert [name for name, _ in seen.asked] == ["window_attention_2d"]


def test_adding_is_a_window_and_a_weighted_rest() -> None:
    call = grid_call()
    added = HybridBackend(replace(BASE, combine="additive", global_weight=0.6))(call)
    half = HybridBackend(replace(BASE, combine="additive", global_weight=0.3))(call)
    alone = HybridBackend(replace(BASE, global_weight=0.0))(call)
    torch.testing.assert_close(added - alone, 2 * (half - alone), rtol=1e-3, atol=1e-5)
    constant = replace(call, v=torch.ones_like(call.v))
    rest = HybridBackend(replace(BASE, combine="additive", global_weight=0.6))(constant)
    torch.testing.assert_close(rest, torch.full_like(rest, 1.6), rtol=1e-3, atol=1e-3)
    shared = HybridBackend(BASE)(constant)
    torch.testing.assert_close(shared, torch.ones_like(shared), rtol=1e-3, atol=1e-3)


MASKED = {
    "flat": BASE,
    "grid": GRID,
    "additive": replace(BASE, combine="additive"),
    "window alone": replace(BASE, global_weight=0.0),
    "neighbourhood alone": replace(GRID, global_weight=0.0),
}


@pytest.mark.parametrize("config", MASKED.values(), ids=MASKED.keys())
def test_masks_of_any_batch_hide_keys(config: HybridBackendConfig) -> None:
    call = grid_call(batch=3)
    keep = torch.rand(3, 151, generator=torch.Generator().manual_seed(5)) > 0.3
    masked = replace(call, key_mask=keep)
    other = replace(
        masked,
        v=call.v.masked_fill(~keep[:, None, :, None], 1e4),
        k=call.k.masked_fill(~keep[:, None, :, None], 7.0),
    )
    # The same tokens make the same coordinates.
    backend = HybridBackend(replace(config, use_pca=False))
    torch.testing.assert_close(backend(masked), backend(other), rtol=1e-4, atol=1e-4)
    rows = torch.cat(
        [
            backend(
                replace(masked, q=call.q[b : b + 1], k=call.k[b : b + 1], v=call.v[b : b + 1], key_mask=keep[b : b + 1])
            )
            for b in range(3)
        ]
    )
    torch.testing.assert_close(backend(masked), rows, rtol=1e-4, atol=1e-4)


def test_text_that_comes_first_is_seen_by_every_query(watch) -> None:
    assert watch(BASE, grid_call()).asked[0][1]["prefix"] == 7
    assert watch(replace(BASE, prefix_tokens=11), grid_call()).asked[0][1]["prefix"] == 11
    assert watch(replace(BASE, prefix_tokens=3), grid_call(TEXT_LAST)).asked[0][1]["prefix"] == 3
    assert watch(replace(BASE, prefix_tokens=300), replace(grid_call(), layout=None)).asked[0][1]["prefix"] == 151
    other = TokenLayout(9, ((0, 4),), (TokenGrid(4, 1, 5),))
    assert watch(BASE, replace(grid_call(), layout=other)).asked[0][1]["prefix"] == 0


def test_every_layer_has_its_own_coordinates_for_one_run(watch) -> None:
    calls = [replace(grid_call(seed=i % 2), layer=LayerKey("single", i % 2)) for i in range(6)]
    seen = watch(BASE, *calls)
    assert len(seen.fitted) == 2
    backend = HybridBackend(BASE)
    backend.begin_run()
    for call in calls[:2]:
        backend(call)
    first, second = backend.projections.values()
    assert not torch.allclose(first.q_basis, second.q_basis, atol=1e-3)
    alone = HybridBackend(BASE)
    torch.testing.assert_close(alone(calls[1]), backend(calls[1]))
    backend.begin_run()
    assert not backend.projections
    backend(calls[0])
    backend.end_run()
    assert not backend.projections


def test_a_layer_without_a_name_or_of_another_width_is_fitted_anew(watch) -> None:
    nameless = replace(grid_call(), layer=None)
    assert len(watch(BASE, nameless, nameless).fitted) == 2
    call = grid_call()
    narrow = replace(call, q=call.q[..., :8], k=call.k[..., :8])
    assert len(watch(BASE, call, narrow, narrow).fitted) == 2


def test_coordinates_are_fitted_to_a_sample(watch) -> None:
    assert watch(BASE, grid_call()).fitted == [(151, 151, "bilinear")]
    assert watch(replace(BASE, pca_samples=50, basis="pca"), grid_call()).fitted == [(50, 50, "pca")]
    assert watch(replace(BASE, pca_samples=0), grid_call()).fitted == [(151, 151, "bilinear")]
    assert watch(replace(BASE, use_pca=False), grid_call()).fitted == []


def test_masked_keys_do_not_count_in_the_fit() -> None:
    call = grid_call()
    keep = torch.arange(151)[None] % 3 > 0
    masked = replace(call, key_mask=keep)
    hidden = replace(masked, k=call.k.masked_fill(~keep[:, None, :, None], float("nan")))
    for samples in (0, 50):
        outputs = [HybridBackend(replace(BASE, pca_samples=samples))(one) for one in (masked, hidden)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_a_scale_of_the_call_is_kept(watch) -> None:
    call = replace(grid_call(), scale=0.11)
    asked = watch(replace(BASE, global_scale_mul=0.5), call).asked[0][1]
    assert asked["scale"] == 0.11
    assert asked["low_scale"] == pytest.approx(0.055)
    assert watch(BASE, grid_call()).asked[0][1]["low_scale"] == pytest.approx(0.25)


def test_cross_attention_without_a_grid(watch) -> None:
    call = replace(grid_call(), q=grid_call().q[:, :, :40], layout=None)
    (output,) = watch(BASE, call).outputs
    assert output.shape == (1, 2, 40, 16)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (BASE, {"q": torch.zeros(1, 151, 16)}, Reason.Q_SHAPE),
        (BASE, {"k": torch.zeros(1, 1, 151, 16)}, Reason.HEADS),
        (BASE, {"attn_bias": torch.zeros(151, 151)}, Reason.MASK_PER_QUERY),
        (replace(BASE, allow_cross_attention=False), {"q": torch.zeros(1, 2, 9, 16)}, Reason.CROSS),
        (replace(BASE, layer_start=4), {}, Reason.LAYER),
        (GRID, {"layout": None}, "the host does not say where text and image tokens lie"),
        (GRID, {"layout": TokenLayout(9, (), (TokenGrid(0, 3, 3),))}, "the layout describes 9 tokens"),
        (GRID, {"q": torch.zeros(1, 2, 9, 16)}, "a neighbourhood on the image grid is of self-attention only"),
        (replace(GRID, radius=11), {}, "a radius of 11 covers the image grid, so exact attention answers"),
        (replace(BASE, local_window=150), {}, "a window of 150 covers every key, so exact attention answers"),
        (replace(BASE, local_window=0), {}, "a window of 151 covers every key, so exact attention answers"),
    ],
)
def test_what_it_cannot_answer_is_refused(config, change, reason: str) -> None:
    answer = HybridBackend(config).refuses(replace(grid_call(), **change))
    assert answer is not None
    assert answer.startswith(reason)


def test_all_near_keys_and_an_added_rest_are_answered() -> None:
    config = replace(BASE, local_window=0, combine="additive", global_weight=0.5)
    call = grid_call()
    assert HybridBackend(config).refuses(call) is None
    assert relative_l2(HybridBackend(config)(call), exactly(call)) > 0.1
    assert HybridBackend(replace(config, global_weight=0.0)).refuses(call) is not None


def test_it_can_be_switched_off() -> None:
    backend = HybridBackend(BASE)
    backend.enabled = False
    assert backend.refuses(grid_call()) == "disabled: the backend is switched off"


def test_one_line_per_step(watch) -> None:
    calls = [replace(grid_call(), step=StepContext(s)) for s in (1.0, 1.0, 0.5, 0.2)]
    config = replace(BASE, log_steps=True, local_window_sigma_high=1.0, local_window_min=8, local_window_max=40)
    lines = [line for line in watch(config, *calls).logs if line.startswith("Hybrid step stats")]
    assert lines == [
        "Hybrid step stats sigma=1 calls=2 window=40 weight=0.7 combine=shared P=3",
        "Hybrid step stats sigma=0.5 calls=1 window=24 weight=0.7 combine=shared P=3",
        "Hybrid step stats sigma=0.2 calls=1 window=11 weight=0.7 combine=shared P=3",
    ]


def test_work_is_what_the_cost_model_prices() -> None:
    call = grid_call()
    exact = exact_work(AttentionShape.of(call.q, call.k, call.v))
    near, wide = (HybridBackend(replace(BASE, local_window=w)).work(call) for w in (4, 40))
    assert near is not None
    assert wide is not None
    assert near.exponentials < wide.exponentials < exact.exponentials
    assert HybridBackend(replace(BASE, global_weight=0.0)).work(call).operator == "window"  # type: ignore[union-attr]
    assert HybridBackend(GRID).work(call).operator == "hybrid"  # type: ignore[union-attr]
    assert HybridBackend(GRID).work(replace(call, layout=None)) is None


def test_a_model_runs_with_it_end_to_end() -> None:
    model = TinyDiT()
    inputs = model.example(12, 12, words=7)
    layers = iter([LayerKey("block", index) for index in range(5)])
    router = AttentionRouter([Route(HybridBackend(replace(GRID, radius=3, layer_end=3)))])
    with torch.no_grad():
        exact = model(**inputs)
        router.begin_run()
        with SdpaMode(router, describe=lambda q, k: (next(layers), StepContext(0.75), TEXT_FIRST)):
            output = model(**inputs)
        router.end_run()
    assert router.report.counts() == {"hybrid": 4, "native": 1}
    assert router.report.declines() == {"skipped_by_layer: layer block:4 is outside 0..3": 1}
    assert 0 < relative_l2(output, exact) < 0.2
    assert math.isfinite(float(output.sum()))


@pytest.mark.parametrize("config", [BASE, GRID, replace(BASE, combine="additive", log_quality_stats=True)])
def test_nothing_waits_for_the_device_once_a_layer_is_fitted(config: HybridBackendConfig, host_reads) -> None:
    backend, call = HybridBackend(config), grid_call()
    backend(call)
    with host_reads() as mode:
        assert backend.refuses(call) is None
        backend(call)
    assert mode.seen == []
