import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.hybrid import fit_projection
from attn_kernels.testing import assert_close, make_qkv


def residual(q, k, projection):
    """Mean square of what the projection misses of the centred dot products, per head."""
    q, k = (x.double() - x.double().mean(dim=(0, 2), keepdim=True) for x in (q, k))
    q_low, k_low = q @ projection.q_basis.double(), k @ projection.k_basis.double()
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (q, k, q_low, k_low)]
    exact, low = flat[0] @ flat[1].mT, flat[2] @ flat[3].mT
    return (exact - low).square().mean(dim=(1, 2)), exact.square().mean(dim=(1, 2))


def anisotropic():
    """Queries vary most where keys do not: what is large is not what meets."""
    q, k, _ = make_qkv(2, 2, 300, 16, smooth_grid=TokenGrid(0, 15, 20))
    gain = torch.logspace(-1, 1, 16)
    return q * gain, k * gain.flip(0)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_no_other_map_of_that_rank_is_closer(rank):
    q, k = anisotropic()
    projection = fit_projection(q, k, rank=rank)
    missed, whole = residual(q, k, projection)
    assert_close("captured", projection.captured, 1 - missed / whole, 1e-4)
    # The singular values of the matrix of all dot products bound every map of this rank (Eckart and Young).
    centred = [x.double() - x.double().mean(dim=(0, 2), keepdim=True) for x in (q, k)]
    q_flat, k_flat = (x.transpose(0, 1).flatten(1, 2) for x in centred)
    values = torch.linalg.svdvals(q_flat @ k_flat.mT)
    bound = values[:, rank:].square().sum(dim=1) / (q_flat.shape[1] * k_flat.shape[1])
    assert_close("missed", missed, bound, 1e-4)


def test_pca_is_one_orthonormal_basis_and_misses_more():
    q, k = anisotropic()
    pca, bilinear = (fit_projection(q, k, rank=4, method=method) for method in ("pca", "bilinear"))
    assert torch.equal(pca.q_basis, pca.k_basis)
    assert_close("orthonormal", pca.q_basis.mT @ pca.q_basis, torch.eye(4).expand(2, -1, -1), 1e-5)
    both = torch.cat([q, k], dim=2).transpose(0, 1).flatten(1, 2).double()
    _, _, right = torch.linalg.svd(both - both.mean(dim=1, keepdim=True), full_matrices=False)
    expected = right[:, :4].mT @ right[:, :4]
    assert_close("span", (pca.q_basis @ pca.q_basis.mT).double(), expected, 1e-4)
    missed = [residual(q, k, each)[0] for each in (pca, bilinear)]
    assert (missed[0] > 1.4 * missed[1]).all()
    assert (pca.captured < bilinear.captured).all()


@pytest.mark.parametrize("method", ["bilinear", "pca"])
def test_is_deterministic_and_every_head_has_its_own(method):
    q, k, _ = make_qkv(1, 3, 100, 8)
    one, again = (fit_projection(q, k, rank=3, method=method) for _ in range(2))
    assert torch.equal(one.q_basis, again.q_basis)
    alone = fit_projection(q[:, 1:2], k[:, 1:2], rank=3, method=method)
    assert_close("head", one.k_basis[1:2], alone.k_basis, 1e-4)
    # Another sign of the data is the same problem and gives the same basis.
    flipped = fit_projection(-q, -k, rank=3, method=method)
    assert_close("sign", flipped.q_basis, one.q_basis, 1e-4)


@pytest.mark.parametrize("method", ["bilinear", "pca"])
def test_masked_keys_do_not_count(method):
    q, k, _ = make_qkv(2, 2, 50, 8)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[:, 40:] = False
    expected = fit_projection(q, k[:, :, :40], rank=3, method=method)
    k = k.clone()
    k[:, :, 40:] = torch.nan
    part = fit_projection(q, k, rank=3, method=method, key_mask=mask)
    assert_close("q", part.q_basis, expected.q_basis, 1e-4)
    assert_close("k", part.k_basis, expected.k_basis, 1e-4)


def test_full_rank_keeps_everything_and_data_of_low_rank_give_finite_bases():
    q, k, _ = make_qkv(1, 2, 60, 8)
    full = fit_projection(q, k, rank=8)
    assert_close("q k", full.q_basis @ full.k_basis.mT, torch.eye(8).expand(2, -1, -1), 1e-4)
    flat = fit_projection(q * (torch.arange(8) < 3), k, rank=6)
    assert flat.q_basis.isfinite().all()
    assert (flat.q_basis[..., 3:] == 0).all()
    assert_close("captured", flat.captured, torch.ones(2), 1e-5)


def test_wrong_arguments_are_named():
    q, k, _ = make_qkv(1, 2, 60, 8)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.8"):
        fit_projection(q, k, rank=9)
    with pytest.raises(ValueError, match="method"):
        fit_projection(q, k, rank=2, method="random")
    with pytest.raises(ValueError, match="equal B, H, D"):
        fit_projection(q, k[..., :4], rank=2)
