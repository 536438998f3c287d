import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, LayerRange, MinTokens, SigmaBelow, StepContext


def make_call(layer: LayerKey | None = None, sigma: float | None = None, keys: int = 4) -> AttentionCall:
    q, kv = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, keys, 4)
    return AttentionCall(q, kv, kv, layer=layer, step=None if sigma is None else StepContext(sigma))


ACROSS = LayerRange(LayerKey("double", 0), LayerKey("single", 2))


@pytest.mark.parametrize(
    ("guard", "layer", "reason"),
    [
        (ACROSS, "double:0", None),
        (ACROSS, "double:18", None),
        (ACROSS, "single:2", None),
        (ACROSS, "single:3", "layer single:3 is outside double:0..single:2"),
        (LayerRange(LayerKey("double", 1), LayerKey("single", 2)), "double:0", "layer double:0 is outside double:1.."),
        (LayerRange(1, 3), "single:1", None),
        (LayerRange(1, 3), "double:3", None),
        (LayerRange(1, 3), "single:4", "layer single:4 is outside 1..3"),
        (LayerRange(1, 3, "single"), "double:2", "layer double:2 is outside single:1..3"),
        (LayerRange(1, 3, "single"), "single:0", "layer single:0 is outside single:1..3"),
    ],
)
def test_layer_range(guard: LayerRange, layer: str, reason: str | None) -> None:
    answer = guard(make_call(LayerKey.parse(layer)))
    if reason is None:
        assert answer is None
    else:
        assert answer is not None
        assert answer.startswith(reason)


def test_what_the_host_does_not_tell_is_refused() -> None:
    assert LayerRange(0, 99)(make_call()) == "the host does not name the layer"
    assert SigmaBelow(2.0)(make_call()) == "the host does not tell the noise level"


def test_sigma_below_excludes_its_limit() -> None:
    guard = SigmaBelow(0.8)
    assert guard(make_call(sigma=0.79)) is None
    assert guard(make_call(sigma=0.8)) == "sigma 0.8 is not below 0.8"


def test_min_tokens_includes_its_limit() -> None:
    guard = MinTokens(7)
    assert guard(make_call(keys=7)) is None
    assert guard(make_call(keys=6)) == "6 keys are fewer than 7"


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 2),
        (-1, 2),
        (LayerKey("single", 0), LayerKey("double", 0)),
        (LayerKey("single", 0), 3),
        (LayerKey("single", 0), LayerKey("single", 3), "single"),
    ],
)
def test_an_impossible_layer_range_is_refused(arguments: tuple[LayerKey | int, LayerKey | int]) -> None:
    with pytest.raises(ValueError, match="first"):
        LayerRange(*arguments)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_sigma_limit_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        SigmaBelow(limit)


def test_min_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MinTokens(0)
