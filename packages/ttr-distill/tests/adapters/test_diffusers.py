import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attn_dispatch import (
    AttentionCall,
    AttentionRouter,
    LayerKey,
    LayerRange,
    Route,
    SdpaMode,
    StepContext,
    TokenLayout,
)
from attn_dispatch.testing import RecordingHandler, TinyDiT
from attn_kernels import TokenGrid
from torch import Tensor, nn
from ttr_distill.adapters.diffusers import DiffusersHost, attention_shape, layers

diffusers = pytest.importorskip("diffusers")

WORDS = 5
NAMES = ("double:0", "double:1", "single:0", "single:1", "single:2")


InputsMaker = Callable[..., dict[str, Any]]
IdsMaker = Callable[..., Tensor]
Check = Callable[[nn.Module], None]
HandlerMaker = Callable[..., RecordingHandler]


def test_layers_and_shape(flux: nn.Module) -> None:
    assert tuple(map(str, layers(flux))) == NAMES
    assert attention_shape(flux) == (4, 32)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_attention_arrives_with_layer_step_and_layout(
    flux: nn.Module, inference: bool, batch: int, make_inputs: InputsMaker, assert_untouched: Check
) -> None:
    inputs = make_inputs(batch=batch)
    handler = RecordingHandler()
    with torch.inference_mode(inference):
        expected = flux(**inputs)[0]
        with DiffusersHost(flux, handler, cfg_scale=3.0, cond_or_uncond=(0, 1)[:batch]) as host:
            inside = flux(**inputs)[0]
        after = flux(**inputs)[0]
    assert torch.equal(inside, expected)
    assert torch.equal(after, expected)
    assert_untouched(flux)
    assert not host.declines
    assert tuple(str(call.layer) for call in handler.calls) == NAMES
    for call in handler.calls:
        assert tuple(call.q.shape) == tuple(call.v.shape) == (batch, 4, WORDS + 12, 32)
        assert call.step == StepContext(0.75, 3.0, (3, 4), (0, 1)[:batch])
        assert call.layout == TokenLayout(WORDS + 12, ((0, WORDS),), (TokenGrid(WORDS, 3, 4),))
    assert (handler.begun, handler.ended) == (0, 0)


def test_positional_inputs_are_read(flux: nn.Module, make_inputs: InputsMaker) -> None:
    inputs = make_inputs()
    handler = RecordingHandler()
    with DiffusersHost(flux, handler):
        flux(*(inputs[name] for name in list(inputs)[:-1]), return_dict=False)
    assert handler.calls[0].step == StepContext(0.75, 1.0, (3, 4))


def test_steps_follow_the_timestep(flux: nn.Module, make_inputs: InputsMaker) -> None:
    inputs = make_inputs()
    handler = RecordingHandler()
    with DiffusersHost(flux, handler):
        for sigma in (1.0, 0.5):
            flux(**{**inputs, "timestep": torch.tensor([sigma])})
    sigmas = [call.step.sigma for call in handler.calls if call.step is not None]
    assert sigmas == [1.0] * 5 + [0.5] * 5


