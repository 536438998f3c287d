"""The Taylor kernels equal the reference and the series itself, in the interpreter on the CPU or on the GPU."""

import math
from dataclasses import replace

import pytest
import torch
from attn_kernels.taylor import TaylorConfig, taylor_attention, taylor_feature_count
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.triton_support import refuse_fused

HERE = "cpu" if refuse_fused("fused", torch.empty(0)) is None else "cuda"
if HERE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter or a GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
STREAMED = TaylorConfig(path="streaming", feature_chunk=100)


def draw(batch, heads, queries, keys, width, columns, dtype=torch.float32, std=0.8):
    """Tokens with a mean of their own, so that centring has something to do."""
    q, k, v = make_qkv(batch, heads, queries, width, kv_tokens=keys, value_width=columns, logit_std=std)
    shift = torch.linspace(-0.5, 1.0, width)
    return [x.to(dtype).to(HERE) for x in (q + 0.3 * shift, k + shift, v + 0.2)]


def mask_for(batch, keys):
    return (torch.rand(batch, keys, generator=torch.Generator().manual_seed(1)) < 0.7).to(HERE)


def series(q, k, v, terms, scale, key_mask=None, centre=True):
    """The truncated series pair by pair in float64, with the same centring."""
    q, k, v = q.double(), k.double(), v.double()
    kept = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    kept = kept[:, None, None]
    mean = q.mean(2, keepdim=True) if centre else torch.zeros_like(q[:, :, :1])
    weight = torch.where(kept, torch.exp(scale * mean @ k.transpose(-1, -2)), 0)
    centre_k = weight @ k / weight.sum(-1, keepdim=True) if centre else torch.zeros_like(mean)
    logits = scale * (q - mean) @ (k - centre_k).transpose(-1, -2)
    pairs = weight * sum(logits**p / math.factorial(p) for p in range(terms))
    total = pairs.sum(-1)
    offset = scale * ((q - mean) * centre_k).sum(-1)
    return pairs @ v / total[..., None], total.log() + offset


def assert_same(tensors, ratio, key_mask=None, **options):
    q, k, v = tensors
    part = taylor_attention(q, k, v, key_mask=key_mask, impl="fused", **options)
    expected = taylor_attention(q.float(), k.float(), v.float(), key_mask=key_mask, impl="reference", **options)
    assert part.out.dtype == v.dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out, expected.out, ratio)
    if options.get("config", STREAMED).blocks == 1:
        assert_close("lse", part.lse, expected.lse, ratio)
    return part


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "width", "columns", "terms", "masked"),
    [
        (2, 2, 63, 63, 16, 16, 3, False),
        (2, 1, 83, 301, 24, 20, 3, True),
        (1, 2, 150, 70, 16, 16, 4, True),
        (1, 1, 65, 129, 7, 70, 4, False),
        (1, 1, 40, 100, 5, 8, 6, True),
    ],
)
def test_equals_the_reference(dtype, ratio, batch, heads, queries, keys, width, columns, terms, masked):
    tensors = draw(batch, heads, queries, keys, width, columns, dtype)
    assert_same(tensors, ratio, mask_for(batch, keys) if masked else None, terms=terms)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES[1:])
@pytest.mark.parametrize("columns", [16, 11])
def test_sums_in_shared_memory_are_read_as_the_others(dtype, ratio, columns, monkeypatch):
    from attn_kernels.taylor import fused

    tensors = draw(1, 2, 150, 90, 16, columns, dtype)
    calls = []
    monkeypatch.setattr(fused, "_read_resident", lambda *call, kept=fused._read_resident: calls.append(kept(*call)))
    assert_same(tensors, ratio, mask_for(1, 90), terms=4)
    assert calls
    monkeypatch.setattr(fused, "_fits_resident", lambda *call: False)
    assert_same(tensors, ratio, mask_for(1, 90), terms=4)
    assert len(calls) == 1


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("centre", [True, False])
def test_equals_the_series(terms, centre):
    q, k, v = draw(1, 2, 33, 70, 4, 8)
    key_mask = mask_for(1, 70)
    config = TaylorConfig(centre=centre)
    part = taylor_attention(q, k, v, terms=terms, scale=0.4, key_mask=key_mask, config=config, impl="fused")
    out, lse = series(q, k, v, terms, 0.4, key_mask, centre)
    positive = lse.isfinite()
    assert positive.double().mean() > 0.9
    assert_close("out", part.out[positive], out[positive], 1e-5)
    assert_close("lse", part.lse[positive], lse[positive], 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        STREAMED,
        TaylorConfig(path="streaming", feature_chunk=70, value_chunk=11),
        TaylorConfig(value_chunk=17),
        TaylorConfig(centre=False, path="full"),
        TaylorConfig(blocks=2, mode="independent"),
        TaylorConfig(blocks=4, mode="independent", path="streaming", feature_chunk=10),
    ],
    ids=lambda config: f"{config.path}-{config.blocks}-{config.feature_chunk}-{config.value_chunk}",
)
def test_every_path_is_the_same_function(config):
    tensors = draw(2, 1, 45, 77, 8, 20)
    for terms in (3, 4):
        assert_same(tensors, 1e-5, mask_for(2, 77), terms=terms, scale=0.3, config=config)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("terms", "width", "columns", "masked"), [(3, 16, 16, True), (4, 16, 16, False), (5, 5, 40, True), (1, 4, 8, True)]
)
def test_least_squares_coefficients(dtype, ratio, terms, width, columns, masked):
    tensors = draw(2, 1, 70, 90, width, columns, dtype)
    config = TaylorConfig(coefficients="hermite", hermite_limit=100.0)
    assert_same(tensors, ratio, mask_for(2, 90) if masked else None, terms=terms, config=config)


