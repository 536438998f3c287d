import pytest
from attn_dispatch import AttentionHandler, AttentionRouter, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid


def test_a_layer_key_reads_what_it_prints() -> None:
    key = LayerKey("transformer_blocks", 12)
    assert str(key) == "transformer_blocks:12"
    assert LayerKey.parse(str(key)) == key


@pytest.mark.parametrize("text", ["", "single", "single:", ":3", "single:-1", "single:x"])
def test_a_malformed_layer_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        LayerKey.parse(text)


def test_equal_steps_are_one_step() -> None:
    steps = {StepContext(0.5, 3.0, (8, 8), (0, 1)), StepContext(0.5, 3.0, (8, 8), (0, 1)), StepContext(0.4)}
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("length", "text", "grids"),
    [
        (20, ((0, 5),), (TokenGrid(4, 4, 4),)),
        (20, ((0, 5),), (TokenGrid(5, 4, 4),)),
        (20, ((5, 2),), ()),
        (20, ((-1, 2),), ()),
    ],
)
def test_a_layout_must_fit(length: int, text: tuple[tuple[int, int], ...], grids: tuple[TokenGrid, ...]) -> None:
    with pytest.raises(ValueError, match="must not overlap"):
        TokenLayout(length, text, grids)


def test_a_layout_counts_generated_tokens_only() -> None:
    layout = TokenLayout(30, ((0, 5),), (TokenGrid(5, 4, 4),), (TokenGrid(21, 3, 3),))
    assert layout.image_tokens == 16


def test_a_router_is_a_handler() -> None:
    assert isinstance(AttentionRouter(), AttentionHandler)
