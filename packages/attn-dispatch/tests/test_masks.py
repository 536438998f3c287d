import pytest
import torch
from attn_dispatch import join_mask, split_mask
from torch import Tensor
from torch.nn import functional

B, H, NQ, NK, D = 2, 3, 5, 7, 8
SHAPE = (B, H, NQ, NK)


def make_masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(B, NK, generator=g) > 0.4
    keep[:, 0] = True
    full = torch.rand(B, H, NQ, NK, generator=g) > 0.4
    full[..., 0] = True
    return {
        "keys per batch": keep[:, None, None, :],
        "keys for all": keep[:1],
        "keys expanded over queries": keep[:, None, None, :].expand(B, H, NQ, NK),
        "per query": full[0, 0],
        "per head": full[0],
        "per batch, head and query": full,
        "bias per query": torch.randn(NQ, NK, generator=g),
        "bias per head": torch.randn(H, NQ, NK, generator=g),
        "bias with -inf": torch.zeros(NQ, NK).masked_fill(~full[0, 0], -torch.inf),
    }


@pytest.mark.parametrize("name", make_masks())
def test_splitting_and_joining_gives_the_same_attention(name: str) -> None:
    mask = make_masks()[name]
    g = torch.Generator().manual_seed(1)
    q, k, v = (2 * torch.randn(B, H, n, D, generator=g) for n in (NQ, NK, NK))
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    joined = join_mask(*split_mask(mask, SHAPE), q.dtype)
    torch.testing.assert_close(functional.scaled_dot_product_attention(q, k, v, attn_mask=joined), expected)


@pytest.mark.parametrize("name", make_masks())
def test_a_mask_equal_for_all_queries_is_a_key_mask(name: str) -> None:
    key_mask, bias = split_mask(make_masks()[name], SHAPE)
    assert (key_mask is not None) == name.startswith("keys")
    assert (bias is not None) != name.startswith("keys")
    if key_mask is not None:
        assert tuple(key_mask.shape) == (B, NK)
        assert key_mask.dtype is torch.bool


def test_a_float_mask_of_zeros_keeps_everything() -> None:
    key_mask, bias = split_mask(torch.zeros(1, NK), SHAPE)
    assert key_mask is None
    assert bias is not None
    assert not bias.any()


def test_a_key_mask_and_a_bias_join() -> None:
    key_mask = torch.ones(B, NK, dtype=torch.bool)
    key_mask[:, 3] = False
    bias = torch.randn(1, 1, NQ, NK, generator=torch.Generator().manual_seed(0))
    joined = join_mask(key_mask, bias, torch.float32)
    assert joined is not None
    assert bool((joined[..., 3] == -torch.inf).all())
    assert torch.equal(joined[0, 0, :, 0], bias[0, 0, :, 0])


def test_no_mask_is_no_mask() -> None:
    assert split_mask(None, SHAPE) == (None, None)
    assert join_mask(None, None, torch.float32) is None


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(NQ, NK, dtype=torch.int64), "int64"),
        (torch.ones(NQ, NK + 1, dtype=torch.bool), "broadcast"),
        (torch.ones(1, B, H, NQ, NK, dtype=torch.bool), "broadcast"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        split_mask(mask, SHAPE)