@pytest.mark.parametrize(
    "config",
    [
        TaylorConfig(coefficients="hermite", hermite_limit=0.8),
        TaylorConfig(coefficients="hermite", hermite_limit=100.0, path="streaming", feature_chunk=100, value_chunk=11),
        TaylorConfig(coefficients="hermite", hermite_limit=100.0, blocks=2, mode="independent"),
    ],
    ids=["some queries only", "streaming", "blocks"],
)
def test_least_squares_coefficients_on_every_path(config):
    from attn_kernels.taylor import denominator_probe

    q, k, v = draw(2, 1, 45, 77, 8, 20)
    options = {"key_mask": mask_for(2, 77), "scale": 0.3, "config": config}
    for terms in (3, 4):
        part = assert_same((q, k, v), 1e-5, terms=terms, **options)
        plain = replace(config, coefficients="taylor")
        other = taylor_attention(q, k, v, terms=terms, impl="fused", **{**options, "config": plain})
        same = torch.isclose(part.out, other.out, rtol=1e-5, atol=1e-6).all(-1)
        # Those whose logits spread too far keep Taylor's coefficients.
        assert same.any() == (config.hermite_limit < 1.0)
        assert not same.all()
        probes = [denominator_probe(q, k, terms=terms, impl=impl, **options).minimum for impl in ("fused", "reference")]
        assert_close("minimum", *probes, 1e-5)


def test_least_squares_coefficients_without_keys_or_queries():
    q, k, v = draw(2, 1, 20, 30, 4, 8)
    key_mask = mask_for(2, 30)
    key_mask[0] = False
    config = TaylorConfig(coefficients="hermite")
    part = assert_same((q, k, v), 1e-5, key_mask, config=config)
    assert (part.lse[0] == -torch.inf).all()
    assert taylor_attention(q[:, :, :0], k, v, config=config, impl="fused").out.shape == (2, 1, 0, 8)


def test_many_tiles_splits_and_columns(monkeypatch):
    from attn_kernels.taylor import fused

    monkeypatch.setattr(fused, "_STATE_BYTES", 40_000)
    tensors = draw(1, 1, 70, 700, 10, 40)
    assert taylor_feature_count(10, 4) > fused._chunk(taylor_feature_count(10, 4), 40, 700, TaylorConfig())
    assert_same(tensors, 1e-5, mask_for(1, 700), terms=4)


def test_one_tensor_may_be_queries_keys_and_values():
    x = draw(1, 2, 50, 50, 8, 8)[1]
    assert_same((x, x, x), 1e-5, mask_for(1, 50), terms=3)


def test_a_negative_scale_and_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(2, 2, 40, 40, 8, 8))
    assert_same((q, k, v), 1e-5, terms=3, scale=-0.4)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert_same(turned, 1e-5, mask_for(40, 2).T, terms=3)


def test_bfloat16_sums_are_less_exact_and_close():
    tensors = draw(1, 2, 60, 90, 8, 16)
    exact = taylor_attention(*tensors, impl="reference").out
    coarse = taylor_attention(*tensors, config=TaylorConfig(store="bfloat16"), impl="fused").out
    assert_close("out", coarse, exact, 5e-3)
    with pytest.raises(AssertionError):
        assert_close("out", coarse, exact, 1e-5)


