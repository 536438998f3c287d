import math
from dataclasses import replace

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionRouter,
    Backend,
    LayerKey,
    LayerRange,
    NativeAttention,
    Route,
    SdpaMode,
    StepContext,
    TokenLayout,
)
from attn_dispatch.backends import NearFarBackend, NearFarRule
from attn_dispatch.testing import TinyDiT
from attn_kernels import NearFarConfig, TokenGrid, near_far_attention, near_far_keys, relative_l2, softmax_attention
from attn_kernels.testing import make_qkv

FINE = NearFarConfig(tile=2, radius=0, top_k=0)
COARSE = NearFarConfig(tile=4, radius=0, top_k=0)


def flux(references: int = 0) -> TokenLayout:
    """Text first, then the image, then reference images."""
    grids = tuple(TokenGrid(7 + 80 + 48 * index, 6, 8) for index in range(references))
    return TokenLayout(7 + 80 + 48 * references, ((0, 7),), (TokenGrid(7, 8, 10),), grids)


LAYOUTS = {
    "flux": flux(),
    "flux with references": flux(2),
    "qwen, text last": TokenLayout(87, ((80, 87),), (TokenGrid(0, 8, 10),)),
    "z-image, text on both sides": TokenLayout(90, ((0, 3), (83, 90)), (TokenGrid(3, 8, 10),)),
    "wan, frames and no text": TokenLayout(96, (), tuple(TokenGrid(32 * frame, 4, 8) for frame in range(3))),
    "hunyuan video, frames then text": TokenLayout(75, ((64, 75),), (TokenGrid(0, 4, 8), TokenGrid(32, 4, 8))),
}


def make_call(layout: TokenLayout, *, batch: int = 1, heads: int = 2, masked: bool = False) -> AttentionCall:
    q, k, v = make_qkv(batch, heads, layout.length, 16, dtype=torch.float32, seed=0)
    mask = None
    if masked:
        mask = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(1)) > 0.2
    return AttentionCall(q, k, v, key_mask=mask, layer=LayerKey("single", 3), step=StepContext(0.5), layout=layout)


def exactly(call: AttentionCall) -> torch.Tensor:
    return softmax_attention(call.q, call.k, call.v, scale=call.scale, key_mask=call.key_mask).out


