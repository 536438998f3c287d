import pytest
import torch
from attn_kernels.taylor.centring import centre, key_covariance
from attn_kernels.testing import assert_close

NAN = float("nan")


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 5, dtype=torch.float64, generator=generator) + 0.5 for n in (17, 23))
    keep = torch.rand(2, 1, 23, generator=generator) > 0.4
    return q.to(dtype), k.to(dtype), keep


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_means_and_the_residual_give_back_the_logits(masked, chunk):
    q, k, keep = draw()
    mask = keep if masked else None
    c = centre(q, k, scale=0.7, keep=mask, enabled=True, chunk=chunk)
    # scale q.k = scale (q - a).b + log weight + shift + scale (q - a).(k - b) for every key that is kept.
    centred = q - c.query_mean
    rebuilt = 0.7 * (centred @ c.key_mean.mT + centred @ (k - c.key_mean).mT) + (c.weights.log() + c.shift)[:, :, None]
    dropped = ~keep[:, :, None] if masked else torch.zeros(1, 1, 1, 23, dtype=torch.bool)
    assert_close("logits", rebuilt.masked_fill(dropped, 0), (0.7 * q @ k.mT).masked_fill(dropped, 0), 1e-13)
    assert torch.equal(c.weights == 0, dropped.expand(2, 3, 1, 23)[:, :, 0])
    assert_close("largest weight", c.weights.amax(-1), torch.ones(2, 3), 1e-14)
    residual = centred @ (k - c.key_mean).mT
    assert (residual @ c.weights.unsqueeze(-1)).abs().max() < 1e-12
    assert_close("total", c.total[..., 0], c.weights.sum(-1), 1e-14)


def test_masked_keys_may_hold_anything():
    q, k, keep = draw()
    dirty = k.masked_fill(~keep[..., None], NAN)
    clean, other = (centre(q, x, scale=0.7, keep=keep, enabled=True, chunk=6) for x in (k, dirty))
    for one, two in zip(clean, other, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(*(key_covariance(x, clean, keep=keep, chunk=6) for x in (k, dirty)))


def test_without_keys_nothing_is_infinite():
    q, k, keep = draw()
    for enabled in (True, False):
        c = centre(q, k, scale=0.7, keep=torch.zeros_like(keep), enabled=enabled)
        assert all(part.isfinite().min() for part in c)
        assert torch.equal(c.total, torch.zeros(2, 3, 1, dtype=torch.float64))


def test_disabled_centring_takes_nothing_out():
    q, k, keep = draw()
    c = centre(q, k, scale=0.7, keep=keep, enabled=False)
    assert not c.query_mean.count_nonzero()
    assert not c.key_mean.count_nonzero()
    assert not c.shift.count_nonzero()
    assert torch.equal(c.weights, keep.double().expand(2, 3, 23))


def test_low_precision_is_summed_in_float32():
    q, k = (
        torch.full((1, 1, 3000, 2), 0.1, dtype=torch.bfloat16),
        torch.full((1, 1, 5000, 2), 0.1, dtype=torch.bfloat16),
    )
    c = centre(q, k, scale=1.0, keep=None, enabled=True)
    assert c.weights.dtype == torch.float32
    for mean in (c.query_mean, c.key_mean):
        assert_close("mean", mean, torch.full_like(mean, float(q[0, 0, 0, 0])), 1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_the_covariance_is_that_under_the_weights(masked):
    q, k, keep = draw()
    mask = keep if masked else None
    c = centre(q, k, scale=0.7, keep=mask, enabled=True)
    for row in range(2):
        for head in range(3):
            expected = torch.cov(k[row, head].mT, correction=0, aweights=c.weights[row, head])
            assert_close("covariance", key_covariance(k, c, keep=mask, chunk=7)[row, head], expected, 1e-12)
