from typing import Any

import pytest


@pytest.fixture
def nodes(host: Any) -> Any:
    from comfy_nodes.nodes.approximate import ApproximateAttention
    from comfy_nodes.nodes.report import AttentionReport

    return ApproximateAttention, AttentionReport


def test_it_shows_what_ran(nodes: Any, host: Any, sampling: Any) -> None:
    approximate, report = nodes
    run = sampling()
    (model,) = approximate.execute(model=run.model(), only_if_faster=False, measure_error=True, exact_above_sigma=0.9)
    latent = run.run(model)
    output = report.execute(model=model, after=latent)
    text, picture = output
    assert "near_far" in text
    assert "sigma 1 is not below 0.9" in text
    assert "Distance from exact attention: mean" in text
    assert picture.ndim == 4
    assert picture.shape[3] == 3
    assert output.ui["text"] == (text,)
    assert output.ui["images"][0]["size"] == tuple(picture.shape)
    ((shown, node_id),) = host.shown
    assert node_id == "7"
    assert shown.startswith("approximate: exact 5 of 15 calls, near_far 10 of 15 calls")
    sampling(steps=1).run(model)
    again, _ = report.execute(model=model, after=latent)
    assert again.startswith("[approximate] exact 5 of 5 calls")  # the latest run had the one exact step only


def test_a_model_without_nodes_and_one_that_did_not_run(nodes: Any, sampling: Any) -> None:
    approximate, report = nodes
    plain = sampling().model()
    text, picture = report.execute(model=plain, after=None)
    assert "link the MODEL that the sampler used" in text
    assert picture.shape[0] == 1
    (model,) = approximate.execute(model=plain)
    text, _ = report.execute(model=model, after=None)
    assert text == "[approximate] no sampling run yet"


def test_it_always_runs(nodes: Any) -> None:
    _, report = nodes
    found = report.fingerprint_inputs(model=None, after=None)
    assert found != found
    assert report.define_schema().is_output_node


def test_what_is_asked_first_stands_first(nodes: Any, sampling: Any) -> None:
    from comfy_nodes.nodes.approximate import AttentionBackend

    approximate, report = nodes
    run = sampling(steps=1)
    (model,) = approximate.execute(model=run.model(), only_if_faster=False)
    model, _ = AttentionBackend.execute(model=model, backend="sdpa_math")
    run.run(model)
    text, _ = report.execute(model=model, after=None)
    assert text.index("[approximate] near_far 5 of 5 calls") < text.index("[native] no sampling run yet")
