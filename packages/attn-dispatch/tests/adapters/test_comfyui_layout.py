"""Token layouts: by hand for stand-ins of every network, and by perturbing one patch of the real ones."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall, TokenLayout
from attn_dispatch.adapters.comfyui_layout import LAYOUTS, named_arguments
from attn_dispatch.adapters.comfyui_override import INSTALLED, OVERRIDE, ComfyOverride
from attn_dispatch.adapters.comfyui_wrappers import HostWrappers
from attn_dispatch.testing import RecordingHandler
from attn_kernels import TokenGrid
from torch import Tensor

from .conftest import prepare_comfyui


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


class Network:
    """Attributes of a network, and a forward whose code does or does not name the image slice."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def forward_orig(self) -> str:
        return "img_slice"


class OldNetwork(Network):
    def forward_orig(self) -> str:
        return "image first"


WAN = {"patch_size": (1, 2, 2)}
CASES: dict[str, tuple[str, Any, dict[str, Any], TokenLayout | None]] = {
    "Flux, odd size": (
        "Flux",
        Network(patch_size=2),
        {"x": zeros(1, 16, 9, 12), "context": zeros(1, 7, 8), "ref_latents": None},
        TokenLayout(37, ((0, 7),), (TokenGrid(7, 5, 6),)),
    ),
    "Flux2, two references": (
        "Flux",
        Network(patch_size=1),
        {"x": zeros(2, 16, 3, 4), "context": zeros(2, 7, 8), "ref_latents": [zeros(1, 16, 2, 2), zeros(1, 16, 1, 5)]},
        TokenLayout(28, ((0, 7),), (TokenGrid(7, 3, 4),), (TokenGrid(19, 2, 2), TokenGrid(23, 1, 5))),
    ),
    "Chroma": (
        "Chroma",
        Network(patch_size=2),
        {"x": zeros(1, 16, 4, 4), "context": zeros(1, 3, 8)},
        TokenLayout(7, ((0, 3),), (TokenGrid(3, 2, 2),)),
    ),
    "Qwen-Image, reference": (
        "QwenImageTransformer2DModel",
        Network(patch_size=2),
        {"x": zeros(1, 16, 1, 5, 4), "context": zeros(1, 3, 8), "ref_latents": [zeros(1, 16, 1, 2, 4)]},
        TokenLayout(11, ((0, 3),), (TokenGrid(3, 3, 2),), (TokenGrid(9, 1, 2),)),
    ),
    "Z-Image": (
        "NextDiT",
        Network(patch_size=2, pad_tokens_multiple=8),
        {"x": zeros(1, 4, 6, 6), "context": zeros(1, 11, 8)},
        TokenLayout(32, ((0, 16), (25, 32)), (TokenGrid(16, 3, 3),)),
    ),
    "Lumina 2": (
        "NextDiT",
        Network(patch_size=2, pad_tokens_multiple=None),
        {"x": zeros(1, 4, 6, 6), "context": zeros(1, 11, 8)},
        TokenLayout(20, ((0, 11),), (TokenGrid(11, 3, 3),)),
    ),
    "Z-Image with a reference": (
        "NextDiT",
        Network(patch_size=2, pad_tokens_multiple=4, siglip_embedder=object()),
        {
            "x": zeros(1, 4, 4, 4),
            "context": zeros(1, 3, 8),
            "ref_latents": [zeros(1, 4, 2, 6)],
            "ref_contexts": [zeros(1, 5, 8), zeros(1, 2, 8)],
            "siglip_feats": [zeros(1, 2, 3, 9)],
        },
        # Texts 8 + 4 + 4; features 8 and 4; reference 3 and 1 of padding; image.
        TokenLayout(36, ((0, 28), (31, 32)), (TokenGrid(32, 2, 2),), (TokenGrid(28, 1, 3),)),
    ),
    "Lumina 2 with packed texts": (
        "NextDiT",
        Network(patch_size=2),
        {"x": zeros(1, 4, 6, 6), "context": zeros(1, 11, 8), "num_tokens": 11, "attention_mask": zeros(1, 11)},
        None,
    ),
    "Wan": (
        "WanModel",
        Network(**WAN),
        {"x": zeros(1, 4, 3, 5, 4), "context": zeros(1, 11, 8)},
        TokenLayout(18, (), tuple(TokenGrid(6 * frame, 3, 2) for frame in range(3))),
    ),
    "Wan with everything": (
        "WanModel",
        Network(**WAN, ref_conv=object()),
        {
            "x": zeros(1, 4, 2, 4, 4),
            "context": zeros(1, 11, 8),
            "reference_latent": zeros(1, 4, 5, 4),
            "time_dim_concat": zeros(1, 4, 1, 4, 4),
            "context_latents": [zeros(1, 4, 1, 2, 2)],
        },
        TokenLayout(
            17,
            (),
            tuple(TokenGrid(4 + 4 * frame, 2, 2) for frame in range(3)),
            (TokenGrid(0, 2, 2), TokenGrid(16, 1, 1)),
        ),
    ),
    "Wan with as many words as tokens": (
        "WanModel",
        Network(**WAN),
        {"x": zeros(1, 4, 3, 5, 4), "context": zeros(1, 18, 8)},
        None,
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        Network(patch_size=[1, 2, 2], byt5_in=object()),
        {
            "x": zeros(1, 4, 2, 4, 4),
            "context": zeros(1, 3, 8),
            "txt_byt5": zeros(1, 2, 8),
            "clip_fea": zeros(1, 4, 8),
            "ref_latent": zeros(1, 4, 1, 4, 4),
        },
        TokenLayout(21, ((0, 9),), (TokenGrid(13, 2, 2), TokenGrid(17, 2, 2)), (TokenGrid(9, 2, 2),)),
    ),
    "HunyuanVideo before 0.14": (
        "HunyuanVideo",
        OldNetwork(patch_size=[1, 2, 2]),
        {"x": zeros(1, 4, 2, 4, 4), "context": zeros(1, 3, 8)},
        TokenLayout(11, ((8, 11),), (TokenGrid(0, 2, 2), TokenGrid(4, 2, 2))),
    ),
    "HunyuanImage": (
        "HunyuanVideo",
        Network(patch_size=[2, 2]),
        {"x": zeros(1, 4, 4, 6), "context": zeros(1, 3, 8)},
        TokenLayout(9, ((0, 3),), (TokenGrid(3, 2, 3),)),
    ),
    "HunyuanVideo with foreign code": (
        "HunyuanVideo",
        Network(patch_size=[1, 2, 2], forward_orig=lambda: "img_slice"),
        {"x": zeros(1, 4, 2, 4, 4), "context": zeros(1, 3, 8)},
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layouts(name: str) -> None:
    reader, network, given, expected = CASES[name]
    assert LAYOUTS[reader](network, given) == expected


def test_arguments_are_named_however_they_come() -> None:
    class Model:
        def forward(self, x: int, context: int, mask: int | None = None, **kwargs: int) -> None:
            raise AssertionError

    want = {"x": 1, "context": 2, "mask": None, "extra": 4}
    assert named_arguments(Model().forward, (1,), {"context": 2, "extra": 4}) == want
    assert named_arguments(Model().forward, (1, 2, None), {"extra": 4}) == want
    with pytest.raises(TypeError):
        named_arguments(Model().forward, (1,), {})


@dataclass
class Family:
    """A real network, its inputs, and what of them to perturb."""

    network: Any
    inputs: dict[str, Any]
    images: dict[str, tuple[int, int]]
    words: Tensor


HEAD = {"axes_dim": [8, 12, 12], "theta": 10000, "mlp_ratio": 2.0, "qkv_bias": True}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _only(known: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(known)}
    return {key: value for key, value in given.items() if key in names}


def flux_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.flux.model import Flux, FluxParams

    sizes = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "patch_size": 2}
    more = {"in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 24, "guidance_embed": False}
    network = Flux(**_only(FluxParams, {**HEAD, **sizes, **more, "txt_ids_dims": []}), **ops)
    reference = randn(1, 4, 4, 7)
    inputs = {"x": randn(1, 4, 7, 6), "context": randn(1, 5, 24), "y": randn(1, 8), "ref_latents": [reference]}
    return Family(network, inputs, {"x": (2, 2), "ref_latents": (2, 2)}, inputs["context"])


def chroma_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.chroma.model import Chroma, ChromaParams

    sizes = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "patch_size": 2, "n_layers": 1}
    more = {"in_channels": 16, "out_channels": 16, "context_in_dim": 24, "in_dim": 64, "out_dim": 64, "hidden_dim": 32}
    given = {**HEAD, **sizes, **more, "txt_ids_dims": [], "vec_in_dim": None}
    network = Chroma(**_only(ChromaParams, given), **ops)
    inputs = {"x": randn(1, 4, 6, 8), "context": randn(1, 5, 24), "guidance": torch.zeros(1)}
    return Family(network, inputs, {"x": (2, 2)}, inputs["context"])


def qwen_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12), **ops,
    )  # fmt: skip
    inputs = {"x": randn(1, 4, 1, 6, 8), "context": randn(1, 5, 24), "ref_latents": [randn(1, 4, 1, 4, 6)]}
    return Family(network, inputs, {"x": (2, 2), "ref_latents": (2, 2)}, inputs["context"])


