"""The host on compiled and offloaded models, and on transformers of other families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attn_dispatch import LayerKey, StepContext, TokenLayout
from attn_dispatch.testing import RecordingHandler
from attn_kernels import TokenGrid
from torch import nn
from ttr_distill.adapters.diffusers import DiffusersHost, attention_shape, layers
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.distiller import Distiller

diffusers = pytest.importorskip("diffusers")

InputsMaker = Callable[..., dict[str, Any]]
NAMES = ["double:0", "double:1", "single:0", "single:1", "single:2"]


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "wrapper":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if how == "module":
        model.compile(backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager")  # type: ignore[operator]
    return model


@pytest.mark.parametrize("how", ["wrapper", "blocks"])
def test_a_model_compiled_and_run_before_reaches_the_handler(
    new_flux: Callable[[], nn.Module], make_inputs: InputsMaker, how: str
) -> None:
    torch._dynamo.reset()
    inputs = make_inputs()
    plain = new_flux()
    model = compiled(plain, how)
    with torch.no_grad():
        expected = model(**inputs)[0]
        handler = RecordingHandler()
        with DiffusersHost(model, handler):
            inside = model(**inputs)[0]
            frames = torch._dynamo.utils.counters["frames"]["total"]
        assert torch.equal(inside, expected)
        assert torch.equal(model(**inputs)[0], expected)
    assert [str(call.layer) for call in handler.calls] == NAMES
    assert {call.step for call in handler.calls} == {StepContext(0.75, 1.0, (3, 4))}
    assert {call.layout for call in handler.calls} == {TokenLayout(17, ((0, 5),), (TokenGrid(5, 3, 4),))}
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "what was compiled before is used again after"
    torch._dynamo.reset()


def test_a_compiled_model_is_distilled_without_a_change(
    new_flux: Callable[[], nn.Module], make_inputs: InputsMaker
) -> None:
    torch._dynamo.reset()
    model = compiled(new_flux(), "module")
    bank = StudentBank.for_layers(preset("near_far", tile=2, top_k=1), layers(model), *attention_shape(model))
    distiller = Distiller(bank, ReadinessTracker())
    with torch.inference_mode():
        before = model(**make_inputs())[0]
        distiller.begin_run()
        with DiffusersHost(model, distiller):
            inside = model(**make_inputs())[0]
        distiller.end_run()
        after = model(**make_inputs())[0]
    distiller.raise_pending()
    assert distiller.updates > 0
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    torch._dynamo.reset()


def test_weights_moved_by_accelerate_go_on_moving(new_flux: Callable[[], nn.Module], make_inputs: InputsMaker) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = make_inputs()
    model, plain = new_flux(), new_flux()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    handler = RecordingHandler()
    with torch.no_grad():
        with DiffusersHost(model, handler):
            assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
    assert [str(call.layer) for call in handler.calls] == NAMES
    assert handler.calls[0].step == StepContext(0.75, 1.0, (3, 4))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_sd3_takes_the_image_before_the_text() -> None:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 6, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=g),
        "pooled_projections": torch.randn(1, 16, generator=g),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    handler = RecordingHandler()
    with torch.no_grad():
        expected = model(**inputs)[0]
        with DiffusersHost(model, handler):
            assert torch.equal(model(**inputs)[0], expected)
        first = handler.calls[0].k
        with DiffusersHost(model, handler):
            model(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1.0})
    other = handler.calls[2].k
    assert torch.equal(first[:, :, :12], other[:, :, :12]), "the image's keys of the first layer know no text"
    assert not torch.allclose(first[:, :, 12:], other[:, :, 12:])
    assert (
        [call.layer for call in handler.calls[:2]]
        == list(layers(model))
        == [
            LayerKey("double", 0),
            LayerKey("double", 1),
        ]
    )
    assert handler.calls[0].layout == TokenLayout(17, ((12, 17),), (TokenGrid(0, 3, 4),))
    assert attention_shape(model) == (2, 16)


def test_a_model_of_self_and_cross_attention_is_served_where_the_tokens_are_known() -> None:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()
    handler = RecordingHandler()
    with torch.no_grad(), DiffusersHost(model, handler):
        model(
            hidden_states=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            encoder_hidden_states=torch.zeros(1, 5, 24),
            timestep=torch.tensor([500.0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
    assert [str(call.layer) for call in handler.calls] == ["double:0", "double:1"]
    assert {call.layout for call in handler.calls} == {TokenLayout(16, (), (TokenGrid(0, 4, 4),))}
    assert all(call.q.shape[2] == call.k.shape[2] for call in handler.calls)
    assert attention_shape(model) == (2, 16)


def test_lists_of_other_names_keep_them() -> None:
    class Attention(nn.Module):
        heads, inner_dim = 2, 12

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refiners = nn.ModuleList([nn.Linear(2, 2)])
            self.blocks = nn.ModuleList([Block(), Block()])
            self.transformer_blocks = nn.ModuleList([Block()])

    assert [str(layer) for layer in layers(Model())] == ["double:0", "blocks:0", "blocks:1"]
    assert attention_shape(Model()) == (2, 6)
