"""What the benchmark measures: tensors of which sizes, and which operators on them."""

from dataclasses import dataclass, field
from math import isqrt

import torch
from attn_kernels import TokenGrid


@dataclass(frozen=True)
class Scene:
    """Attention of one size and the operators that are timed on it.

    Attributes:
        name: For the table.
        heads: H.
        width: D and Dv.
        text: Tokens in front of the grids.
        frame: Rows and columns of tokens of one frame.
        frames: Grids one after the other; more than one is a video.
        dtype: Of q, k and v.
        logit_std: Standard deviation of the scores.
        operators: Names of ``cases.py``.
        rounds: Times that every operator is timed; the fastest counts.
    """

    name: str
    heads: int
    width: int
    text: int
    frame: tuple[int, int]
    frames: int = 1
    dtype: torch.dtype = torch.float32
    logit_std: float = 2.0
    operators: tuple[str, ...] = field(default=())
    rounds: int = 5

    @property
    def grids(self) -> tuple[TokenGrid, ...]:
        """Grids of image tokens, behind the text."""
        rows, columns = self.frame
        return tuple(TokenGrid(self.text + i * rows * columns, rows, columns) for i in range(self.frames))

    @property
    def tokens(self) -> int:
        """Tokens, text and images."""
        return self.grids[-1].stop


SERIES = ("taylor 3", "taylor 4", "taylor 5")
WIDER = (
    (4, 32, ("taylor 3", "taylor 3 streamed", "taylor 4")),
    *((1, d, ("taylor 3", "taylor 3 streamed")) for d in (64, 128)),
)
"""Heads, their width and the series timed on them, up to the sizes at which they are near exact attention."""
CPU_SIZES = (256, 576, 1024, 2304, 4096, 16384)
ON_CPU = (
    "near-far t4 k0",
    "near-far t4 k8",
    "near-far t8 k0",
    "near-far t8 k2",
    "window 2-D r8",
    "landmark 8%",
    "pooled landmark t4",
    "hybrid r3 P3",
    "mlp map",
    "mlp map bf16",
    "hedgehog map",
    "kernel regression F64",
)
ON_CUDA = (
    "near-far t4 k0",
    "near-far t4 k8",
    "near-far t8 k0",
    "near-far t8 k2",
    "taylor 3 in 8 blocks",
    "taylor 4 in 8 blocks",
    "window 2-D r8",
    "landmark 5%",
    "pooled landmark t4",
    "hybrid r3 P3",
    "hybrid r3 P3 added",
    "mlp map",
    "hedgehog map",
)


def cpu_scenes(sizes: tuple[int, ...] = CPU_SIZES) -> list[Scene]:
    """Squares of image tokens: heads of 16 for the series, whose logits must be small, and of 128 for the others.

    The time of the series per feature depends on the width, so wider heads are timed, too, at fewer tokens.
    """
    scenes = []
    for tokens in sizes:
        side, rounds = isqrt(tokens), 3 if tokens > 10_000 else 7
        square = (side, side)
        scenes.append(Scene("width 16", 4, 16, 0, square, logit_std=0.5, operators=SERIES, rounds=rounds))
        for heads, width, series in WIDER if tokens <= 4096 else ():
            name = f"series, width {width}"
            scenes.append(Scene(name, heads, width, 0, square, logit_std=0.5, operators=series, rounds=rounds))
        scenes.append(Scene("width 128", 4, 128, 12, square, operators=ON_CPU, rounds=rounds))
    return scenes


def cuda_scenes() -> list[Scene]:
    """Sizes of real models: images of 1, 4 and 16 megapixels and a video, in bfloat16."""
    half = torch.bfloat16
    scenes = []
    for heads, model in ((24, "Flux"), (48, "Flux2")):
        for side in (64, 128, 256):
            scenes.append(Scene(model, heads, 128, 512, (side, side), dtype=half, operators=ON_CUDA, rounds=20))
    scenes.append(Scene("SD3.5", 38, 64, 333, (64, 64), dtype=half, operators=ON_CUDA, rounds=20))
    scenes.append(Scene("video", 24, 128, 512, (48, 80), 26, dtype=half, operators=ON_CUDA, rounds=5))
    return scenes
