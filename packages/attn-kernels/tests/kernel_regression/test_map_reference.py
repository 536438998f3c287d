import weakref

import pytest
import torch
from attn_kernels import kernel_regression, merge_partials
from attn_kernels.kernel_regression import HedgehogFeatureMap, MlpFeatureMap, feature_map_attention
from attn_kernels.kernel_regression.feature_map import map_features
from attn_kernels.testing import assert_close, error_ratio, make_qkv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Packed weights are opaque; they are as large as the weights.
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not x.is_mkldnn]
        known = {x.untyped_storage()._cdata for x in leaves}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_mkldnn:
                storage = x.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def mlp(width, hidden, features, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((hidden, width), (hidden,), (hidden, hidden), (hidden,), (features, hidden), (features,))
    gains = (width**-0.5, 0.1, 1.5 * hidden**-0.5, 0.1, 3 * hidden**-0.5, 0.1)
    return MlpFeatureMap(
        *((gain * torch.randn(*s, generator=generator)).to(dtype) for gain, s in zip(gains, shapes, strict=True))
    )


def hedgehog(heads, width, half, seed, kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads, half, width, generator=generator) * width**-0.5
    return HedgehogFeatureMap(weight.to(dtype), 0.2 * torch.randn(heads, half, generator=generator).to(dtype), kind)


def pair(kind, width, dtype=torch.float32):
    if kind == "mlp":
        return mlp(width, 48, 40, 0, dtype), mlp(width, 48, 40, 1, dtype)
    return hedgehog(2, width, 20, 0, kind, dtype), hedgehog(2, width, 20, 1, kind, dtype)


def by_hand(feature_map, x):
    """Evaluate a map in float64 without its own code."""
    x, weights = x.double(), [tensor.double() for tensor in feature_map.weights]
    if isinstance(feature_map, MlpFeatureMap):
        w1, b1, w2, b2, w3, b3 = weights
        hidden = x @ w1.T + b1
        hidden = (hidden * hidden.sigmoid()) @ w2.T + b2
        hidden = (hidden * hidden.sigmoid()) @ w3.T + b3
        features = torch.where(hidden > 0, hidden + 1, hidden.exp())
        return features / (features.square().sum(-1, keepdim=True).sqrt() + 1e-6)
    y = torch.einsum("bhnd,hgd->bhng", x, weights[0]) + weights[1][:, None]
    if feature_map.kind == "exp":
        return torch.cat([y.exp(), (-y).exp()], -1)
    return torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_equals_the_quadratic_form(kind, impl, dtype, ratio, masked):
    q, k, v = make_qkv(2, 2, 70, 24, kv_tokens=130, value_width=10, dtype=dtype)
    map_q, map_k = pair(kind, 24, torch.promote_types(dtype, torch.float32))
    keep = torch.ones(2, 130, dtype=torch.bool)
    if masked:
        keep = torch.rand(2, 130, generator=torch.Generator().manual_seed(1)) > 0.4
    weights = (by_hand(map_q, q) @ by_hand(map_k, k).mT) * keep[:, None, None]
    out = weights @ v.double() / weights.sum(-1, keepdim=True)
    if masked:
        # Masked keys may hold anything.
        k[0, :, ~keep[0]], v[1, :, ~keep[1]] = torch.nan, torch.inf
    part = feature_map_attention(q, k, v, map_q, map_k, key_mask=keep if masked else None, chunk=33, impl=impl)
    assert part.out.dtype == dtype
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, weights.sum(-1).log(), 1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("mean of v", v.nan_to_num(0, 0, 0).mean(2, keepdim=True).expand_as(part.out), out, 0.1)


@pytest.mark.parametrize("impl", ["reference", "blocked", "fused"])
@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_a_dtype_of_the_map(kind, impl):
    q, k, v = make_qkv(1, 2, 40, 16)
    map_q, map_k = pair(kind, 16)
    exact = feature_map_attention(q, k, v, map_q, map_k, impl="reference").out
    rounded = feature_map_attention(q, k, v, map_q, map_k, map_dtype=torch.bfloat16, impl=impl)
    assert rounded.out.dtype == torch.float32
    assert 1e-5 < error_ratio(rounded.out, exact) < 2e-2


@pytest.mark.parametrize("kind", ["mlp", "exp", "softmax"])
def test_gradients_of_inputs_and_weights(kind):
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 2, 5, 4, kv_tokens=7, value_width=3))
    mask = torch.arange(7)[None] != 4
    maps = [mlp(4, 6, 5, s, torch.double) for s in (0, 1)]
    if kind != "mlp":
        maps = [hedgehog(2, 4, 3, s, kind, torch.double) for s in (0, 1)]
    weights = [tensor.requires_grad_() for each in maps for tensor in each.weights]

    def run(*_):
        return feature_map_attention(q, k, v, *maps, key_mask=mask, chunk=3)

    assert torch.autograd.gradcheck(run, (q, k, v, *weights))
    grads = torch.autograd.grad(run().out.square().sum(), (k, v))
    assert all((grad[:, :, 4] == 0).all() for grad in grads)


