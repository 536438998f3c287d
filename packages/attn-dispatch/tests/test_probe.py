import json
from dataclasses import replace

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionRouter,
    FidelityProbe,
    FidelityRow,
    LayerKey,
    NativeAttention,
    Route,
    SdpaMode,
    StepContext,
)
from attn_dispatch.testing import RecordingHandler
from torch import Tensor
from torch.nn import functional

B, H, N, D = 2, 3, 63, 8


def make_call(index: int = 0, sigma: float = 0.5, **fields: Tensor) -> AttentionCall:
    g = torch.Generator().manual_seed(index)
    q, k, v = (2 * torch.randn(B, H, N, D, generator=g) for _ in range(3))
    return AttentionCall(q, k, v, layer=LayerKey("single", index), step=StepContext(sigma), **fields)


class Native:
    """Exact attention that counts the queries it was asked for."""

    def __init__(self) -> None:
        self.queries = 0

    def __call__(self, call: AttentionCall) -> Tensor:
        self.queries += call.q.shape[2]
        return functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.attn_bias)


class FirstKeys:
    """Attends to the first keys only."""

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self.log: list[str] = []

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        bias = None if call.attn_bias is None else call.attn_bias[..., : self.keys]
        return functional.scaled_dot_product_attention(
            call.q, call.k[:, :, : self.keys], call.v[:, :, : self.keys], attn_mask=bias
        )

    def begin_run(self) -> None:
        self.log.append("begin")

    def end_run(self) -> None:
        self.log.append("end")


def expected_distances(output: Tensor, exact: Tensor) -> tuple[float, float]:
    a, b = output.double(), exact.double()
    cosine = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return float(cosine.mean()), float((a - b).norm() / b.norm())


def test_all_queries_give_the_distance() -> None:
    handler = FirstKeys(40)
    probe = FidelityProbe(handler, n_queries=None)
    probe.begin_run()
    want = []
    for index, sigma in ((0, 0.9), (1, 0.9), (1, 0.5)):
        call = make_call(index, sigma)
        assert torch.equal(probe(call, Native()), handler(call, Native()))
        want.append(expected_distances(handler(call, Native()), Native()(call)))
    probe.end_run()
    rows = probe.rows()
    assert [(str(row.layer), row.sigma, row.calls, row.exact) for row in rows] == [
        ("single:0", 0.9, 1, 0),
        ("single:1", 0.9, 1, 0),
        ("single:1", 0.5, 1, 0),
    ]
    for row, (cosine, relative) in zip(rows, want, strict=True):
        assert relative > 0.05
        assert row.cosine_distance == pytest.approx(cosine, rel=1e-4)
        assert row.relative_l2 == pytest.approx(relative, rel=1e-4)
    assert handler.log == ["begin", "end"]


@pytest.mark.parametrize("biased", [False, True])
def test_sampled_queries_cost_less_and_estimate_the_same(biased: bool) -> None:
    bias = torch.randn(1, 1, N, N, generator=torch.Generator().manual_seed(9))
    call = make_call(attn_bias=bias) if biased else make_call()
    native = Native()
    probe = FidelityProbe(FirstKeys(40), n_queries=16)
    for _ in range(60):
        probe(call, native)
    probe.end_run()
    assert native.queries == 60 * 16
    (row,) = probe.rows()
    cosine, relative = expected_distances(FirstKeys(40)(call, Native()), Native()(call))
    assert row.calls == 60
    assert row.cosine_distance == pytest.approx(cosine, rel=0.1)
    assert row.relative_l2 == pytest.approx(relative, rel=0.1)