def test_a_batch_of_different_steps_has_no_step(flux: nn.Module, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    with DiffusersHost(flux, handler):
        flux(**{**make_inputs(batch=2), "timestep": torch.tensor([0.5, 0.4])})
    assert {call.step for call in handler.calls} == {None}


def test_queries_and_keys_carry_rope(flux: nn.Module, fractional_ids: IdsMaker, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    still, moved = make_inputs(), make_inputs(ids=fractional_ids(3, 4, scale=48.0))
    with DiffusersHost(flux, handler):
        flux(**still)
        flux(**moved)
    first, second = handler.calls[0], handler.calls[5]
    assert torch.equal(first.q[:, :, :WORDS], second.q[:, :, :WORDS])
    assert not torch.allclose(first.q[:, :, WORDS:], second.q[:, :, WORDS:], atol=1e-2)
    assert torch.equal(first.v, second.v)


@pytest.mark.parametrize(
    ("make_ids", "latent_size", "grids", "references", "step_size"),
    [
        (lambda ids: ids(1, 6), None, ((1, 6),), (), (1, 6)),
        (lambda ids: ids(6, 1), None, ((6, 1),), (), (6, 1)),
        (lambda ids: ids(3, 4)[None], None, ((3, 4),), (), (3, 4)),
        (lambda ids: ids(3, 4), (6, 8), ((3, 4),), (), (6, 8)),
        (lambda ids: ids(3, 4)[torch.randperm(12, generator=torch.Generator().manual_seed(0))], None, (), (), (0, 0)),
        (lambda ids: ids(3, 4).flip(0).sort(0).values, (3, 4), ((3, 4),), (), (3, 4)),
        (lambda ids: torch.cat([ids(3, 4), ids(2, 3, image=1)]), None, ((3, 4),), ((2, 3),), (3, 4)),
        (lambda ids: torch.cat([ids(3, 4), ids(2, 3, image=1)]), (3, 4), ((3, 4),), ((2, 3),), (3, 4)),
        (lambda ids: ids(3, 4)[:11], None, (), (), (0, 0)),
    ],
)
def test_grids_are_read_and_never_guessed(
    flux: nn.Module,
    make_ids: Callable[[IdsMaker], Tensor],
    latent_size: tuple[int, int] | None,
    grids: tuple[tuple[int, int], ...],
    references: tuple[tuple[int, int], ...],
    step_size: tuple[int, int],
    fractional_ids: IdsMaker,
    make_inputs: InputsMaker,
) -> None:
    ids = make_ids(fractional_ids)
    handler = RecordingHandler()
    with torch.no_grad(), DiffusersHost(flux, handler, latent_size=latent_size):
        flux(**make_inputs(ids=ids))
    layout, step = handler.calls[0].layout, handler.calls[0].step
    assert layout is not None
    assert step is not None
    assert layout.text == ((0, WORDS),)
    assert layout.length == WORDS + ids.shape[-2]
    assert tuple((grid.rows, grid.columns) for grid in layout.grids) == grids
    assert tuple((grid.rows, grid.columns) for grid in layout.references) == references
    assert [grid.start for grid in layout.references] == [WORDS + 12] * len(references)
    assert step.latent_size == step_size


def test_new_ids_are_read_anew(flux: nn.Module, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    with torch.no_grad(), DiffusersHost(flux, handler):
        flux(**make_inputs(3, 4))
        flux(**make_inputs(6, 2))
    assert handler.calls[-1].layout == TokenLayout(WORDS + 12, ((0, WORDS),), (TokenGrid(WORDS, 6, 2),))


def test_a_latent_size_that_does_not_fit_is_an_error(
    flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check
) -> None:
    host = DiffusersHost(flux, RecordingHandler(), latent_size=(5, 5))
    with pytest.raises(ValueError, match=r"latent_size \(5, 5\) does not fit 12 image tokens"), host:
        flux(**make_inputs())
    assert_untouched(flux)
    with pytest.raises(ValueError, match="positive"):
        DiffusersHost(flux, RecordingHandler(), latent_size=(0, 5))


def test_attention_over_other_tokens_has_no_layer(flux: nn.Module, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    attention = flux.get_submodule("single_transformer_blocks.1.attn")
    x = torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(0))

    def image_prompt(module: nn.Module, args: object) -> None:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)

    with torch.no_grad(), DiffusersHost(flux, handler):
        extra = attention.register_forward_pre_hook(image_prompt)
        try:
            flux(**make_inputs())
        finally:
            extra.remove()
    odd = handler.calls[3]
    assert (odd.layer, odd.layout) == (None, None)
    assert tuple(str(call.layer) for call in handler.calls if call is not odd) == NAMES


def test_a_block_called_alone_has_a_layer_but_no_step(flux: nn.Module, make_inputs: InputsMaker) -> None:
    handler = RecordingHandler()
    with torch.no_grad(), DiffusersHost(flux, handler):
        flux(**make_inputs())
        flux.get_submodule("single_transformer_blocks.2.attn")(hidden_states=torch.zeros(1, 6, 128))
    last = handler.calls[-1]
    assert (str(last.layer), last.step, last.layout) == ("single:2", None, None)


def test_a_router_with_a_layer_range_swaps_those_layers_only(flux: nn.Module, make_inputs: InputsMaker) -> None:
    class Zeros:
        name = "zeros"

        def refuses(self, call: AttentionCall) -> str | None:
            return None

        def __call__(self, call: AttentionCall) -> Tensor:
            return torch.zeros_like(call.q)

    router = AttentionRouter([Route(Zeros(), (LayerRange(LayerKey("double", 1), LayerKey("single", 1)),))])
    inputs = make_inputs()
    with torch.inference_mode():
        expected = flux(**inputs)[0]
        with DiffusersHost(flux, router):
            assert not torch.allclose(flux(**inputs)[0], expected)
        assert torch.equal(flux(**inputs)[0], expected)
    assert router.report.counts() == {"native": 2, "zeros": 3}
    assert set(router.report.declines()) == {
        "layer double:0 is outside double:1..single:1",
        "layer single:2 is outside double:1..single:1",
    }


def test_two_threads_do_not_mix_on_one_model(
    flux: nn.Module, make_inputs: InputsMaker, assert_untouched: Check, constant: HandlerMaker
) -> None:
    inputs = make_inputs()
    barrier = threading.Barrier(2, timeout=30)
    found: dict[str, list[bool]] = {"native": [], "zeros": []}
    with torch.no_grad():
        exact = flux(**inputs)[0]
        with DiffusersHost(flux, constant()):
            zeroed = flux(**inputs)[0]
    assert not torch.allclose(exact, zeroed)

    def work(name: str, handler: RecordingHandler, expected: Tensor) -> None:
        with torch.no_grad(), DiffusersHost(flux, handler):
            barrier.wait()
            for _ in range(5):
                found[name].append(torch.equal(flux(**inputs)[0], expected))
            barrier.wait()
        found[name].append(len(handler.calls) == 25)

    threads = [
        threading.Thread(target=work, args=("native", RecordingHandler(), exact)),
        threading.Thread(target=work, args=("zeros", constant(), zeroed)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"native": [True] * 6, "zeros": [True] * 6}
    assert_untouched(flux)


def test_another_model_with_such_blocks_is_served() -> None:
    model = TinyDiT()
    handler = RecordingHandler()
    assert attention_shape(model) == (2, 16)
    with torch.no_grad(), DiffusersHost(model, handler), SdpaMode(RecordingHandler()):
        model(**model.example(4, 3))
    assert [call.layer for call in handler.calls] == list(layers(model))
    assert handler.calls[0].layout == TokenLayout(17, ((0, 5),), (TokenGrid(5, 4, 3),))


def test_flux_2_is_served(flux_2: Callable[..., nn.Module], fractional_ids: IdsMaker, make_inputs: InputsMaker) -> None:
    model = flux_2(guidance_embeds=False)
    ids = torch.cat([fractional_ids(3, 4), torch.zeros(12, 1)], dim=1)
    inputs = make_inputs(ids=ids)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][..., :24]
    inputs["txt_ids"] = torch.zeros(WORDS, 4)
    inputs.pop("pooled_projections")
    handler = RecordingHandler()
    assert attention_shape(model) == (2, 32)
    with torch.inference_mode():
        expected = model(**inputs)[0]
        with DiffusersHost(model, handler):
            assert torch.equal(model(**inputs)[0], expected)
    assert [str(call.layer) for call in handler.calls] == ["double:0", "single:0", "single:1"]
    assert handler.calls[2].layout == TokenLayout(WORDS + 12, ((0, WORDS),), (TokenGrid(WORDS, 3, 4),))


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("model", "text"), [(nn.Linear(2, 2), "Linear has no list of blocks"), (NoAttention(), "NoAttention")]
)
def test_another_model_is_refused_by_name(model: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DiffusersHost(model, RecordingHandler())
    with pytest.raises(ValueError, match=text):
        layers(model)
