import json
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionFallback,
    AttentionRouter,
    DispatchReport,
    LayerKey,
    Route,
    StepContext,
)
from torch import Tensor


def make_call(layer: int | None = 0, sigma: float | None = 0.5) -> AttentionCall:
    x = torch.zeros(1, 1, 2, 4)
    return AttentionCall(
        x,
        x,
        x,
        layer=None if layer is None else LayerKey("single", layer),
        step=None if sigma is None else StepContext(sigma),
    )


def test_rows_are_kept_apart_by_layer_sigma_and_backend() -> None:
    report = DispatchReport()
    for layer, sigma, ran, spent in [(0, 0.9, "a", 1.0), (0, 0.9, "a", 2.0), (0, 0.5, "a", 4.0), (1, 0.9, "b", 8.0)]:
        report.record(make_call(layer, sigma), ran, spent)
    found = [(str(row.layer), row.sigma, row.ran, row.count, row.milliseconds) for row in report.rows()]
    assert found == [("single:0", 0.9, "a", 2, 3.0), ("single:0", 0.5, "a", 1, 4.0), ("single:1", 0.9, "b", 1, 8.0)]
    assert report.attention_seconds() == pytest.approx(0.015)
    assert report.counts() == {"a": 3, "b": 1}


def test_host_time_is_what_passed() -> None:
    router = AttentionRouter()

    def slow(call: AttentionCall) -> Tensor:
        time.sleep(0.02)
        return call.v

    router(make_call(), slow)
    assert 0.02 <= router.report.attention_seconds() < 0.5


def test_declines_are_counted_by_reason() -> None:
    report = DispatchReport()
    for backend, reason in [("a", "x"), ("a", "y"), ("b", "y"), ("a", "y")]:
        report.decline(make_call(), backend, reason)
    assert list(report.declines().items()) == [("y", 3), ("x", 1)]
    assert {"backend": "a", "reason": "y", "count": 2} in cast(list[object], report.to_dict()["declines"])


def test_the_dictionary_is_json() -> None:
    report = DispatchReport()
    report.begin_run()
    report.record(make_call(None, None), "native", 1.5)
    report.record(make_call(3, 0.25), "a", 0.5)
    report.decline(make_call(), "a", "x")
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["runs"] == 1
    assert read["rows"][0] == {"layer": None, "sigma": None, "ran": "native", "count": 1, "milliseconds": 1.5}
    assert read["rows"][1]["layer"] == "single:3"
    assert read["attention_seconds"] == pytest.approx(0.002)


def test_declines_of_one_kind_are_one_line() -> None:
    report = DispatchReport()
    for sigma in (0.9, 0.8, 1e-05):
        for layer in (3, 4):
            report.decline(make_call(), "a", f"sigma {sigma:.4g} is not below 0.5 in layer single:{layer}")
    report.decline(make_call(), "b", "21 keys are fewer than 64")
    report.decline(make_call(), "b", "out of memory")
    assert len(report.declines()) == 8
    assert report.decline_kinds() == {
        "sigma … is not below 0.5 in layer single:…": 6,
        "21 keys are fewer than 64": 1,
        "out of memory": 1,
    }


class Declining:
    name = "declining"

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> Tensor:
        raise AttentionFallback("denominator below eps")


def test_a_declined_route_counts_one_reason_and_a_fallback_one() -> None:
    guards = (lambda call: None, lambda call: "first", lambda call: "second")
    router = AttentionRouter([Route(Declining(), guards), Route(Declining()), Route(Declining(), guards)])
    for _ in range(3):
        router(make_call(), lambda call: call.v)
    # The fallback ends the asking: the third route is not reached.
    assert router.report.declines() == {"first": 3, "denominator below eps": 3}
    assert router.report.counts() == {"native": 3}


def test_memory_is_bounded_and_totals_stay_complete() -> None:
    report = DispatchReport(max_rows=10, max_reasons=5)
    for index in range(1000):
        report.record(make_call(index % 2, sigma=index / 1000), "native", 1.0)
        report.decline(make_call(), "a", f"reason {index}")
    assert len(report.rows()) <= 12
    assert len(report.declines()) <= 6
    assert report.counts() == {"native": 1000}
    assert sum(report.declines().values()) == 1000
    assert report.attention_seconds() == pytest.approx(1.0)


def test_clear_forgets() -> None:
    report = DispatchReport()
    report.begin_run()
    report.record(make_call(), "a", 1.0)
    report.decline(make_call(), "a", "x")
    report.clear()
    assert report.to_dict() == DispatchReport().to_dict()


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_reasons": 0}, {"max_pending": 0}])
def test_limits_must_be_positive(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DispatchReport(**limits)


class FakeEvent:
    """Events whose recording times are 0, 1, 3, 6, ... milliseconds."""

    made = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.moment = 0

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.moment = FakeEvent.made * (FakeEvent.made + 1) // 2
        FakeEvent.made += 1

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        return float(end.moment - self.moment)


@pytest.fixture
def cuda_call(monkeypatch: pytest.MonkeyPatch) -> AttentionCall:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr(FakeEvent, "waits", 0)
    q: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    return AttentionCall(q, q, q)


def test_device_time_is_read_at_the_end_of_a_run(cuda_call: AttentionCall) -> None:
    report = DispatchReport()
    for _ in range(3):
        report.finish(cuda_call, "a", report.start(cuda_call))
    assert FakeEvent.waits == 0
    assert report.counts() == {"a": 3}
    report.end_run()
    assert FakeEvent.waits == 3
    # Pairs (0, 1), (3, 6), (10, 15).
    assert report.attention_seconds() == pytest.approx(0.009)
    report.end_run()
    assert report.attention_seconds() == pytest.approx(0.009)


def test_outstanding_events_are_bounded(cuda_call: AttentionCall) -> None:
    report = DispatchReport(max_pending=4)
    for _ in range(10):
        report.finish(cuda_call, "a", report.start(cuda_call))
    assert FakeEvent.waits == 6
    report.end_run()
    assert report.attention_seconds() == pytest.approx(sum(range(1, 20, 2)) / 1e3)


@pytest.mark.gpu
def test_device_time_on_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
    router = AttentionRouter()
    call = AttentionCall(x, x, x)
    for _ in range(5):
        router(call, lambda asked: torch.nn.functional.scaled_dot_product_attention(asked.q, asked.k, asked.v))
    router.end_run()
    assert 0 < router.report.attention_seconds() < 5
