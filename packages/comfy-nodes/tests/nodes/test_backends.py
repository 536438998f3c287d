import json
from pathlib import Path
from typing import Any

import pytest
from attn_dispatch.adapters.comfyui import install, installed
from attn_dispatch.adapters.comfyui_override import OVERRIDE
from attn_dispatch.backends import HybridBackendConfig, TaylorBackendConfig

# What saved workflows hold, in their order: (name, default, minimum, maximum, step). The step of eps was 1e-6, to which
# the page rounds: it made 1e-12 of 1e-9.
TAYLOR: list[tuple[Any, ...]] = [
    ("P", 4, 1, 8, 1),
    ("min_tokens", 100, 0, 200000, 1),
    ("max_feature_dim_R", 370000, 1, 10**9, 1),
    ("block_size_q", 32, 1, 8192, 1),
    ("block_size_k", 16, 1, 8192, 1),
    ("eps", 1e-6, 1e-12, 1e-2, 1e-12),
    ("fallback_on_negative", True),
    ("allow_cross_attention", True),
    ("max_head_dim", 128, 1, 512, 1),
    ("sub_head_blocks", 4, 1, 16, 1),
    ("qk_normalize", False),
    ("qk_norm_clip", 0.0, 0, 100, 0.5),
    ("qk_norm_power", 0.0, 0, 1, 0.05),
    ("qk_norm_sigma_max", 0.0, 0, 50, 0.01),
    ("scale_mul", 1.0, 0, 4, 0.05),
    ("force_fp32", False),
    ("memory_reserve", True),
    ("memory_reserve_factor", 1.1, 1, 4, 0.05),
    ("memory_reserve_log", True),
    ("early_probe", True),
    ("probe_samples", 16, 1, 64, 1),
    ("denom_fp32", True),
    ("denom_fallback_frac_limit", 0.0, 0, 1, 0.0001),
    ("fused_kernel", False),
    ("fused_full_kernel", False),
    ("fused_feature_chunk_size", 8192, 128, 200000, 128),
    ("fused_value_chunk_size", 0, 0, 4096, 32),
    ("s_store_bf16", False),
    ("taylor_sigma_max", 0.0, 0, 50, 0.01),
    ("taylor_layer_start", -1, -1, 512, 1),
    ("taylor_layer_end", -1, -1, 512, 1),
    ("auto_tune", False),
    ("auto_tune_steps", 1, 0, 4, 1),
    ("auto_tune_candidates", 8, 1, 32, 1),
    ("auto_tune_quality_samples", 4, 1, 32, 1),
    ("auto_tune_seed", 0, 0, 100000, 1),
    ("auto_tune_qk_norm_power_min", 0.2, 0, 1, 0.05),
    ("auto_tune_qk_norm_power_max", 0.7, 0, 1, 0.05),
    ("auto_tune_qk_norm_clip_min", 8.0, 0, 100, 0.5),
    ("auto_tune_qk_norm_clip_max", 20.0, 0, 100, 0.5),
    ("auto_tune_scale_mul_min", 0.8, 0, 4, 0.05),
    ("auto_tune_scale_mul_max", 1.0, 0, 4, 0.05),
    ("auto_tune_max_tokens", 512, 0, 8192, 1),
    ("quality_check", True),
    ("quality_check_samples", 16, 1, 64, 1),
    ("quality_check_log_every", 1, 1, 1000, 1),
    ("log_shapes", True),
    ("log_fallbacks", True),
]
HYBRID: list[tuple[Any, ...]] = [
    ("local_window", 512, 0, 8192, 1),
    ("local_window_min", 512, 0, 8192, 1),
    ("local_window_max", 512, 0, 8192, 1),
    ("local_window_sigma_low", 0.0, 0, 50, 0.01),
    ("local_window_sigma_high", 0.0, 0, 50, 0.01),
    ("local_chunk", 256, 1, 10**9, 1),
    ("prefix_tokens", 0, 0, 8192, 1),
    ("global_dim", 16, 1, 128, 1),
    ("global_P", 2, 1, 4, 1),
    ("global_weight", 0.1, 0, 4, 0.01),
    ("global_sigma_low", 0.0, 0, 50, 0.01),
    ("global_sigma_high", 0.0, 0, 50, 0.01),
    ("global_scale_mul", 1.0, 0, 4, 0.01),
    ("global_norm_power", 0.0, 0, 1, 0.05),
    ("global_norm_clip", 0.0, 0, 100, 0.5),
    ("use_pca", True),
    ("pca_samples", 2048, 0, 65536, 256),
    ("allow_cross_attention", True),
    ("layer_start", -1, -1, 512, 1),
    ("layer_end", -1, -1, 512, 1),
    ("eps", 1e-6, 1e-12, 1e-2, 1e-12),
    ("force_fp32", True),
    ("log_steps", True),
    ("log_quality_stats", False),
]
KINDS = {bool: "BOOLEAN", int: "INT", float: "FLOAT"}


