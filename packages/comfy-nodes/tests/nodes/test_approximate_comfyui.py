"""The attention nodes in a real ComfyUI, on a tiny Flux and Flux.2 with random weights."""

import re
from typing import Any

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.enable_socket]

TAYLOR = {"backend": "taylor", "P": 3, "sub_head_blocks": 1, "block_size_q": 512, "block_size_k": 512}
HYBRID = {"enabled": True, "global_P": 3, "global_weight": 1.0, "local_window": 64}
RUNS = [
    pytest.param({"variant": "flux2"}, 1.0, id="flux2"),
    pytest.param({"variant": "flux2", "batch": 2, "references": 1}, 2.0, id="flux2, cfg 2, batch 2, reference"),
    pytest.param({"variant": "flux", "masked": True}, 1.0, id="flux, mask"),
    pytest.param({"variant": "flux", "batch": 2, "masked": True}, 2.0, id="flux, cfg 2, batch 2, mask"),
]


@pytest.fixture(scope="module")
def defaults(comfyui: Any) -> Any:
    """Defaults of a node's widgets, as the page would fill them in."""
    known = comfyui.get("/object_info")

    def of(node: str) -> dict[str, Any]:
        found = {}
        for kind in ("required", "optional"):
            for name, (type_, *facts) in known[node]["input"].get(kind, {}).items():
                if facts and "default" in facts[0]:
                    found[name] = facts[0]["default"]
                elif type_ == "COMBO" or isinstance(type_, list):
                    found[name] = facts[0]["options"][0]
        return found

    return of


def _flow(comfyui: Any, flux: dict[str, Any], cfg: float, steps: int = 2) -> dict[str, Any]:
    if comfyui.newest != "flux2" and flux.get("variant") == "flux2":
        pytest.skip("this ComfyUI has no Flux2")
    return {
        "flux": ("TestFlux", {"variant": comfyui.newest, "size": 256, **flux}),
        "exact": _sampler(["flux", 0], cfg, steps),
    }