def test_a_denominator_that_is_not_positive_gives_nan():
    q, k, v = draw(1, 1, 90, 20, 4, 8, std=5.0)
    config = TaylorConfig(centre=False)
    part = taylor_attention(q, k, v, terms=4, config=config, impl="fused")
    expected = taylor_attention(q, k, v, terms=4, config=config, impl="reference")
    assert torch.equal(part.lse.isnan(), expected.lse.isnan())
    assert 0 < part.lse.isnan().sum() < 90
    assert torch.equal(part.out.isnan().all(-1), part.lse.isnan())
    fine = ~part.lse.isnan()
    assert_close("out", part.out[fine], expected.out[fine], 1e-4)


def test_rows_without_keys_and_masked_nan():
    q, k, v = draw(2, 2, 40, 50, 8, 8)
    key_mask = mask_for(2, 50)
    key_mask[1] = False
    hole = ~key_mask[:, None, :, None]
    part = assert_same((q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.inf)), 1e-5, key_mask)
    assert (part.out[1] == 0).all()
    assert (part.lse[1] == -torch.inf).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_never_hidden(which):
    tensors = draw(1, 2, 40, 40, 8, 8)
    tensors[which][0, 1, 21, 3] = torch.nan
    part = taylor_attention(*tensors, impl="fused")
    seen = part.out[0, 1].isnan().any(dim=-1)
    assert seen.all() if which else seen[21]
    assert part.out[0, 0].isfinite().all()


def test_huge_values_overflow_to_something_that_is_not_finite():
    q, k, v = draw(1, 1, 40, 40, 8, 8, torch.float16)
    k[..., 3] *= 20_000
    out = taylor_attention(q, k, v, terms=5, impl="fused").out
    exact = taylor_attention(q.float(), k.float(), v.float(), terms=5, impl="reference").out
    finite = out.isfinite()
    assert not finite.all() or (out[finite].float() - exact[finite]).abs().max() < 1e-2


@pytest.mark.parametrize("chunked", [False, True])
def test_denominators_without_values(chunked):
    from attn_kernels.taylor.fused import taylor_fused_denominators

    q, k, v = draw(2, 2, 60, 90, 6, 8, std=2.0)
    key_mask = mask_for(2, 90)
    some = torch.tensor([3, 59, 0, 17], device=HERE)
    config = TaylorConfig(path="streaming", feature_chunk=30) if chunked else TaylorConfig()
    options = {"terms": 4, "scale": 0.4, "key_mask": key_mask, "config": config}
    whole = taylor_fused_denominators(q, k, **options)
    assert_close("some", taylor_fused_denominators(q, k, queries=some, **options), whole[..., some], 1e-6)
    part = taylor_attention(q, k, v, impl="reference", **options)
    assert torch.equal(whole[:, :, 0] <= config.eps, part.lse.isnan())
    # The share of the key weights is the mean of the series under them: exp(lse) over the weights' own sum.
    mean = q.mean(2, keepdim=True)
    weight = torch.where(key_mask[:, None, None], torch.exp(0.4 * mean @ k.transpose(-1, -2)), 0)
    centre_k = weight @ k / weight.sum(-1, keepdim=True)
    share = torch.exp(part.lse - 0.4 * ((q - mean) * centre_k).sum(-1)) / weight.sum(-1)
    fine = ~part.lse.isnan()
    assert_close("share", whole[:, :, 0][fine], share[fine], 1e-5)


@pytest.mark.parametrize(("width", "terms"), [(5, 4), (3, 8), (17, 3), (4, 1), (9, 2)])
def test_indices_are_unranked_as_in_torch(width, terms):
    from attn_kernels.taylor.features import feature_weights, unrank_multisets
    from attn_kernels.taylor.fused import _new_table

    count = taylor_feature_count(width, terms)
    for first, size in ((0, count), (count // 3, count // 2)):
        table, weight = _new_table(width, terms, first, size, torch.device(HERE))
        expected = unrank_multisets(torch.arange(first, first + size, device=HERE), width + 1, terms - 1)
        assert torch.equal(table[: terms - 1].T.long(), expected)
        assert_close("weights", weight, feature_weights(expected, 1.0, torch.float32), 1e-6)


def test_equal_inputs_give_equal_bits():
    tensors = draw(1, 2, 60, 600, 8, 16)
    one, two = (taylor_attention(*tensors, impl="fused") for _ in range(2))
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.lse, two.lse)


def test_refusals():
    q, k, v = draw(1, 1, 20, 20, 8, 8)
    with pytest.raises(ValueError, match="float64"):
        taylor_attention(q.double(), k.double(), v.double(), impl="fused")
    with pytest.raises(ValueError, match="no gradient"):
        taylor_attention(q.requires_grad_(), k, v, impl="fused")
