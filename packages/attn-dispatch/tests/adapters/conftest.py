"""Hosts that run the same tests: the stand-in always, a real ComfyUI where COMFYUI_PATH names one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import pytest
import torch
from attn_dispatch import LayerKey
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from attn_dispatch.adapters.comfyui_layout import LAYOUTS
from attn_dispatch.adapters.comfyui_tiny import tiny_patcher
from attn_kernels import TokenGrid
from torch import Tensor

DOUBLE, SINGLE = 2, 3


class Host(Protocol):
    """What the conformance tests need of a host."""

    name: str
    words: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    grids: tuple[tuple[int, int], tuple[int, int]]
    named: bool

    def model(self, seed: int = 0) -> Any:
        """Make a patcher of a new tiny model."""

    def install(self, patcher: Any, handler: Any, **keywords: Any) -> Any:
        """Install a handler, as a node does."""

    def sample(
        self,
        patcher: Any,
        *,
        cfg: float = 1.0,
        batch: int = 1,
        references: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample three steps from fixed noise."""

    def attention(self) -> Callable[..., Tensor]:
        """The host's attention function, as models call it."""


def layers() -> tuple[LayerKey, ...]:
    return (*(LayerKey("double", i) for i in range(DOUBLE)), *(LayerKey("single", i) for i in range(SINGLE)))


def image_grids(host: Host, *, references: bool) -> tuple[tuple[TokenGrid, ...], tuple[TokenGrid, ...]]:
    """Grids of the image and of the reference image: text first, then these in order."""
    image = TokenGrid(host.words, *host.grids[0])
    return (image,), (TokenGrid(image.stop, *host.grids[1]),) if references else ()


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OldFlux(FakeFlux):
    """As older releases have it: no names, but blocks that a node can replace."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed, named=False)
        self.double_blocks, self.single_blocks = self.tiny.transformer_blocks, self.tiny.single_transformer_blocks


class FakeHost:
    words = 5
    sizes = ((9, 12), (6, 7))
    grids = ((5, 6), (3, 4))

    def __init__(self, *, named: bool = True, old: bool = False) -> None:
        self.name = "fake old" if old else "fake"
        self.named = named
        self.old = old

    def model(self, seed: int = 0) -> FakeModelPatcher:
        return FakeModelPatcher(OldFlux(seed=seed) if self.old else FakeFlux(seed=seed, named=self.named))

    def install(self, patcher: Any, handler: Any, **keywords: Any) -> Any:
        readers = MappingProxyType({**LAYOUTS, **dict.fromkeys(("FakeFlux", "OldFlux"), LAYOUTS["Flux"])})
        return install(patcher, handler, layouts=readers, **keywords)

    def sample(
        self,
        patcher: Any,
        *,
        cfg: float = 1.0,
        batch: int = 1,
        references: bool = False,
        on_step: Callable[[int], None] | None = None,
        together: bool = True,
    ) -> Tensor:
        with torch.inference_mode():
            return FakeGuider(patcher, cfg, together=together).sample(
                _randn(1, batch, 4, *self.sizes[0]),
                torch.tensor([1.0, 0.7, 0.4, 0.0]),
                _randn(2, 1, self.words, 8),
                _randn(3, 1, self.words, 8),
                [_randn(4, 1, 4, *self.sizes[1])] if references else None,
                on_step,
            )

    def attention(self) -> Callable[..., Tensor]:
        return FakeFlux().attention


def prepare_comfyui() -> None:
    """Make the checkout importable, on the CPU and with the attention that it has on GPUs; skip without one."""
    checkout = os.environ.get("COMFYUI_PATH", "")
    if not Path(checkout, "nodes.py").is_file():
        pytest.skip("COMFYUI_PATH does not name a ComfyUI checkout")
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True


class RealHost:
    """A ComfyUI checkout with a tiny random Flux or Flux2."""

    def __init__(self, variant: str) -> None:
        import comfy.ldm.modules.attention as attention
        import comfy.supported_models as supported

        if not hasattr(supported, "Flux2") and variant == "flux2":
            pytest.skip("this ComfyUI has no Flux2")
        self.name = variant
        self.variant = variant
        self.words = 512 if variant == "flux2" else 7
        self.channels, self.sizes = (128, ((5, 6), (4, 3))) if variant == "flux2" else (16, ((9, 12), (6, 7)))
        self.grids = self.sizes if variant == "flux2" else ((5, 6), (3, 4))
        self.named = True
        self._attention = attention.optimized_attention

    def model(self, seed: int = 0) -> Any:
        return tiny_patcher(self.variant, seed, double=DOUBLE, single=SINGLE)

    def install(self, patcher: Any, handler: Any, **keywords: Any) -> Any:
        return install(patcher, handler, **keywords)

    def sample(
        self,
        patcher: Any,
        *,
        cfg: float = 1.0,
        batch: int = 1,
        references: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        import comfy.sample

        def prompt(seed: int) -> list[list[Any]]:
            extra = {"guidance": 3.5, "pooled_output": _randn(seed + 10, 1, 64)}
            if references:
                extra["reference_latents"] = [_randn(4, 1, self.channels, *self.sizes[1])]
            return [[_randn(seed, 1, min(self.words, 32), 64), extra]]

        noise = _randn(1, batch, self.channels, *self.sizes[0])

        def callback(step: int, *_: Any) -> None:
            if on_step is not None:
                on_step(step)

        with torch.inference_mode():
            out: Tensor = comfy.sample.sample(
                patcher, noise, 3, cfg, "euler", "simple", prompt(2), prompt(3), torch.zeros_like(noise),
                callback=callback, disable_pbar=True, seed=0,
            )  # fmt: skip
        return out

    def attention(self) -> Callable[..., Tensor]:
        return self._attention


@pytest.fixture(
    params=[
        "fake",
        "fake old",
        pytest.param("flux", marks=pytest.mark.comfyui),
        pytest.param("flux2", marks=pytest.mark.comfyui),
    ]
)
def host(request: pytest.FixtureRequest) -> Host:
    if request.param.startswith("fake"):
        return FakeHost(old=request.param == "fake old")
    prepare_comfyui()
    return RealHost(request.param)