def test_draws_come_from_the_own_generator() -> None:
    def measure(seed: int) -> float:
        probe = FidelityProbe(FirstKeys(40), n_queries=8, generator=torch.Generator().manual_seed(seed))
        probe(make_call(), Native())
        probe.end_run()
        return probe.rows()[0].cosine_distance

    state = torch.get_rng_state()
    assert measure(1) == measure(1)
    assert measure(1) != measure(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_switched_off_it_measures_nothing() -> None:
    native = Native()
    probe = FidelityProbe(FirstKeys(40), enabled=False)
    probe(make_call(), native)
    probe.end_run()
    assert native.queries == 0
    assert probe.rows() == []


def test_a_native_answer_costs_nothing_more_and_counts_as_exact() -> None:
    native = Native()
    probe = FidelityProbe(RecordingHandler())
    probe(make_call(), native)
    probe.end_run()
    assert native.queries == N
    (row,) = probe.rows()
    assert (row.calls, row.exact, row.cosine_distance, row.relative_l2) == (1, 1, 0.0, 0.0)


def test_a_target_the_handler_asked_for_is_reused() -> None:
    class Preview(FirstKeys):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            native(call)
            return super().__call__(call, native)

    native = Native()
    probe = FidelityProbe(Preview(40), n_queries=None)
    probe(make_call(), native)
    probe.end_run()
    assert native.queries == N
    assert probe.rows()[0].relative_l2 > 0.05


def test_a_changed_call_is_no_target() -> None:
    class Other(RecordingHandler):
        def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
            return native(replace(call, k=call.k.flip(2)))

    probe = FidelityProbe(Other(), n_queries=None)
    probe(make_call(), Native())
    probe.end_run()
    assert probe.rows()[0].exact == 0
    assert probe.rows()[0].relative_l2 > 0.5


def test_runs_add_up_and_clear_forgets() -> None:
    probe = FidelityProbe(FirstKeys(40), n_queries=None)
    for _ in range(2):
        probe(make_call(), Native())
        probe.end_run()
    (row,) = probe.rows()
    assert row.calls == 2
    once = FidelityProbe(FirstKeys(40), n_queries=None)
    once(make_call(), Native())
    once.end_run()
    assert row.relative_l2 == pytest.approx(once.rows()[0].relative_l2)
    assert json.loads(json.dumps(probe.to_dict()))["rows"][0]["layer"] == "single:0"
    probe.clear()
    assert probe.rows() == []


def test_the_wrapped_handler_ends_its_run_and_figures_are_kept_when_it_fails() -> None:
    class Broken(FirstKeys):
        def end_run(self) -> None:
            raise RuntimeError("disk full")

    probe = FidelityProbe(Broken(40))
    probe(make_call(), Native())
    with pytest.raises(RuntimeError, match="disk full"):
        probe.end_run()
    assert probe.rows()[0].relative_l2 > 0.05


def test_it_works_across_inference_mode_and_a_masked_host() -> None:
    call = make_call()
    keep = torch.arange(N).expand(B, 1, N, N) < 50
    probe = FidelityProbe(FirstKeys(40), n_queries=8)
    with torch.inference_mode(), SdpaMode(probe):
        functional.scaled_dot_product_attention(call.q.clone(), call.k.clone(), call.v.clone(), attn_mask=keep)
    with SdpaMode(probe):
        functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=keep)
    probe.end_run()
    (row,) = probe.rows()
    assert row.calls == 2
    assert 0.01 < row.relative_l2 < 1


class Normalising:
    """Exact attention of normalised queries and keys, but over the first keys only."""

    name = "normalising"

    def __init__(self, keys: int) -> None:
        self.keys = keys

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def effective(self, call: AttentionCall) -> AttentionCall:
        return replace(call, q=2 * functional.normalize(call.q, dim=-1), k=2 * functional.normalize(call.k, dim=-1))

    def __call__(self, call: AttentionCall) -> Tensor:
        meant = self.effective(call)
        return functional.scaled_dot_product_attention(meant.q, meant.k[:, :, : self.keys], meant.v[:, :, : self.keys])


@pytest.mark.parametrize("n_queries", [None, 16])
def test_changed_scores_are_measured_apart_from_the_approximation(n_queries: int | None) -> None:
    def measure(keys: int) -> FidelityRow:
        probe = FidelityProbe(AttentionRouter([Route(Normalising(keys))]), n_queries=n_queries)
        for _ in range(40):
            probe(make_call(), Native())
        probe.end_run()
        return probe.rows()[0]

    backend, call = Normalising(40), make_call()
    raw = expected_distances(backend(call), Native()(call))
    effective = expected_distances(backend(call), Native()(backend.effective(call)))
    row = measure(40)
    tolerance = 1e-4 if n_queries is None else 0.1
    assert (row.cosine_distance, row.relative_l2) == pytest.approx(raw, rel=tolerance)
    assert (row.effective_cosine_distance, row.effective_relative_l2) == pytest.approx(effective, rel=tolerance)
    assert abs(row.relative_l2 - row.effective_relative_l2) > 0.05
    exact = measure(N)
    assert exact.effective_relative_l2 < 1e-5
    assert exact.relative_l2 > 0.1


def test_a_backend_that_leaves_the_scores_alone_has_one_quality() -> None:
    probe = FidelityProbe(FirstKeys(40), n_queries=None)
    probe(make_call(), Native())
    probe.end_run()
    (row,) = probe.rows()
    assert (row.effective_cosine_distance, row.effective_relative_l2) == (row.cosine_distance, row.relative_l2)
    assert row.relative_l2 > 0.05


def test_the_probe_passes_on_the_end_of_a_step() -> None:
    class Repeating(FirstKeys):
        def end_step(self) -> bool:
            return True

    assert FidelityProbe(Repeating(3)).end_step()
    assert not FidelityProbe(FirstKeys(3)).end_step()


def test_n_queries_must_be_positive() -> None:
    with pytest.raises(ValueError, match="n_queries"):
        FidelityProbe(RecordingHandler(), n_queries=0)
