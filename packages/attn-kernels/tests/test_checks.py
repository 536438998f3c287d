import math

import pytest
import torch
from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale

SHAPE = (2, 3, 5, 8)


def test_right_shapes_pass():
    check_qkv(torch.empty(2, 3, 7, 8), torch.empty(SHAPE), torch.empty(2, 3, 5, 4))
    check_key_mask(None, torch.empty(SHAPE))
    check_key_mask(torch.ones(2, 5, dtype=torch.bool), torch.empty(SHAPE))


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            torch.empty(3, 5, 8),
            torch.empty(SHAPE),
            torch.empty(SHAPE),
            r"q must be \[B, H, N, D\], got shape \(3, 5, 8\)",
        ),
        (torch.empty(2, 4, 5, 8), torch.empty(SHAPE), torch.empty(SHAPE), "share batch and heads"),
        (torch.empty(2, 3, 5, 6), torch.empty(SHAPE), torch.empty(SHAPE), "head width, got 6 and 8"),
        (torch.empty(SHAPE), torch.empty(SHAPE), torch.empty(2, 3, 6, 8), "same number of tokens, got 5 and 6"),
        (torch.empty(SHAPE), torch.empty(2, 3, 0, 8), torch.empty(2, 3, 0, 8), "k has no tokens"),
        (
            torch.empty(SHAPE),
            torch.empty(SHAPE).bfloat16(),
            torch.empty(SHAPE),
            "k is torch.bfloat16, q is torch.float32",
        ),
        (torch.empty(SHAPE).int(), torch.empty(SHAPE).int(), torch.empty(SHAPE).int(), "q must be float32"),
        (torch.empty(SHAPE), torch.empty(SHAPE, device="meta"), torch.empty(SHAPE), "k is on meta, q is on cpu"),
    ],
)
def test_wrong_tensors_are_named(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        check_qkv(q, k, v)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), "must be bool"),
        (torch.ones(2, 6, dtype=torch.bool), r"\(2, 5\), got \(2, 6\)"),
        (torch.ones(2, 5, dtype=torch.bool, device="meta"), "is on meta"),
    ],
)
def test_wrong_masks_are_named(mask, message):
    with pytest.raises(ValueError, match=message):
        check_key_mask(mask, torch.empty(SHAPE))


def test_scale():
    assert resolve_scale(None, 64) == 0.125
    assert resolve_scale(0.5, 64) == 0.5
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            resolve_scale(wrong, 64)
