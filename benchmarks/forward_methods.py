"""Who answers the attention calls of a forward: exact attention, or one approximation where it pays off."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from attn_dispatch import (
    AttentionCall,
    AttentionRouter,
    Backend,
    LayerKey,
    NativeAttention,
    PaysOff,
    Route,
    StepContext,
    TokenLayout,
    dispatch_attention,
)
from attn_dispatch.backends import NearFarBackend, TaylorBackend, TaylorBackendConfig
from attn_kernels import NearFarConfig, TokenGrid
from attn_kernels.cost import AttentionShape, kernel_regression_work
from attn_kernels.device_model import Work
from forward_scenes import TEXT, WIDTH, Scene
from torch import Tensor, nn
from ttr_distill.adapters.diffusers import attention_shape, layers
from ttr_distill.student import StudentBackend, StudentBank, preset

NEAR_FAR = (NearFarConfig(tile=4, radius=1, top_k=8), NearFarConfig(tile=8, radius=1, top_k=2))

WorkOf = Callable[[AttentionCall], Work | None]


class Choice(NamedTuple):
    """An approximation and what it would do in a call."""

    backend: Backend
    work: WorkOf


def best_exact(call: AttentionCall) -> Tensor:
    """Exact attention by the fastest backend that the dispatcher finds here."""
    return dispatch_attention(call.q, call.k, call.v, call.attn_bias, scale=call.scale)


@dataclass
class Method:
    """A handler of attention calls; exact attention is the dispatcher's choice, never the host's.

    Attributes:
        name: For the table.
        router: Who answers.
        guard: The guard of its only route; ``None`` for exact attention.
    """

    name: str
    router: AttentionRouter
    guard: PaysOff | None = None

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer a call."""
        return self.router(call, best_exact)

    def begin_run(self) -> None:
        """A forward starts."""
        self.router.begin_run()

    def end_run(self) -> None:
        """The forward is over."""
        self.router.end_run()

    def foretold(self, scene: Scene, device: torch.device, dtype: torch.dtype) -> tuple[float, str | None]:
        """Predict an attention of the scene without running it.

        Returns:
            How many times as fast as exact attention the cost model has it, and why the route declines, if it does.
        """
        if self.guard is None:
            return 1.0, None
        call = empty_call(scene, device, dtype)
        estimate = self.guard.estimate(call)
        return (1.0 if estimate is None else estimate.speed_up), self.router.routes[0].refusal(call)


def methods(transformer: nn.Module) -> list[Method]:
    """Exact attention, and every approximation behind ``PaysOff``."""
    taylor = TaylorBackend(TaylorBackendConfig.recommended())
    found = [(near_far_name(config), near_far(config)) for config in NEAR_FAR]
    found += [("hkr", hkr(transformer)), ("taylor", Choice(taylor, taylor.work))]
    return [Method("exact", AttentionRouter()), *(guarded(name, choice) for name, choice in found)]


def guarded(name: str, choice: Choice) -> Method:
    """Put an approximation behind ``PaysOff``."""
    guard = PaysOff(choice.work)
    return Method(name, AttentionRouter([Route(choice.backend, (guard,))]), guard)


def near_far_name(config: NearFarConfig) -> str:
    """``near-far t8 k2``."""
    return f"near-far t{config.tile} k{config.top_k}"


def near_far(config: NearFarConfig) -> Choice:
    """Near-far attention; reference images are cut into tiles, too."""
    backend = NearFarBackend(config, references="grids")
    return Choice(backend, backend.work)


def hkr(transformer: nn.Module) -> Choice:
    """The learned student with its default settings and fresh weights, on which its time does not depend."""
    heads, width = attention_shape(transformer)
    bank = StudentBank.for_layers(preset("hkr"), layers(transformer), heads, width)
    bank.to(next(transformer.parameters()).device)
    backend = StudentBackend(bank)

    def work(call: AttentionCall) -> Work | None:
        if call.layer is None or call.layout is None:
            return None
        shape = AttentionShape.of(call.q, call.k, call.v)
        features = 256
        networks = kernel_regression_work(shape, features=features, layers=(2 * features, 2 * features))
        return networks._replace(flops=bank[call.layer].flops(call.layout, shape.batch, shape.heads, shape.width))

    return Choice(backend, work)


def empty_call(scene: Scene, device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """An attention call of the scene's sizes whose tensors take no memory."""
    x = torch.zeros((), device=device, dtype=dtype).expand(1, scene.cut.heads, scene.tokens, WIDTH)
    image = TokenGrid(TEXT, *scene.image)
    references = tuple(TokenGrid(image.stop + index * 64 * 64, 64, 64) for index in range(scene.references))
    layout = TokenLayout(scene.tokens, ((0, TEXT),), (image,), references)
    layer = LayerKey("single" if scene.cut.single else "double", 0)
    return AttentionCall(x, x, x, layer=layer, step=StepContext(0.5), layout=layout)
