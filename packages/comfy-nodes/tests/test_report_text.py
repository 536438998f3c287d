import re

from attn_dispatch import AttentionCall, DispatchReport, FidelityRow, LayerKey, StepContext
from comfy_nodes.measured import RunFigures
from comfy_nodes.report_text import full_text, layer_name, summary
from torch import empty

DOUBLE, SINGLE = LayerKey("double", 0), LayerKey("single", 11)


def _figures() -> RunFigures:
    report = DispatchReport()
    for layer, ran, count, milliseconds in ((DOUBLE, "near_far", 3, 2.0), (SINGLE, "native", 2, 10.0)):
        for index in range(count):
            call = AttentionCall(*(empty(0),) * 3, layer=layer, step=StepContext(1.0 - index / 4))
            report.record(call, ran, milliseconds)
            if ran == "native":
                report.decline(call, "near_far", f"sigma {1.0 - index / 4:.4g} is not below 0.3")
    errors = (
        FidelityRow(DOUBLE, 1.0, 1, 0, 0.02, 0.2, 0.02, 0.2),
        FidelityRow(DOUBLE, 0.75, 1, 0, 0.01, 0.1, 0.01, 0.1),
        FidelityRow(SINGLE, 1.0, 2, 2, 0.0, 0.0, 0.0, 0.0),
    )
    return RunFigures(report, errors, 0.5)


def test_summary_is_a_line_for_each_node() -> None:
    text = summary({"approximate": _figures(), "taylor": RunFigures(DispatchReport())})
    assert text.splitlines() == [
        "approximate: near_far 3 of 5 calls, exact 2 of 5 calls, 0.026 s in attention of 0.5 s, mean error 10%",
        "taylor: no sampling run yet",
    ]
    assert "link the MODEL that the sampler used" in summary({})


def test_the_whole_report() -> None:
    text = full_text({"approximate": _figures()}, {"approximate": {"grouped heads": 4}})
    assert re.search(r"near_far +3 +0\.006 +2\.000\n", text)
    assert re.search(r"exact +2 +0\.020 +10\.000\n", text)
    assert "Left to exact attention because:\n  2 x sigma … is not below 0.3" in text
    assert "4 x grouped heads" in text
    assert "worst 0.2 in double:0 at sigma 1 (relative L2)" in text
    assert re.search(r"double:0 +near_far 3 +2\.000 +0\.15\n", text)
    assert re.search(r"single:11 +exact 2 +10\.000 +0$", text)


def test_several_nodes_stand_in_the_order_in_which_they_are_asked() -> None:
    text = full_text({"approximate": _figures(), "native": RunFigures(DispatchReport())}, {})
    assert text.startswith("Asked in this order")
    assert text.index("[approximate]") < text.index("[native]")
    assert text.endswith("[native] no sampling run yet")


def test_many_reasons_are_cut() -> None:
    report = DispatchReport()
    call = AttentionCall(*(empty(0),) * 3)
    for index in range(11):
        report.decline(call, "near_far", f"reason {'abcdefghijk'[index]}")
    text = full_text({"approximate": RunFigures(report)}, {})
    assert text.count("1 x reason") == 8
    assert "3 x other reasons" in text


def test_layers_without_a_name() -> None:
    assert layer_name(None) == "all layers"