def _sampler(model: list[Any], cfg: float = 1.0, steps: int = 2) -> tuple[str, dict[str, Any]]:
    inputs = {"model": model, "positive": ["flux", 1], "negative": ["flux", 2], "latent_image": ["flux", 3]}
    inputs |= {"seed": 1, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return "KSampler", inputs


def _measured(model: str, sampled: str) -> dict[str, Any]:
    """A report and a comparison with exact attention."""
    return {
        f"report {sampled}": ("AttentionReport", {"model": [model, 0], "after": [sampled, 0]}),
        f"compare {sampled}": ("TestCompare", {"a": ["exact", 0], "b": [sampled, 0]}),
    }


def _report(outputs: dict[str, Any], sampled: str) -> str:
    found: str = outputs[f"report {sampled}"]["text"][0]
    assert outputs[f"report {sampled}"]["images"]
    return found


@pytest.mark.parametrize(("flux", "cfg"), RUNS)
def test_every_approximation_runs(comfyui: Any, defaults: Any, flux: dict[str, Any], cfg: float) -> None:
    prompt = _flow(comfyui, flux, cfg)
    nodes = {
        "near": ("ApproximateAttention", {"only_if_faster": False, "measure_error": True}),
        "taylor": ("TaylorAttentionBackend", TAYLOR),
        "hybrid": ("HybridTaylorAttentionBackend", HYBRID),
    }
    for name, (node, options) in nodes.items():
        prompt[name] = (node, {**defaults(node), **options, "model": ["flux", 0]})
        prompt[f"{name} sampled"] = _sampler([name, 0], cfg)
        prompt |= _measured(name, f"{name} sampled")
    outputs = comfyui.run(prompt)
    for name, ran in (("near", "near_far"), ("taylor", "taylor"), ("hybrid", "hybrid")):
        text = _report(outputs, f"{name} sampled")
        if name == "near" and flux.get("masked"):
            # ComfyUI's mask of Flux is a bias: near-far leaves it to exact attention and says so.
            assert "near-far attention takes no attention bias" in text
            assert outputs[f"compare {name} sampled"]["equal"] == [True]
            continue
        if flux.get("masked") and name in ("taylor", "hybrid"):
            assert "unsupported_mask" in text
            assert outputs[f"compare {name} sampled"]["equal"] == [True]
            continue
        assert re.search(rf"{ran} (\d+) of \1 calls", text)
        assert 0 < outputs[f"compare {name} sampled"]["relative"][0] < 0.3
        assert outputs[f"compare {name} sampled"]["equal"] == [False]


@pytest.mark.parametrize(("flux", "cfg"), RUNS)
def test_what_is_declined_is_bit_equal(comfyui: Any, defaults: Any, flux: dict[str, Any], cfg: float) -> None:
    prompt = _flow(comfyui, flux, cfg)
    nodes = {
        "near": ("ApproximateAttention", {"exact_above_sigma": 1e-6, "only_if_faster": False}),
        "taylor": ("TaylorAttentionBackend", {**TAYLOR, "min_tokens": 200_000}),
        "hybrid": ("HybridTaylorAttentionBackend", {**HYBRID, "local_window": 8192}),
    }
    before = "flux"
    for name, (node, options) in nodes.items():
        prompt[name] = (node, {**defaults(node), **options, "model": [before, 0]})
        before = name
    prompt["sampled"] = _sampler([before, 0], cfg)
    prompt |= _measured(before, "sampled")
    outputs = comfyui.run(prompt)
    assert outputs["compare sampled"] == {"relative": [0.0], "equal": [True]}
    # An older ComfyUI evaluates the two prompts of cfg 2 one after the other.
    assert len(re.findall(r"exact (\d+) of \1 calls", _report(outputs, "sampled"))) == 3


@pytest.mark.parametrize(
    "order", [("near", "taylor", "exact_"), ("exact_", "taylor", "near"), ("taylor", "exact_", "near")]
)
def test_nodes_stack_in_any_order(comfyui: Any, defaults: Any, order: tuple[str, ...]) -> None:
    prompt = _flow(comfyui, {}, 1.0)
    nodes = {
        "near": ("ApproximateAttention", {"only_if_faster": False, "layer_end": 0}),
        "taylor": ("TaylorAttentionBackend", {**TAYLOR, "taylor_layer_start": 1, "taylor_sigma_max": 0.95}),
        "exact_": ("AttentionBackend", {"backend": "sdpa_math"}),
    }
    before = "flux"
    for name in order:
        node, options = nodes[name]
        prompt[name] = (node, {**defaults(node), **options, "model": [before, 0]})
        before = name
    prompt["sampled"] = _sampler([before, 0])
    prompt |= _measured(before, "sampled")
    outputs = comfyui.run(prompt)
    text = _report(outputs, "sampled")
    # Two layers at two steps for near-far, the other two at the less noisy step for Taylor, the rest exact.
    assert "near_far 4 of" in text
    assert "taylor 2 of" in text
    assert "[native] sdpa_math 2 of 2 calls" in text
    assert 0 < outputs["compare sampled"]["relative"][0] < 0.3


def test_one_model_serves_two_samplers_and_the_next_prompt(comfyui: Any, defaults: Any) -> None:
    prompt = _flow(comfyui, {}, 1.0)
    node = "ApproximateAttention"
    prompt["near"] = (node, {**defaults(node), "only_if_faster": False, "model": ["flux", 0]})
    prompt["one"], prompt["two"] = _sampler(["near", 0]), _sampler(["near", 0])
    prompt["same"] = ("TestCompare", {"a": ["one", 0], "b": ["two", 0]})
    assert comfyui.run(prompt)["same"] == {"relative": [0.0], "equal": [True]}
    prompt["three"] = _sampler(["near", 0], steps=3)
    prompt["report"] = ("AttentionReport", {"model": ["near", 0], "after": ["three", 0]})
    assert "near_far 12 of 12 calls" in comfyui.run(prompt)["report"]["text"][0]


def test_a_small_image_stays_exact_and_the_report_says_why(comfyui: Any, defaults: Any) -> None:
    prompt = _flow(comfyui, {}, 1.0)
    prompt["near"] = ("ApproximateAttention", {**defaults("ApproximateAttention"), "model": ["flux", 0]})
    prompt["sampled"] = _sampler(["near", 0])
    prompt |= _measured("near", "sampled")
    outputs = comfyui.run(prompt)
    assert outputs["compare sampled"]["equal"] == [True]
    keys = 768 if comfyui.newest == "flux2" else 263
    assert f"times as fast as exact attention at {keys} keys" in _report(outputs, "sampled")


def test_the_backend_says_what_runs(comfyui: Any, defaults: Any) -> None:
    prompt = _flow(comfyui, {}, 1.0)
    for name in ("auto", "flash_fp8"):
        prompt[name] = ("AttentionBackend", {"backend": name, "model": ["flux", 0]})
        prompt[f"label {name}"] = ("TestShow", {"value": [name, 1]})
        prompt[f"sampled {name}"] = _sampler([name, 0])
        prompt[f"compare {name}"] = ("TestCompare", {"a": ["exact", 0], "b": [f"sampled {name}", 0]})
    outputs = comfyui.run(prompt)
    assert outputs["label auto"]["text"] == ["PyTorch SDPA, by ComfyUI"]
    assert "flash_fp8 does not run on cpu" in outputs["label flash_fp8"]["text"][0]
    assert outputs["compare auto"]["relative"][0] < 1e-5
    assert outputs["compare flash_fp8"]["relative"][0] < 1e-5


def test_a_wrong_value_is_one_clear_message(comfyui: Any, defaults: Any) -> None:
    prompt = _flow(comfyui, {}, 1.0)
    node = "ApproximateAttention"
    prompt["near"] = (node, {**defaults(node), "layer_start": 5, "layer_end": 2, "model": ["flux", 0]})
    prompt["sampled"] = _sampler(["near", 0])
    prompt |= _measured("near", "sampled")
    kind, message, at = comfyui.error(prompt)
    assert (kind, message, at) == ("ValueError", "layer_start 5 must not be above layer_end 2", "near")
