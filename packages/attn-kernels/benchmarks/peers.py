"""What the operators are compared with: exact attention as torch has it, and the work of others."""

import importlib.util
from collections.abc import Callable

import torch
from attn_kernels import NearFarConfig, softmax_attention
from attn_kernels.cost import attend_work, exact_work, near_far_work, window_keys_2d
from cases import Case, Tensors, window_case
from scenes import Scene
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ON_CUDA = {
    "exact flash": SDPBackend.FLASH_ATTENTION,
    "exact cudnn": SDPBackend.CUDNN_ATTENTION,
    "exact efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Names of torch's exact kernels; the fastest one of a run is what everything is compared with."""


def exact_cases(t: Tensors) -> list[Case]:
    """Exact attention: torch's own choice on a CPU, each of its kernels on a GPU."""

    def expected() -> Tensor:
        return softmax_attention(*t.sampled).out

    def forced(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(t.q, t.k, t.v)

        return run

    work, keys = exact_work(t.shape), t.k.shape[2]
    if t.q.device.type == "cuda":
        flex = Case("exact flex", flex_attention(t), expected, work, keys)
        return [*(Case(name, forced(backend), expected, work, keys) for name, backend in ON_CUDA.items()), flex]
    return [Case("exact", lambda: F.scaled_dot_product_attention(t.q, t.k, t.v), expected, work, keys)]


def peer_cases(scene: Scene, t: Tensors) -> list[Case]:
    """Work of others on the same tensors, on a GPU."""
    if t.q.device.type != "cuda":
        return []
    cases = [flex_window_case(scene, t, 8)]
    if importlib.util.find_spec("comfy_kitchen") is not None and t.q.shape[-1] == 128:
        cases += [sparse_case(scene, t, tau) for tau in (0.5, 1.0)]
    return cases


def flex_attention(t: Tensors, **settings: object) -> Callable[[], Tensor]:
    """FlexAttention, compiled at the first run."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)
    return lambda: compiled(t.q, t.k, t.v, **settings)


def flex_window_case(scene: Scene, t: Tensors, radius: int) -> Case:
    """The same function as window attention in two dimensions, by FlexAttention's block masks."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = scene.frame
    frame, text, length = rows * columns, scene.text, scene.tokens

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        a, b = i - text, j - text
        down = (a % frame // columns - b % frame // columns).abs() <= radius
        right = (a % columns - b % columns).abs() <= radius
        return (a < 0) | (b < 0) | ((a // frame == b // frame) & down & right)

    mask = create_block_mask(sees, None, None, length, length, device=str(t.q.device), _compile=True)
    ours = window_case(scene, t, radius)
    keys = window_keys_2d(length, scene.grids, radius)
    work = attend_work("flex", t.shape, keys)
    return Case(f"flex {ours.name}", flex_attention(t, block_mask=mask), ours.expected, work, keys)


def sparse_case(scene: Scene, t: Tensors, tau: float) -> Case:
    """comfy-kitchen's sparse attention: chosen blocks of 64 tokens exactly, the others pooled; text kept exact.

    It has no specification here: what is reported is its distance from exact attention.
    """
    from comfy_kitchen import sol_attn

    q, k, v = (x.transpose(1, 2).contiguous() for x in (t.q, t.k, t.v))
    blocks = [0, -(-scene.text // 64)]

    def run() -> Tensor:
        out: Tensor = sol_attn(q, k, v, tau=tau, sink_blocks=blocks, sink_q=blocks)
        return out.transpose(1, 2)

    # What it reads cannot be known before the run; near-far attention of the same block size stands in.
    work = near_far_work(t.shape, grids=scene.grids, config=NearFarConfig(8, 1, 0))._replace(operator="sparse")
    return Case(f"comfy-kitchen tau {tau}", run, lambda: softmax_attention(*t.sampled).out, work, allowed=float("inf"))
