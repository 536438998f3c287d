from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionFallback,
    AttentionRouter,
    DispatchReport,
    LayerKey,
    NativeHandler,
    Route,
    StepContext,
)
from torch import Tensor
from torch.nn import functional


@dataclass
class FakeBackend:
    name: str
    value: float = 0.0
    reason: str | None = None
    error: BaseException | None = None
    asked: int = 0
    ran: int = 0

    def refuses(self, call: AttentionCall) -> str | None:
        self.asked += 1
        return self.reason

    def __call__(self, call: AttentionCall) -> Tensor:
        self.ran += 1
        if self.error is not None:
            raise self.error
        return torch.full((*call.q.shape[:3], call.v.shape[3]), self.value)


@dataclass
class Watcher:
    log: list[str] = field(default_factory=list)
    error: Exception | None = None

    def __call__(self, call: AttentionCall) -> str | None:
        return None

    def begin_run(self) -> None:
        self.log.append("begin")

    def end_run(self) -> None:
        self.log.append("end")
        if self.error is not None:
            raise self.error


def make_call(index: int = 0, sigma: float = 0.5) -> AttentionCall:
    g = torch.Generator().manual_seed(index)
    q, k, v = (2 * torch.randn(2, 3, n, d, generator=g) for n, d in ((5, 8), (7, 8), (7, 6)))
    return AttentionCall(q, k, v, layer=LayerKey("single", index), step=StepContext(sigma))


def native(call: AttentionCall) -> Tensor:
    return functional.scaled_dot_product_attention(call.q, call.k, call.v)


def refuse(reason: str) -> Callable[[AttentionCall], str | None]:
    return lambda call: reason


def test_the_first_route_without_a_reason_runs() -> None:
    first, second, third = FakeBackend("a", 1.0, "not today"), FakeBackend("b", 2.0), FakeBackend("c", 3.0)
    router = AttentionRouter([Route(first), Route(second), Route(third)])
    assert router(make_call(), native).unique().tolist() == [2.0]
    assert (first.ran, second.ran, third.ran, third.asked) == (0, 1, 0, 0)
    assert router.report.declines() == {"not today": 1}
    assert router.report.counts() == {"b": 1}


def test_an_all_refusing_router_is_bit_equal_to_native() -> None:
    call = make_call()
    router = AttentionRouter([Route(FakeBackend("a", reason="x")), Route(FakeBackend("b"), (refuse("y"),))])
    assert torch.equal(router(call, native), native(call))
    assert torch.equal(AttentionRouter()(call, native), native(call))
    assert router.report.declines() == {"x": 1, "y": 1}
    assert router.report.counts() == {"native": 1}


def test_the_backend_is_asked_before_its_guards_and_the_first_reason_ends_the_asking() -> None:
    asked: list[str] = []

    def guard(name: str, reason: str | None) -> Callable[[AttentionCall], str | None]:
        def ask(call: AttentionCall) -> str | None:
            asked.append(name)
            return reason

        return ask

    unable = Route(FakeBackend("a", reason="unable"), (guard("never", None),))
    forbidden = Route(FakeBackend("b"), (guard("first", None), guard("second", "no"), guard("third", None)))
    router = AttentionRouter([unable, forbidden])
    router(make_call(), native)
    assert asked == ["first", "second"]
    assert router.report.declines() == {"unable": 1, "no": 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AttentionFallback("denominator below eps"), "denominator below eps"),
        (torch.OutOfMemoryError(), "out of memory"),
    ],
)
def test_a_fallback_becomes_native_and_is_counted(error: Exception, reason: str) -> None:
    call = make_call()
    later = FakeBackend("later")
    router = AttentionRouter([Route(FakeBackend("a", error=error)), Route(later)])
    assert torch.equal(router(call, native), native(call))
    assert router.report.declines() == {reason: 1}
    assert router.report.counts() == {"native": 1}
    assert later.ran == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), ValueError("bug"), SystemExit()])
def test_any_other_exception_passes(error: BaseException) -> None:
    router = AttentionRouter([Route(FakeBackend("a", error=error))])
    with pytest.raises(type(error)) as caught:
        router(make_call(), native)
    assert caught.value is error
    assert router.report.counts() == {}
    assert router.report.declines() == {}


def test_a_fallback_raised_by_native_passes() -> None:
    def broken(call: AttentionCall) -> Tensor:
        raise AttentionFallback("not a backend")

    with pytest.raises(AttentionFallback):
        AttentionRouter()(make_call(), broken)


def test_a_failed_attempt_is_freed_before_native_runs() -> None:
    alive: list[bool] = []

    class Canary:
        def __init__(self) -> None:
            alive.append(True)

        def __del__(self) -> None:
            alive.clear()

    class Greedy(FakeBackend):
        def __call__(self, call: AttentionCall) -> Tensor:
            held = Canary()
            assert held is not None
            raise torch.OutOfMemoryError

    seen: list[bool] = []

    def watching(call: AttentionCall) -> Tensor:
        seen.append(bool(alive))
        return native(call)

    AttentionRouter([Route(Greedy("a"))])(make_call(), watching)
    assert seen == [False]


class WrongOutput(FakeBackend):
    def __call__(self, call: AttentionCall) -> Tensor:
        return native(call).to(torch.float64) if self.value else native(call)[:, :, 1:]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_answer_of_the_wrong_shape_or_dtype_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"backend 'odd' must answer .* = \(2, 3, 5, 6\)"):
        AttentionRouter([Route(WrongOutput("odd", value))])(make_call(), native)


def test_runs_reach_the_report_and_every_observer_once() -> None:
    shared, own = Watcher(), Watcher()
    report = DispatchReport()
    routes = [Route(FakeBackend("a"), (shared, own)), Route(FakeBackend("b"), (shared, refuse("x")))]
    router = AttentionRouter(routes, report)
    router.begin_run()
    router.end_run()
    assert shared.log == own.log == ["begin", "end"]
    assert report.runs == 1


def test_one_observer_that_fails_does_not_keep_the_end_from_others() -> None:
    bad, good = Watcher(error=RuntimeError("disk full")), Watcher()
    ended: list[bool] = []

    class Report(DispatchReport):
        def end_run(self) -> None:
            ended.append(True)

    for order in ((bad, good), (good, bad)):
        router = AttentionRouter([Route(FakeBackend("a"), order)], Report())
        with pytest.raises(RuntimeError, match="disk full"):
            router.end_run()
    assert good.log == bad.log == ["end", "end"]
    assert ended == [True, True]


def test_the_native_handler_measures_the_baseline() -> None:
    handler = NativeHandler()
    call = make_call()
    assert torch.equal(handler(call, native), native(call))
    (row,) = handler.report.rows()
    assert (row.ran, row.count, row.layer, row.sigma) == ("native", 1, call.layer, 0.5)
    assert row.milliseconds > 0