def lumina_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.lumina.model import NextDiT

    padding = {"pad_tokens_multiple": 8} if "pad_tokens_multiple" in signature(NextDiT).parameters else {}
    network = NextDiT(
        patch_size=2, in_channels=4, dim=64, n_layers=2, n_refiner_layers=0, n_heads=2, multiple_of=32, qk_norm=True,
        cap_feat_dim=24, axes_dims=[8, 12, 12], axes_lens=[64, 64, 64], **padding, **ops,
    )  # fmt: skip
    inputs = {"x": randn(1, 4, 6, 10), "context": randn(1, 5, 24), "num_tokens": 5}
    return Family(network, inputs, {"x": (2, 2)}, inputs["context"])


def wan_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.wan.model import WanModel

    network = WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=5, in_dim=4, dim=64, ffn_dim=64, freq_dim=32, text_dim=24,
        out_dim=4, num_heads=2, num_layers=2, in_dim_ref_conv=4, **ops,
    )  # fmt: skip
    inputs = {"x": randn(1, 4, 3, 6, 4), "context": randn(1, 5, 24), "reference_latent": randn(1, 4, 6, 4)}
    return Family(network, inputs, {"x": (2, 2), "reference_latent": (2, 2)}, inputs["context"])


def hunyuan_family(ops: dict[str, Any]) -> Family:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    sizes = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "patch_size": [1, 2, 2]}
    more = {"in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 24, "guidance_embed": False}
    newer = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None}
    given = {**HEAD, **sizes, **more, **newer, "meanflow_sum": False}
    network = HunyuanVideo(**_only(HunyuanVideoParams, given), **ops)
    inputs = {
        "x": randn(1, 4, 2, 6, 4), "context": randn(1, 5, 24), "y": randn(1, 8),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "ref_latent": randn(1, 4, 1, 6, 4),
    }  # fmt: skip
    return Family(network, inputs, {"x": (2, 2), "ref_latent": (2, 2)}, inputs["context"])


