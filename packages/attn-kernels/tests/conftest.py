"""Lets Triton's interpreter run the kernels on CPU tensors, and lists the operators for tests of all of them.

A run on a GPU asks for ``TRITON_INTERPRET=0``.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import attn_kernels
import pytest
import torch
from attn_kernels import (
    HedgehogFeatureMap,
    MlpFeatureMap,
    NearFarConfig,
    NearFarCorrections,
    Partial,
    TaylorConfig,
    TokenGrid,
)
from torch import Tensor

Grids = Sequence[TokenGrid]
Run = Callable[[str], Partial]
EVERY_IMPL = ("reference", "blocked", "fused")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that a place that no program writes shows."""

    def empty(tensor: Tensor, *sizes: Any, **options: Any) -> Tensor:
        shape = sizes[0] if isinstance(sizes[0], torch.Size) else sizes
        dtype = options.get("dtype", tensor.dtype)
        return tensor.new_full(shape, torch.nan if dtype.is_floating_point else 0, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


@dataclass(frozen=True)
class Operator:
    """An operator with settings, ready for tensors of any size.

    Attributes:
        name: Function and settings, for the test's name.
        function: The public function.
        bind: Takes q, k, v, grids and key mask; returns what computes the answer with a given ``impl``. Weights and
            indices are made in ``bind``, so that they are no part of the run.
        impls: Implementations it has.
        bf16: Largest relative error of the fused form in bfloat16 against the reference in float32.
    """

    name: str
    function: str
    bind: Callable[[Tensor, Tensor, Tensor, Grids, Tensor | None], Run]
    impls: tuple[str, ...] = EVERY_IMPL
    bf16: float = 1e-2


def near_far(config: NearFarConfig, *, corrected: bool = False) -> Callable[..., Run]:
    def bind(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
        corrections = NearFarCorrections(*q.new_tensor([[0.9], [0.1]]).expand(2, q.shape[1])) if corrected else None
        return lambda impl: attn_kernels.near_far_attention(
            q, k, v, grids=grids, config=config, key_mask=mask, corrections=corrections, impl=impl
        )

    return bind


def taylor(terms: int, config: TaylorConfig | None = None) -> Callable[..., Run]:
    chosen = config or TaylorConfig()

    def bind(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
        scale = (q.shape[-1] // chosen.blocks) ** -0.5
        # Residual logits small enough for every number of terms to have a positive denominator.
        small = 0.3 * q
        return lambda impl: attn_kernels.taylor_attention(
            small, k, v, terms=terms, scale=scale, key_mask=mask, config=chosen, impl=impl
        )

    return bind


def window(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    return lambda impl: attn_kernels.window_attention(q, k, v, window=11, prefix=5, key_mask=mask, impl=impl)


def window_2d(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    return lambda impl: attn_kernels.window_attention_2d(q, k, v, grids=grids, radius=(1, 2), key_mask=mask, impl=impl)


def landmarks(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    index = torch.arange(1, k.shape[2], 3).to(q.device)
    return lambda impl: attn_kernels.landmark_attention(q, k, v, index, key_mask=mask, impl=impl)


def pooled_landmarks(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    return lambda impl: attn_kernels.pooled_landmark_attention(q, k, v, grids=grids, tile=4, key_mask=mask, impl=impl)


def hybrid(combine: Literal["shared", "additive"], **near: int) -> Callable[..., Run]:
    def bind(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
        settings = {**near, "grids": grids} if "radius" in near else near
        generator = torch.Generator().manual_seed(5)
        basis = torch.randn(q.shape[1], q.shape[-1], 4, generator=generator).to(q.device)
        low = tuple(x.float() @ basis / q.shape[-1] ** 0.5 for x in (q, k))
        return lambda impl: attn_kernels.hybrid_attention(
            q, k, v, low=low, **settings, combine=combine, key_mask=mask, impl=impl
        )

    return bind


def kernel_regression(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1.0 for x in (q, k))
    return lambda impl: attn_kernels.kernel_regression(phi_q, phi_k, v, key_mask=mask, impl=impl)


def mlp(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    generator = torch.Generator().manual_seed(3)
    layers = []
    for inner, outer in ((q.shape[-1], 64), (64, 64), (64, 32)):
        layers += [torch.randn(outer, inner, generator=generator) / inner**0.5, torch.zeros(outer)]
    feature_map = MlpFeatureMap(*layers).to(q.device)
    return lambda impl: attn_kernels.feature_map_attention(q, k, v, feature_map, key_mask=mask, impl=impl)


def hedgehog(q: Tensor, k: Tensor, v: Tensor, grids: Grids, mask: Tensor | None) -> Run:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(q.shape[1], 16, q.shape[-1], generator=generator) / q.shape[-1] ** 0.5
    feature_map = HedgehogFeatureMap(weight).to(q.device)
    return lambda impl: attn_kernels.feature_map_attention(q, k, v, feature_map, key_mask=mask, impl=impl)


OPERATORS = (
    # A tile at the edge of the choice may go either way in bfloat16.
    Operator("near_far", "near_far_attention", near_far(NearFarConfig(4, 1, 2)), bf16=3e-2),
    Operator("near_far pooled", "near_far_attention", near_far(NearFarConfig((2, 3), 1, 0, "pooled"), corrected=True)),
    Operator("taylor 3", "taylor_attention", taylor(3)),
    Operator("taylor 4", "taylor_attention", taylor(4, TaylorConfig(blocks=2, mode="independent"))),
    Operator("window", "window_attention", window),
    Operator("window 2-D", "window_attention_2d", window_2d),
    Operator("landmarks", "landmark_attention", landmarks),
    Operator("pooled landmarks", "pooled_landmark_attention", pooled_landmarks),
    Operator("hybrid", "hybrid_attention", hybrid("shared", radius=2)),
    Operator("hybrid additive", "hybrid_attention", hybrid("additive", window=9)),
    Operator("kernel regression", "kernel_regression", kernel_regression, ("reference",)),
    Operator("mlp map", "feature_map_attention", mlp),
    Operator("hedgehog map", "feature_map_attention", hedgehog),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes an ``operator`` for each, and one that takes a ``form`` for each of its torch forms."""
    if "form" in metafunc.fixturenames:
        cases = [(one, impl) for one in OPERATORS for impl in one.impls if impl != "fused"]
        metafunc.parametrize(("operator", "form"), cases, ids=[f"{one.name}, {impl}" for one, impl in cases])
    elif "operator" in metafunc.fixturenames:
        metafunc.parametrize("operator", OPERATORS, ids=[one.name for one in OPERATORS])


@pytest.fixture(scope="session")
def operators() -> tuple[Operator, ...]:
    return OPERATORS
