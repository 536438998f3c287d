import pytest
import torch
from attn_dispatch import AttentionCall, AttentionRouter, LayerKey, Route, StepContext
from attn_dispatch.report import DispatchReport
from comfy_nodes.measured import Measured, figures_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Doubling:
    """Answers twice the exact result in layer 0, refuses the rest; wants every first step made again."""

    name = "doubling"

    def __init__(self) -> None:
        self.again = True

    def refuses(self, call: AttentionCall) -> str | None:
        return None if call.layer is not None and call.layer.index == 0 else "another layer"

    def __call__(self, call: AttentionCall) -> Tensor:
        return 2 * native(call)

    def end_step(self) -> bool:
        self.again, again = False, self.again
        return again


def native(call: AttentionCall) -> Tensor:
    return scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


def _run(handler: Measured, layers: int = 2) -> None:
    handler.begin_run()
    try:
        for index in range(layers):
            q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
            handler(AttentionCall(q, k, v, layer=LayerKey("double", index), step=StepContext(0.5)), native)
    finally:
        handler.end_run()


def test_figures_are_those_of_the_latest_run() -> None:
    handler = Measured(AttentionRouter([Route(Doubling())]), probe_queries=4)
    assert handler.figures().seconds is None
    assert handler.report.counts() == {}
    _run(handler, layers=3)
    _run(handler)
    figures = handler.figures()
    assert figures.report.counts() == {"doubling": 1, "native": 1}
    assert figures.report.declines() == {"another layer": 1}
    assert figures.seconds is not None
    assert figures.seconds > 0
    first, second = figures.errors
    assert (first.calls, first.relative_l2) == (1, pytest.approx(1.0, abs=1e-5))
    assert (second.calls, second.exact, second.relative_l2) == (1, 1, 0.0)


def test_without_a_probe_nothing_is_compared() -> None:
    handler = Measured(AttentionRouter([Route(Doubling())]))
    _run(handler)
    assert handler.figures().errors == ()
    assert handler.figures().report.counts() == {"doubling": 1, "native": 1}


@pytest.mark.parametrize("queries", [0, 4])
def test_the_router_is_asked_whether_a_step_must_be_made_again(queries: int) -> None:
    handler = Measured(AttentionRouter([Route(Doubling())]), queries)
    assert handler.end_step()
    assert not handler.end_step()


def test_a_failed_run_has_a_length_too() -> None:
    handler = Measured(AttentionRouter())
    handler.begin_run()
    with pytest.raises(AttributeError):
        handler(None, native)  # type: ignore[arg-type]
    handler.end_run()
    assert handler.seconds is not None


def test_any_handler_with_a_report_is_read() -> None:
    router = AttentionRouter()
    found = figures_of(router)
    assert found is not None
    assert found.report is router.report
    assert isinstance(found.report, DispatchReport)
    assert figures_of(object()) is None


def test_errors_are_from_exact_attention_whatever_native_is() -> None:
    """Below this handler another approximation may stand in for exact attention."""
    asked = []

    def approximate(call: AttentionCall) -> Tensor:
        asked.append(call)
        return torch.zeros_like(call.q)

    handler = Measured(AttentionRouter([Route(Doubling())]), probe_queries=4)
    handler.begin_run()
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    mask = torch.ones(1, 9, dtype=torch.bool)
    handler(AttentionCall(q, k, v, layer=LayerKey("double", 0), scale=0.5, key_mask=mask), approximate)
    handler.end_run()
    assert asked == []
    assert handler.figures().errors[0].relative_l2 == pytest.approx(1.0, abs=1e-5)