@pytest.fixture
def nodes(host: Any) -> Any:
    import comfy_nodes.nodes.backends

    return comfy_nodes.nodes.backends


def _facts(item: Any) -> tuple[Any, ...]:
    numbers = () if item.type == "BOOLEAN" else (item.min, item.max, item.step)
    return (item.id, item.default, *numbers)


@pytest.mark.parametrize(
    ("node", "switch", "saved", "later"),
    [
        (
            "TaylorAttentionBackend",
            ("backend", "COMBO", "taylor"),
            TAYLOR,
            ["log_steps", "centre", "coefficients", "hermite_limit"],
        ),
        (
            "HybridTaylorAttentionBackend",
            ("enabled", "BOOLEAN", False),
            HYBRID,
            ["combine", "basis", "radius", "keep_text"],
        ),
    ],
)
def test_saved_workflows_find_what_they_saved(
    nodes: Any, node: str, switch: tuple[str, str, object], saved: list[tuple[Any, ...]], later: list[str]
) -> None:
    schema = getattr(nodes, node).define_schema()
    assert (schema.node_id, schema.category, schema.is_experimental) == (node, "advanced/attention", True)
    model, choice, *options = schema.inputs
    assert (model.id, model.type) == ("model", "MODEL")
    assert (choice.id, choice.type, choice.default) == switch
    known = options[: len(saved)]
    assert [_facts(one) for one in known] == saved
    assert [one.type for one in known] == [KINDS[type(default)] for _, default, *_ in saved]
    assert not any(one.optional for one in known)
    assert [one.id for one in options[len(saved) :]] == later
    assert all(one.optional for one in options[len(saved) :])
    assert [(one.label, one.type) for one in schema.outputs] == [("MODEL", "MODEL")]


def test_numbers_of_inputs(nodes: Any) -> None:
    taylor, hybrid = nodes.TaylorAttentionBackend.define_schema(), nodes.HybridTaylorAttentionBackend.define_schema()
    assert len([one for one in taylor.inputs if not one.optional]) == 50
    assert len([one for one in hybrid.inputs if not one.optional]) == 26
    assert taylor.inputs[1].options == ["standard", "taylor"]


def _defaults(saved: list[tuple[Any, ...]], **changes: Any) -> dict[str, Any]:
    """What a workflow saved before the later inputs existed hands over."""
    return {name: default for name, default, *_ in saved} | changes


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0, "batch": 2}, {"references": 1}, {"masked": True}])
def test_taylor_answers(nodes: Any, sampling: Any, options: dict[str, Any]) -> None:
    run = sampling(**options)
    model = run.model()
    exact = run.run(model)
    settings = _defaults(TAYLOR, P=3, sub_head_blocks=1, block_size_q=512, block_size_k=512)
    (patched,) = nodes.TaylorAttentionBackend.execute(model=model, backend="taylor", **settings)
    output = run.run(patched)
    figures = installed(patched)["taylor"].figures()
    assert figures.report.counts() == {"taylor": 15}
    assert len(figures.errors) == 15
    (patched,) = nodes.TaylorAttentionBackend.execute(model=model, backend="taylor", **settings | {"P": 1})
    mean_of_values = run.run(patched)
    assert 0 < (output - exact).norm() < 0.7 * (mean_of_values - exact).norm()


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0, "batch": 2}, {"references": 1}, {"masked": True}])
def test_hybrid_answers(nodes: Any, sampling: Any, options: dict[str, Any]) -> None:
    run = sampling(**options)
    model = run.model()
    exact = run.run(model)
    settings = _defaults(HYBRID, global_P=3, global_weight=1.0, local_window=64)
    (patched,) = nodes.HybridTaylorAttentionBackend.execute(model=model, enabled=True, **settings)
    output = run.run(patched)
    assert installed(patched)["hybrid"].report.counts() == {"hybrid": 15}
    assert 0 < (output - exact).norm() < 0.1 * exact.norm()


def test_limits_decline_bit_equal_and_are_named(nodes: Any, sampling: Any) -> None:
    run = sampling(cfg=2.0)
    model = run.model()
    (patched,) = nodes.TaylorAttentionBackend.execute(
        model=model, backend="taylor", **_defaults(TAYLOR, min_tokens=100_000)
    )
    assert run.run(patched).equal(run.run(model))
    report = installed(patched)["taylor"].report
    assert report.counts() == {"native": 15}
    assert list(report.declines()) == ["below_min_tokens: 581 tokens are fewer than 100000"]


