"""Every operator's kernels on a GPU: the answers of the reference, and no wait for the device.

    uv run nox -s gpu

The interpreter's tests lie beside each operator; these are what it cannot see: compiled code, real dtypes, real sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.testing import assert_close, error_ratio, make_qkv
from attn_kernels.triton_support import interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET is set; nox -s gpu unsets it"),
]
GRID = TokenGrid(start=77, rows=29, columns=37)
SHAPES = [(1, 24, 128), (2, 3, 64), (1, 2, 40)]
"""Batch, heads and head width: Flux, Stable Diffusion 3.5, and one that needs padding."""


def tensors(batch: int, heads: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and a mask that drops keys of the text, the image and the end."""
    length = GRID.stop + 3
    q, k, v = (x.to("cuda", dtype) for x in make_qkv(batch, heads, length, width, smooth_grid=GRID))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, [5, 6, 200, length - 1]] = False
    return q, k, v, mask.cuda()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_seen():
    one = torch.ones(1, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@pytest.mark.parametrize(("batch", "heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_answer_as_the_reference(operator, batch, heads, width, dtype, masked):
    if "fused" not in operator.impls:
        pytest.skip("this operator has no kernels")
    q, k, v, mask = tensors(batch, heads, width, dtype)
    mask = mask if masked else None
    if masked:
        # Whatever a masked token holds must not be seen.
        k = k.masked_fill(~mask[:, None, :, None], torch.nan)
        v = v.masked_fill(~mask[:, None, :, None], torch.nan)
    found = operator.bind(q, k, v, [GRID], mask)("fused")
    wide = [x.float() for x in (q, k, v)]
    expected = operator.bind(*wide, [GRID], mask)("reference")
    ratio = {torch.float32: 2e-5, torch.bfloat16: operator.bf16, torch.float16: operator.bf16 / 4}[dtype]
    assert found.out.dtype is dtype
    assert_close(f"{operator.name}, out", found.out.float(), expected.out, ratio)
    # NaN on both sides says that blocks with a normaliser each have none in common.
    assert torch.equal(found.lse.isnan(), expected.lse.isnan())
    assert_close(f"{operator.name}, lse", found.lse.nan_to_num(), expected.lse.nan_to_num(), ratio)


@pytest.mark.parametrize("masked", [False, True])
def test_no_form_waits_for_the_device(operator, masked):
    q, k, v, mask = tensors(1, 2, 64, torch.bfloat16)
    run = operator.bind(q, k, v, [GRID], mask if masked else None)
    for impl in operator.impls:
        # Compiles, and makes the tables that are kept.
        run(impl)
        with no_waiting():
            run(impl)


def test_auto_takes_the_kernels(operator):
    if "fused" not in operator.impls:
        pytest.skip("this operator has no kernels")
    q, k, v, mask = tensors(1, 2, 64, torch.bfloat16)
    run = operator.bind(q, k, v, [GRID], mask)
    assert error_ratio(run("auto").out, run("fused").out) == 0.0


def test_the_output_does_not_depend_on_the_run(operator):
    # Sums without atomics: the same bits every time.
    q, k, v, mask = tensors(1, 2, 64, torch.bfloat16)
    run = operator.bind(q, k, v, [GRID], mask)
    assert torch.equal(run("auto").out, run("auto").out)
