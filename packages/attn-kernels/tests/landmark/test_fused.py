import pytest
import torch
from attn_kernels import landmark_attention
from attn_kernels.testing import assert_close, make_qkv

fused = pytest.importorskip("attn_kernels.landmark.fused")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN: what the kernel does not write shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poison)


def oracle(q, k, v, index, mask=None):
    scores = q.double() @ k[:, :, index].double().mT * q.shape[-1] ** -0.5
    values = v[:, :, index].double()
    if mask is not None:
        scores = scores.nan_to_num().masked_fill(~mask[:, None, None, index], -torch.inf)
        values = values.masked_fill(~mask[:, None, index, None], 0)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    ("queries", "keys", "count", "width", "values"), [(63, 190, 77, 24, 10), (150, 70, 64, 16, 40), (5, 300, 1, 8, 16)]
)
def test_is_a_softmax_over_the_landmarks(queries, keys, count, width, values, dtype, ratio, masked):
    q, k, v = make_qkv(2, 2, queries, width, kv_tokens=keys, value_width=values, dtype=dtype, logit_std=3.0)
    index = torch.randperm(keys, generator=torch.Generator().manual_seed(0))[:count]
    mask = None
    if masked:
        mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[:, index[0]] = True
        k[0, :, ~mask[0]], v[1, :, ~mask[1]] = torch.nan, torch.inf
    part = landmark_attention(q, k, v, index, key_mask=mask, impl="fused")
    out, lse = oracle(q, k, v, index, mask)
    assert part.out.dtype == dtype
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, max(1e-5, ratio / 4))


def test_strides_and_a_scale():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(2, 2, 40, 16))
    index = torch.arange(0, 40, 3)
    part = landmark_attention(q, k, v, index, scale=0.1, impl="fused")
    expected = landmark_attention(q, k, v, index, scale=0.1, impl="reference")
    assert_close("out", part.out, expected.out, 2e-6)
    assert_close("lse", part.lse, expected.lse, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_without_landmarks_and_non_finite_input():
    q, k, v = make_qkv(2, 1, 20, 16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, ::2] = False
    k[1, 0, 4, 0] = torch.nan
    part = landmark_attention(q, k, v, torch.arange(0, 20, 2), key_mask=mask, impl="fused")
    assert (part.out[0] == 0).all()
    assert (part.lse[0] == -torch.inf).all()
    assert part.out[1].isnan().all()
    assert part.lse[1].isnan().all()
    q[1, 0, 3] = torch.nan
    part = landmark_attention(q, k, v, torch.arange(1, 20, 2), impl="fused")
    assert part.out[1, 0, 3].isnan().all()
    assert part.out[1, 0, 4].isfinite().all()


def test_refusals():
    q, k, v = make_qkv(1, 1, 8, 264)
    with pytest.raises(ValueError, match="largest head width"):
        landmark_attention(q, k, v, torch.tensor([0]), impl="fused")
    with pytest.raises(ValueError, match="float64"):
        landmark_attention(q.double(), k.double(), v.double(), torch.tensor([0]), impl="fused")