@pytest.mark.parametrize("stacked", [False, True])
def test_switched_off_is_as_if_it_had_never_been(nodes: Any, sampling: Any, stacked: bool) -> None:
    run = sampling()
    model = run.model()
    if stacked:
        (model,) = nodes.HybridTaylorAttentionBackend.execute(model=model, enabled=True, **_defaults(HYBRID))
    slot = model.model_options["transformer_options"].get(OVERRIDE)
    (patched,) = nodes.TaylorAttentionBackend.execute(model=model, backend="taylor", **_defaults(TAYLOR))
    (off,) = nodes.TaylorAttentionBackend.execute(model=patched, backend="standard", **_defaults(TAYLOR))
    assert off.model_options["transformer_options"].get(OVERRIDE) is slot
    assert list(installed(off)) == (["hybrid"] if stacked else [])
    (off,) = nodes.HybridTaylorAttentionBackend.execute(model=off, enabled=False, **_defaults(HYBRID))
    assert OVERRIDE not in off.model_options["transformer_options"]
    assert run.run(off).equal(run.run(run.model()))


@pytest.mark.parametrize("order", ["taylor last", "hybrid last"])
def test_they_stack_in_any_order(nodes: Any, sampling: Any, order: str) -> None:
    """The last one is asked first; what it leaves, the other answers."""
    run = sampling()
    early = _defaults(TAYLOR, P=3, sub_head_blocks=1, taylor_layer_end=0)
    every = _defaults(HYBRID, global_P=3, global_weight=1.0, local_window=64, layer_start=1)
    steps = [
        lambda model: nodes.TaylorAttentionBackend.execute(model=model, backend="taylor", **early),
        lambda model: nodes.HybridTaylorAttentionBackend.execute(model=model, enabled=True, **every),
    ]
    model = run.model()
    for step in steps if order == "hybrid last" else reversed(steps):
        (model,) = step(model)
    run.run(model)
    reports = {key: handler.report for key, handler in installed(model).items()}
    assert reports["taylor"].counts()["taylor"] == 6  # layer 0 of both streams
    assert reports["hybrid"].counts()["hybrid"] == 9
    assert reports["taylor"].counts().get("native", 0) == (9 if order == "taylor last" else 0)
    assert reports["hybrid"].counts().get("native", 0) == (6 if order == "hybrid last" else 0)


def test_another_nodes_override_stays_in_use(nodes: Any, sampling: Any) -> None:
    run = sampling()
    calls = []

    def other(func: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return func(*args, **kwargs)

    model = run.model()
    model.model_options["transformer_options"][OVERRIDE] = other
    (patched,) = nodes.TaylorAttentionBackend.execute(
        model=model, backend="taylor", **_defaults(TAYLOR, min_tokens=9999)
    )
    run.run(patched)
    assert len(calls) == 15
    (off,) = nodes.TaylorAttentionBackend.execute(model=patched, backend="standard", **_defaults(TAYLOR))
    assert off.model_options["transformer_options"][OVERRIDE] is other


def test_one_model_serves_two_samplers(nodes: Any, sampling: Any) -> None:
    run = sampling()
    settings = _defaults(TAYLOR, P=3, sub_head_blocks=1)
    (patched,) = nodes.TaylorAttentionBackend.execute(model=run.model(), backend="taylor", **settings)
    assert run.run(patched.clone()).equal(run.run(patched.clone()))
    assert installed(patched)["taylor"].report.runs == 1


def test_the_record_goes_to_the_output_folder(nodes: Any, host: Any, sampling: Any) -> None:
    run = sampling(steps=1)
    settings = _defaults(HYBRID, log_quality_stats=True)
    (patched,) = nodes.HybridTaylorAttentionBackend.execute(model=run.model(), enabled=True, **settings)
    run.run(patched)
    (line,) = Path(host.output_folder, "hybrid-attention-results.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["config"]["local_window"] == 512
    assert installed(patched)["hybrid"].figures().errors


def test_what_is_wrong_is_named(nodes: Any, sampling: Any) -> None:
    with pytest.raises(
        ValueError, match=r"auto_tune_scale_mul_min 2\.0 must not be above auto_tune_scale_mul_max 1\.0"
    ):
        nodes.TaylorAttentionBackend.execute(
            model=sampling().model(), backend="taylor", **_defaults(TAYLOR, auto_tune_scale_mul_min=2.0)
        )


def test_every_option_has_an_input(nodes: Any) -> None:
    from attn_dispatch.backends import options_of

    for node, config in (
        (nodes.TaylorAttentionBackend, TaylorBackendConfig),
        (nodes.HybridTaylorAttentionBackend, HybridBackendConfig),
    ):
        assert [one.id for one in node.define_schema().inputs[2:]] == [one.name for one in options_of(config)]


def test_a_handler_of_somebody_else_stays(nodes: Any, sampling: Any) -> None:
    from attn_dispatch import NativeHandler

    run = sampling()
    other = NativeHandler()
    model = install(run.model(), other, key="other")
    (patched,) = nodes.TaylorAttentionBackend.execute(
        model=model, backend="taylor", **_defaults(TAYLOR, min_tokens=9999)
    )
    run.run(patched)
    assert other.report.counts() == {"native": 15}
