from typing import Any

import pytest
import torch
from attn_dispatch.adapters.comfyui import installed
from attn_kernels import Partial


@pytest.fixture
def nodes(host: Any) -> Any:
    import comfy_nodes.nodes.approximate

    return comfy_nodes.nodes.approximate


RUNS = [
    pytest.param({}, id="cfg 1"),
    pytest.param({"cfg": 2.0}, id="cfg 2"),
    pytest.param({"cfg": 2.0, "batch": 2}, id="batch 2"),
    pytest.param({"references": 1}, id="reference latent"),
    pytest.param({"masked": True}, id="mask"),
]


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("method", ["near-far", "hybrid"])
def test_it_answers_near_exact_attention(nodes: Any, sampling: Any, method: str, options: dict[str, Any]) -> None:
    run = sampling(**options)
    model = run.model()
    exact = run.run(model)
    (patched,) = nodes.ApproximateAttention.execute(model=model, method=method, only_if_faster=False)
    output = run.run(patched)
    counts = installed(patched)["approximate"].report.counts()
    assert list(counts) == ["near_far" if method == "near-far" else "hybrid"]
    assert output.isfinite().all()
    distance = float((output - exact).norm() / exact.norm())
    assert 0 < distance < 0.1
    assert run.run(model).equal(exact)  # the node's input is left as it is


@pytest.mark.parametrize("options", RUNS)
def test_what_is_declined_is_bit_equal(nodes: Any, sampling: Any, options: dict[str, Any]) -> None:
    run = sampling(**options)
    model = run.model()
    (gated,) = nodes.ApproximateAttention.execute(model=model)  # too small to be faster
    assert run.run(gated).equal(run.run(model))
    assert installed(gated)["approximate"].report.counts().keys() == {"native"}


def test_quality_one_is_exact_and_measured(nodes: Any, sampling: Any) -> None:
    run = sampling()
    model = run.model()
    (patched,) = nodes.ApproximateAttention.execute(model=model, quality=0.5, only_if_faster=False)
    (exact,) = nodes.ApproximateAttention.execute(model=patched, quality=1.0, only_if_faster=False)
    assert run.run(exact).equal(run.run(model))
    assert not run.run(patched).equal(run.run(model))
    report = installed(exact)["approximate"].report
    assert report.counts() == {"native": 15}
    assert report.attention_seconds() > 0


def test_a_model_that_does_not_tell_stays_exact_and_says_why(nodes: Any, sampling: Any) -> None:
    from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeModelPatcher

    run = sampling()
    (patched,) = nodes.ApproximateAttention.execute(model=FakeModelPatcher(FakeFlux()), only_if_faster=False)
    run.run(patched)
    report = installed(patched)["approximate"].report
    assert report.counts().keys() == {"native"}
    assert list(report.declines()) == ["the host does not say where text and image tokens lie"]


def test_values_out_of_range_are_named(nodes: Any, sampling: Any) -> None:
    with pytest.raises(ValueError, match="layer_start 5 must not be above layer_end 2"):
        nodes.ApproximateAttention.execute(model=sampling().model(), layer_start=5, layer_end=2)


@pytest.mark.parametrize("first", [True, False], ids=["backend first", "backend last"])
def test_the_exact_backend_answers_what_is_left_in_any_order(nodes: Any, sampling: Any, first: bool) -> None:
    run = sampling()
    model = run.model()
    plain = run.run(model)
    if first:
        model, _ = nodes.AttentionBackend.execute(model=model, backend="sdpa_math")
    (model,) = nodes.ApproximateAttention.execute(model=model, only_if_faster=False, exact_above_sigma=0.9)
    if not first:
        model, _ = nodes.AttentionBackend.execute(model=model, backend="sdpa_math")
    output = run.run(model)
    found = installed(model)
    assert list(found) == ["native", "approximate"]
    assert found["approximate"].report.counts() == {"native": 5, "near_far": 10}
    assert found["native"].report.counts() == {"sdpa_math": 5}
    assert float((output - plain).norm() / plain.norm()) < 0.1


def test_the_node_shows_what_runs(nodes: Any, host: Any, sampling: Any) -> None:
    run = sampling(cfg=2.0, masked=True)
    model = run.model()
    patched, label = nodes.AttentionBackend.execute(model=model, backend="flash_fp8")
    assert label.startswith("PyTorch SDPA")
    assert "flash_fp8 does not run on cpu" in label
    assert host.shown == [(label, "7")]
    exact = run.run(model)
    assert float((run.run(patched) - exact).norm() / exact.norm()) < 1e-5
    assert installed(patched)["native"].report.counts() == {"sdpa": 15}


def test_the_slider(nodes: Any) -> None:
    schema = nodes.ApproximateAttention.define_schema()
    quality = schema.inputs[1]
    assert (quality.id, quality.default, quality.min, quality.max) == ("quality", 0.5, 0.0, 1.0)
    assert quality.display_mode == "slider"
    folded = [one.id for one in schema.inputs if one.advanced]
    assert folded == ["tile", "exact_above_sigma", "layer_start", "layer_end", "references"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (torch.OutOfMemoryError("no memory"), "out of memory"),
        (None, "the output is not finite"),
    ],
)
def test_a_fault_costs_a_call_and_not_the_image(
    nodes: Any, sampling: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, reason: str
) -> None:
    import attn_dispatch.backends.near_far as near_far

    def broken(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if fault is not None:
            raise fault
        return Partial(torch.full_like(q, float("nan")), q[..., 0].float())

    run = sampling()
    model = run.model()
    (patched,) = nodes.ApproximateAttention.execute(model=model, only_if_faster=False)
    with monkeypatch.context() as patch:
        patch.setattr(near_far, "near_far_attention", broken)
        assert run.run(patched).equal(run.run(model))
    report = installed(patched)["approximate"].report
    assert report.counts() == {"native": 15}
    assert reason in report.declines()
    run.run(patched)
    assert report.counts() == {"near_far": 15}  # the next run starts anew
