import pytest
import torch
from attn_kernels import Impl
from attn_kernels.kernel_regression import HedgehogFeatureMap, MlpFeatureMap, feature_map_attention
from attn_kernels.kernel_regression.feature_map import map_features
from attn_kernels.testing import assert_close, make_qkv

fused = pytest.importorskip("attn_kernels.kernel_regression.fused")
fused_config = pytest.importorskip("attn_kernels.kernel_regression.fused_config")

TOLERANCES = [(torch.float32, 2e-6, 1e-5), (torch.bfloat16, 1e-2, 5e-3), (torch.float16, 1e-2, 5e-3)]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN: what a kernel does not write shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))


def mlp(width, hidden, features, seed, normalise=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, gain):
        return gain * torch.randn(*shape, generator=generator)

    return MlpFeatureMap(
        draw(hidden, width, gain=width**-0.5),
        draw(hidden, gain=0.1),
        draw(hidden, hidden, gain=1.5 * hidden**-0.5),
        draw(hidden, gain=0.1),
        draw(features, hidden, gain=3 * hidden**-0.5),
        draw(features, gain=0.1),
        normalise=normalise,
    )


def hedgehog(heads, width, half, seed, kind, bias=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads, half, width, generator=generator) * width**-0.5
    return HedgehogFeatureMap(weight, 0.2 * torch.randn(heads, half, generator=generator) if bias else None, kind)


def oracle(q, k, v, map_q, map_k, mask=None):
    keep = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask is None else mask
    k, v = (x.masked_fill(~keep[:, None, :, None], 0).double() for x in (k, v))
    weights = (map_features(map_q, q.double()) @ map_features(map_k, k).mT) * keep[:, None, None]
    total = weights.sum(-1)
    return weights @ v / total.unsqueeze(-1), total.log()


def maps(kind, width):
    if kind == "mlp":
        return mlp(width, 72, 40, 0), mlp(width, 72, 40, 1)
    return hedgehog(2, width, 20, 0, kind), hedgehog(2, width, 20, 1, kind, bias=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "ratio", "lse_ratio"), TOLERANCES)
@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_equals_the_quadratic_form(kind, dtype, ratio, lse_ratio, masked):
    q, k, v = make_qkv(2, 2, 63, 24, kv_tokens=147, value_width=10, dtype=dtype)
    map_q, map_k = maps(kind, 24)
    mask = None
    if masked:
        mask = torch.rand(2, 147, generator=torch.Generator().manual_seed(1)) > 0.4
        # Masked keys may hold anything.
        k[0, :, ~mask[0]], v[1, :, ~mask[1]] = torch.nan, torch.inf
    part = feature_map_attention(q, k, v, map_q, map_k, key_mask=mask, impl="fused")
    out, lse = oracle(q, k, v, map_q, map_k, mask)
    assert part.out.dtype == dtype
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, lse_ratio)


@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_splits_chunks_strides_and_self_attention(kind, monkeypatch):
    # Tokens before heads, as projections leave them; splits and chunks that end within a block.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(1, 2, 330, 16))
    map_q, map_k = maps(kind, 16)
    monkeypatch.setattr(fused_config, "_SPLIT", 64)
    part = fused.feature_map_fused(
        q, k, v, map_q, map_k, key_mask=None, eps=1e-6, map_dtype=None, chunk_bytes=2 * 72 * 4 * 256
    )
    out, lse = oracle(q, k, v, map_q, map_k)
    assert_close("out", part.out, out, 2e-6)
    assert_close("lse", part.lse, lse, 1e-5)


def test_without_normalisation_and_with_a_floor():
    q, k, v = make_qkv(1, 1, 20, 16, kv_tokens=40)
    map_q, map_k = (mlp(16, 32, 16, seed, normalise=False) for seed in (0, 1))
    part = feature_map_attention(q, k, v, map_q, map_k, impl="fused")
    out, lse = oracle(q, k, v, map_q, map_k)
    assert_close("out", part.out, out, 2e-6)
    floor = float(lse.exp().median())
    for impl in ("fused", "blocked", "reference"):
        floored = feature_map_attention(q, k, v, map_q, map_k, eps=floor, impl=impl)
        assert_close("lse", floored.lse, lse.clamp_min(lse.median()), 1e-5)
        assert_close("out", floored.out, out * (lse - lse.clamp_min(lse.median())).exp()[..., None], 3e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_a_row_without_keys_and_non_finite_input(kind):
    q, k, v = make_qkv(2, 2, 20, 16)
    map_q, map_k = maps(kind, 16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0] = False
    q[1, 0, 3, 2] = torch.nan
    part = feature_map_attention(q, k, v, map_q, map_k, key_mask=mask, impl="fused")
    assert (part.out[0] == 0).all()
    assert (part.lse[0] == -torch.inf).all()
    assert part.out[1, 0, 3].isnan().all()
    assert part.lse[1, 0, 3].isnan()
    assert part.out[1, 1].isfinite().all()
    k[1, 1, 5, 0] = torch.nan
    assert feature_map_attention(q, k, v, map_q, map_k, impl="fused").out[1, 1].isnan().all()


def test_large_exponents_do_not_overflow():
    q, k, v = make_qkv(1, 2, 20, 16)
    map_q, map_k = (hedgehog(2, 16, 20, seed, "exp") for seed in (0, 1))
    map_q, map_k = (HedgehogFeatureMap(30 * each.weight, each.bias, "exp") for each in (map_q, map_k))
    out, lse = oracle(q, k, v, map_q, map_k)
    for impl in ("reference", "blocked", "fused"):
        part = feature_map_attention(q, k, v, map_q, map_k, impl=impl)
        assert_close("out", part.out, out, 5e-4)
        assert_close("lse", part.lse, lse, 1e-5)


def test_refusals():
    q, k, v = make_qkv(1, 2, 8, 16)
    map_q, map_k = maps("softmax", 16)
    with pytest.raises(ValueError, match="two kinds"):
        feature_map_attention(q, k, v, map_q, mlp(16, 32, 40, 0), impl="fused")
    with pytest.raises(ValueError, match="float64"):
        feature_map_attention(q.double(), k.double(), v.double(), map_q, map_k, impl="fused")
    with pytest.raises(ValueError, match="requires one"):
        feature_map_attention(q.requires_grad_(), k, v, map_q, map_k, impl=Impl.FUSED)
    wide = hedgehog(2, 16, 129, 0, "softmax")
    with pytest.raises(ValueError, match="at most 256 features"):
        feature_map_attention(q.detach(), k, v, wide, impl="fused")