def pooled_oracle(call: AttentionCall, grids: tuple[TokenGrid, ...], tile: int) -> torch.Tensor:
    """Radius 0 without chosen tiles, one query at a time in float64."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    length = k.shape[2]
    keep = torch.ones(k.shape[0], length, dtype=torch.bool) if call.key_mask is None else call.key_mask
    tiles = []
    for grid in grids:
        for row in range(0, grid.rows, tile):
            for column in range(0, grid.columns, tile):
                rows, columns = range(row, min(row + tile, grid.rows)), range(column, min(column + tile, grid.columns))
                tiles.append([grid.start + r * grid.columns + c for r in rows for c in columns])
    inside = {place for places in tiles for place in places}
    outside = [place for place in range(length) if place not in inside]
    out = torch.zeros_like(q)
    for batch in range(k.shape[0]):
        for query in range(length):
            if query in outside:
                near, far = list(range(length)), []
            else:
                own = next(places for places in tiles if query in places)
                near, far = outside + own, [places for places in tiles if places is not own]
            near = [place for place in near if keep[batch, place]]
            far = [[place for place in places if keep[batch, place]] for places in far]
            far = [places for places in far if places]
            keys = torch.cat([k[batch][:, near], *(k[batch][:, places].mean(1, keepdim=True) for places in far)], dim=1)
            values = torch.cat(
                [v[batch][:, near], *(v[batch][:, places].mean(1, keepdim=True) for places in far)], dim=1
            )
            counts = torch.tensor([1.0] * len(near) + [float(len(places)) for places in far]).double()
            scores = (keys @ q[batch, :, query, :, None]).squeeze(-1) * q.shape[3] ** -0.5 + counts.log()
            out[batch, :, query] = (scores.softmax(-1)[:, None] @ values).squeeze(1)
    return out.float()


def test_it_is_a_backend() -> None:
    backend: Backend = NearFarBackend()
    assert backend.name == "near_far"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_answered_like_the_definition(layout: TokenLayout, masked: bool) -> None:
    call = make_call(layout, masked=masked)
    backend = NearFarBackend(COARSE)
    assert backend.refuses(call) is None
    torch.testing.assert_close(backend(call), pooled_oracle(call, layout.grids, 4), rtol=1e-4, atol=1e-5)


def test_references_may_be_cut_into_tiles_too() -> None:
    call = make_call(LAYOUTS["flux with references"])
    exact, pooled = NearFarBackend(COARSE), NearFarBackend(COARSE, references="grids")
    layout = LAYOUTS["flux with references"]
    assert pooled.grids_for(layout) == (*layout.grids, *layout.references)
    torch.testing.assert_close(
        pooled(call), pooled_oracle(call, (*layout.grids, *layout.references), 4), rtol=1e-4, atol=1e-5
    )
    assert relative_l2(pooled(call), exact(call)) > 0.05


def test_batch_heads_and_scale_of_the_call_count() -> None:
    call = replace(make_call(flux(), batch=3, heads=4, masked=True), scale=0.4)
    expected = near_far_attention(
        call.q, call.k, call.v, grids=flux().grids, config=FINE, scale=0.4, key_mask=call.key_mask, impl="reference"
    ).out
    torch.testing.assert_close(NearFarBackend(FINE)(call), expected, rtol=1e-4, atol=1e-5)


def test_smaller_tiles_are_nearer_to_attention() -> None:
    q, k, v = make_qkv(1, 2, 87, 16, dtype=torch.float32, seed=0, smooth_grid=flux().grids[0])
    call = replace(make_call(flux()), q=q, k=k, v=v)
    errors = [float(relative_l2(NearFarBackend(config)(call), exactly(call))) for config in (COARSE, FINE)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": None}, "the host does not say where text and image tokens lie"),
        ({"layout": TokenLayout(88, (), (TokenGrid(0, 8, 11),))}, "the layout describes 88 tokens, the call has 87"),
        ({"layout": TokenLayout(87, ((0, 87),), ())}, "the layout has no image grid"),
        ({"attn_bias": torch.zeros(1, 1, 87, 87)}, "near-far attention takes no attention bias"),
        ({"q": torch.zeros(1, 2, 5, 16)}, "near-far attention answers self-attention only"),
        ({"k": torch.zeros(1, 1, 87, 16), "v": torch.zeros(1, 1, 87, 16)}, "heads_mismatch: "),
        ({"q": torch.zeros(2, 2, 87, 16)}, "batch_mismatch: "),
    ],
)
def test_what_it_cannot_answer_is_refused(change: dict[str, object], reason: str) -> None:
    call = replace(make_call(flux()), **change)  # type: ignore[arg-type]
    answer = NearFarBackend(FINE).refuses(call)
    assert answer is not None
    assert answer.startswith(reason)


def test_nothing_to_save_is_refused() -> None:
    call = make_call(flux())
    assert near_far_keys(flux().grids, 87, NearFarConfig(tile=4, radius=2, top_k=0)) == 87
    reason = NearFarBackend(NearFarConfig(tile=4, radius=2, top_k=0)).refuses(call)
    assert reason == "near-far attention with these settings meets every one of 87 tokens"
    assert NearFarBackend(NearFarConfig(tile=1, radius=0, top_k=0)).refuses(call) is not None


def test_references_in_tiles_can_be_what_is_saved() -> None:
    layout = TokenLayout(7 + 16 + 80, ((0, 7),), (TokenGrid(7, 4, 4),), (TokenGrid(23, 8, 10),))
    config = NearFarConfig(tile=4, radius=0, top_k=0)
    call = make_call(layout)
    assert "meets every one of 103 tokens" in (NearFarBackend(config).refuses(call) or "")
    assert NearFarBackend(config, references="grids").refuses(call) is None


def test_asking_for_an_answer_against_a_reason_raises() -> None:
    with pytest.raises(ValueError, match="where text and image tokens lie"):
        NearFarBackend()(replace(make_call(flux()), layout=None))


SINGLE, DOUBLE = LayerKey("single", 3), LayerKey("double", 3)


@pytest.mark.parametrize(
    ("rule", "layer", "sigma", "covered"),
    [
        (NearFarRule(FINE), None, None, True),
        (NearFarRule(FINE, LayerRange(0, 3)), SINGLE, None, True),
        (NearFarRule(FINE, LayerRange(0, 2)), SINGLE, 0.5, False),
        (NearFarRule(FINE, LayerRange(0, 9, "double")), SINGLE, 0.5, False),
        (NearFarRule(FINE, LayerRange(0, 9)), None, 0.5, False),
        (NearFarRule(FINE, (DOUBLE, LayerKey("single", 4))), DOUBLE, 0.5, True),
        (NearFarRule(FINE, (DOUBLE,)), SINGLE, 0.5, False),
        (NearFarRule(FINE, sigma=(0.5, 0.8)), SINGLE, 0.5, True),
        (NearFarRule(FINE, sigma=(0.5, 0.8)), SINGLE, 0.8, False),
        (NearFarRule(FINE, sigma=(0.5, math.inf)), SINGLE, None, False),
    ],
)
def test_what_a_rule_covers(rule: NearFarRule, layer: LayerKey | None, sigma: float | None, covered: bool) -> None:
    step = None if sigma is None else StepContext(sigma)
    assert rule.covers(replace(make_call(flux()), layer=layer, step=step)) is covered


def test_the_first_rule_that_covers_a_call_decides() -> None:
    rules = [
        NearFarRule(None, sigma=(0.9, math.inf)),
        NearFarRule(FINE, (SINGLE,)),
        NearFarRule(COARSE, LayerRange(0, 9)),
    ]
    backend = NearFarBackend(None, rules)
    call = make_call(flux())
    assert backend.config_for(call) is FINE
    assert backend.config_for(replace(call, layer=DOUBLE)) is COARSE
    for kept in (replace(call, step=StepContext(0.9)), replace(call, layer=LayerKey("single", 10))):
        assert backend.refuses(kept) == "a rule keeps this layer and noise level exact"
    assert torch.equal(backend(call), NearFarBackend(FINE)(call))
    assert torch.equal(backend(replace(call, layer=DOUBLE)), NearFarBackend(COARSE)(call))


@pytest.mark.parametrize("sigma", [(0.5, 0.5), (-0.1, 0.5), (0.6, 0.5)])
def test_an_empty_range_of_noise_levels_is_refused(sigma: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low < high"):
        NearFarRule(FINE, sigma=sigma)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="references must be"):
        NearFarBackend(references="pooled")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl must be one of"):
        NearFarBackend(impl="fast")


def test_the_implementation_can_be_chosen() -> None:
    call = make_call(flux())
    with pytest.raises(ValueError, match="cannot run here"), torch.enable_grad():
        NearFarBackend(FINE, impl="blocked")(replace(call, q=call.q.requires_grad_()))


MODEL_LAYOUTS = {
    "text first": TokenLayout(149, ((0, 5),), (TokenGrid(5, 12, 12),)),
    "references": TokenLayout(149, ((0, 5),), (TokenGrid(5, 8, 12),), (TokenGrid(101, 4, 12),)),
    "frames": TokenLayout(149, ((0, 5),), tuple(TokenGrid(5 + 48 * frame, 4, 12) for frame in range(3))),
}
TEXT_LAST = TokenLayout(149, ((144, 149),), (TokenGrid(0, 12, 12),))


class TextLast:
    """A handler that shows another one the same calls with the text behind the image, and puts answers back."""

    def __init__(self, handler: AttentionRouter) -> None:
        self.handler = handler

    def __call__(self, call: AttentionCall, native: NativeAttention) -> torch.Tensor:
        q, k, v = (x.roll(-5, dims=2) for x in (call.q, call.k, call.v))
        return self.handler(replace(call, q=q, k=k, v=v, layout=TEXT_LAST), native).roll(5, dims=2)

    def begin_run(self) -> None:
        self.handler.begin_run()

    def end_run(self) -> None:
        self.handler.end_run()


@pytest.mark.parametrize("layout", MODEL_LAYOUTS.values(), ids=MODEL_LAYOUTS.keys())
def test_a_model_runs_with_it_end_to_end(layout: TokenLayout) -> None:
    model = TinyDiT()
    inputs = model.example(12, 12)
    router = AttentionRouter([Route(NearFarBackend(NearFarConfig(tile=2, radius=1, top_k=4)))])
    with torch.no_grad():
        exact = model(**inputs)
        with SdpaMode(router, describe=lambda q, k: (None, None, layout)):
            output = model(**inputs)
        assert torch.equal(model(**inputs), exact)
    assert router.report.counts() == {"near_far": 5}
    assert 0 < relative_l2(output, exact) < 0.1


def test_text_may_come_last_as_well() -> None:
    model = TinyDiT()
    inputs = model.example(12, 12)
    outputs = []
    for wrap in (lambda router: router, TextLast):
        router = AttentionRouter([Route(NearFarBackend(NearFarConfig(tile=2, radius=1, top_k=4)))])
        with torch.no_grad(), SdpaMode(wrap(router), describe=lambda q, k: (None, None, MODEL_LAYOUTS["text first"])):
            outputs.append(model(**inputs))
        assert router.report.counts() == {"near_far": 5}
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_refusals_are_counted_and_native_answers() -> None:
    model = TinyDiT()
    inputs = model.example(8, 8)
    router = AttentionRouter([Route(NearFarBackend())])
    with torch.no_grad():
        exact = model(**inputs)
        with SdpaMode(router):
            assert torch.equal(model(**inputs), exact)
    assert router.report.declines() == {"the host does not say where text and image tokens lie": 5}


def test_nothing_waits_for_the_device(host_reads) -> None:
    call = make_call(flux(), masked=True)
    backend = NearFarBackend(NearFarConfig(tile=2, radius=1, top_k=2))
    backend(call)
    with host_reads() as mode:
        assert backend.refuses(call) is None
        backend(call)
    assert mode.seen == []