def test_a_masked_nan_reaches_no_gradient():
    q, k, v = make_qkv(1, 2, 5, 4)
    k[:, :, 2] = torch.nan
    maps = [mlp(4, 6, 5, s) for s in (0, 1)]
    weights = [tensor.requires_grad_() for each in maps for tensor in each.weights]
    part = feature_map_attention(q, k, v, *maps, key_mask=torch.arange(5)[None] != 2, chunk=2)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(part.out.sum(), weights))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_memory_is_bounded_by_the_chunk(impl, backward):
    if backward and impl == "blocked":
        pytest.skip("it has no gradient")
    map_q, map_k = mlp(16, 256, 128, 0), mlp(16, 256, 128, 1)
    peaks = []
    for tokens in (1024, 4096):
        q, k, v = make_qkv(1, 2, tokens, 16)
        if backward:
            map_q.w1.requires_grad_()
            q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        with LiveBytes() as live:
            part = feature_map_attention(q, k, v, map_q, map_k, chunk=256, impl=impl)
            if backward:
                part.out.square().sum().backward()
        peaks.append(live.peak)
    features, token = 2 * 4096 * 128 * 4, 2 * 16 * 4
    assert peaks[1] < features * (2 if backward else 1), "features of all tokens were alive"
    # What grows with the tokens are outputs, their parts before they are joined, and gradients of the same size.
    assert peaks[1] - peaks[0] < 3072 * token * (16 if backward else 4)


def test_blocked_is_taken_without_a_gradient_and_partials_merge():
    q, k, v = make_qkv(1, 2, 40, 16)
    maps = pair("exp", 16)
    auto = feature_map_attention(q, k, v, *maps)
    assert torch.equal(auto.out, feature_map_attention(q, k, v, *maps, impl="blocked").out)
    parts = [feature_map_attention(q, k[:, :, s], v[:, :, s], *maps) for s in (slice(0, 13), slice(13, 40))]
    merged = merge_partials(*parts)
    assert_close("out", merged.out, auto.out, 1e-6)
    assert_close("lse", merged.lse, auto.lse, 1e-6)


def test_equals_kernel_regression_of_the_features_and_one_map_serves_both():
    q, k, v = make_qkv(1, 2, 40, 16)
    feature_map = mlp(16, 48, 40, 0)
    expected = kernel_regression(map_features(feature_map, q), map_features(feature_map, k), v)
    part = feature_map_attention(q, k, v, feature_map)
    assert_close("out", part.out, expected.out, 1e-6)
    assert_close("lse", part.lse, expected.lse, 1e-6)


def test_weights_of_modules_can_be_passed():
    layers = [torch.nn.Linear(16, 48), torch.nn.Linear(48, 48), torch.nn.Linear(48, 40)]
    feature_map = MlpFeatureMap(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
    x = torch.randn(1, 2, 9, 16)
    hidden = F.silu(layers[1](F.silu(layers[0](x))))
    expected = F.normalize(F.elu(layers[2](hidden)) + 1, dim=-1)
    assert_close("features", map_features(feature_map, x).detach(), expected.detach(), 1e-5)
    assert feature_map.to(torch.bfloat16).w1.dtype == torch.bfloat16
    assert feature_map.to(torch.float32).w1 is feature_map.w1


def test_wrong_arguments_are_named():
    q, k, v = make_qkv(1, 2, 8, 16)
    good = mlp(16, 48, 40, 0)
    with pytest.raises(ValueError, match="head width 12"):
        feature_map_attention(q, k, v, mlp(12, 48, 40, 0))
    with pytest.raises(ValueError, match="40 features, map_k has 24"):
        feature_map_attention(q, k, v, good, mlp(16, 48, 24, 0))
    with pytest.raises(ValueError, match="weights of 3 heads"):
        feature_map_attention(q, k, v, hedgehog(3, 16, 20, 0, "exp"))
    with pytest.raises(ValueError, match="'exp' map needs one"):
        feature_map_attention(q, k, v, hedgehog(2, 16, 20, 0, "exp"), good)
    with pytest.raises(ValueError, match="map_dtype"):
        feature_map_attention(q.double(), k.double(), v.double(), good, map_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="chunk"):
        feature_map_attention(q, k, v, good, chunk=0)
    with pytest.raises(ValueError, match="w2 must be"):
        MlpFeatureMap(good.w1, good.b1, good.w3, good.b2, good.w3, good.b3)
    with pytest.raises(ValueError, match="kind must be"):
        HedgehogFeatureMap(torch.zeros(1, 2, 3), None, "relu")
    with pytest.raises(ValueError, match="requires one"):
        feature_map_attention(q.requires_grad_(), k, v, good, impl="blocked")