@pytest.fixture(scope="module")
def operations() -> dict[str, Any]:
    prepare_comfyui()
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def run(family: Family) -> list[AttentionCall]:
    """Call the network once; its joint self-attentions, in order."""
    handler = RecordingHandler()
    override = ComfyOverride(handler)
    wrappers = HostWrappers(override, LAYOUTS)
    options = {
        OVERRIDE: override, INSTALLED: {INSTALLED: override}, "sigmas": torch.tensor([0.5]), "cond_or_uncond": [0],
        "wrappers": {"diffusion_model": {INSTALLED: [wrappers.around_model]}}, "sample_sigmas": torch.tensor([0.5, 0]),
    }  # fmt: skip
    inputs = dict(family.inputs)
    arguments = [inputs.pop("x"), torch.tensor([0.5])]
    with torch.no_grad():
        family.network(*arguments, **inputs, transformer_options=options)
    assert not override.declines
    return [call for call in handler.calls if call.layout is not None]


def changed_tokens(before: AttentionCall, after: AttentionCall) -> list[int]:
    return (before.k - after.k).abs().amax(dim=(0, 1, 3)).gt(1e-6).nonzero().flatten().tolist()


FAMILIES: list[Callable[[dict[str, Any]], Family]] = [
    flux_family, chroma_family, qwen_family, lumina_family, wan_family, hunyuan_family,
]  # fmt: skip


@pytest.mark.comfyui
@pytest.mark.parametrize("make", FAMILIES)
def test_a_patch_of_the_input_is_the_token_the_layout_says(
    make: Callable[[dict[str, Any]], Family], operations: dict[str, Any]
) -> None:
    """Change one latent pixel and see which token of the first joint attention changes."""
    torch.manual_seed(0)
    family = make(operations)
    with torch.no_grad():
        for name, weight in family.network.named_parameters():
            weight.copy_(randn(*weight.shape) * 0.2 if weight.ndim > 1 else randn(*weight.shape) * 0.1 + 0.5)
            assert name
    first = run(family)[0]
    layout = first.layout
    assert layout is not None
    assert layout.length == first.k.shape[2]
    for name, patch in family.images.items():
        value = family.inputs[name]
        tensor = value[0] if isinstance(value, list) else value
        grids = layout.grids if name == "x" else layout.references
        frames = tensor.shape[2] if tensor.ndim == 5 else 1
        assert len(grids) == frames
        for frame in range(frames):
            grid = grids[frame]
            row, column = grid.rows - 1, 1
            where = (0, 0, *((frame,) if tensor.ndim == 5 else ()), row * patch[0], column * patch[1])
            tensor[where] += 3.0
            assert changed_tokens(first, run(family)[0]) == [grid.start + row * grid.columns + column]
            tensor[where] -= 3.0
    family.words[0, 1] += 3.0
    text = {token for start, stop in layout.text for token in range(start, stop)}
    changed = changed_tokens(first, run(family)[0])
    assert set(changed) <= text
    assert changed or make is wan_family


@pytest.mark.comfyui
def test_integer_masks_become_key_masks(operations: dict[str, Any]) -> None:
    family = hunyuan_family(operations)
    with torch.no_grad():
        for weight in family.network.parameters():
            weight.copy_(randn(*weight.shape) * 0.2)
    for call in run(family):
        assert call.attn_bias is None
        assert call.key_mask is not None
        assert call.layout is not None
        dropped = (~call.key_mask[0]).nonzero().flatten().tolist()
        assert dropped == [call.layout.text[0][1] - 1]
