import pytest
import torch
from attn_dispatch import AttentionCall
from attn_dispatch.backends.quality import PendingValues, QualityTally, exact_rows, sample_queries
from attn_kernels import softmax_attention
from attn_kernels.testing import make_qkv


@pytest.mark.parametrize(("count", "total"), [(16, 4173), (5, 7), (64, 65), (1, 10)])
def test_samples_are_distinct_and_from_every_stretch(count: int, total: int) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [sample_queries(count, total, generator) for _ in range(50)]
    for index in drawn:
        assert index.shape == (count,)
        assert (index.diff() > 0).all()
        assert index.min() >= 0
        assert index.max() < total
        for stretch, place in enumerate(index.tolist()):
            assert stretch * total // count <= place < (stretch + 1) * total // count
    assert len({tuple(index.tolist()) for index in drawn}) > 1


def test_few_places_are_all_taken() -> None:
    assert sample_queries(9, 9, torch.Generator()).tolist() == list(range(9))
    assert sample_queries(64, 3, torch.Generator()).tolist() == [0, 1, 2]


def test_every_place_can_be_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {place for _ in range(400) for place in sample_queries(3, 11, generator).tolist()}
    assert seen == set(range(11))


@pytest.mark.parametrize("kind", ["none", "keys", "bias"])
def test_exact_rows_are_rows_of_exact_attention(kind: str) -> None:
    q, k, v = make_qkv(2, 2, 13, 8, kv_tokens=19, dtype=torch.float32, seed=1)
    index = torch.tensor([0, 5, 12])
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(2)) > 0.3 if kind == "keys" else None
    bias = torch.randn(2, 1, 13, 19, generator=torch.Generator().manual_seed(2)) if kind == "bias" else None
    rows = exact_rows(AttentionCall(q, k, v, scale=0.3, key_mask=mask, attn_bias=bias), index)
    if bias is None:
        expected = softmax_attention(q, k, v, scale=0.3, key_mask=mask).out
    else:
        expected = ((0.3 * q @ k.transpose(-1, -2) + bias).double().softmax(-1) @ v.double()).float()
    torch.testing.assert_close(rows, expected[:, :, index], rtol=1e-4, atol=1e-5)


def test_figures_over_two_calls() -> None:
    tally = QualityTally()
    tally.add(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 4.0]]]]))
    tally.add(torch.tensor([[[[0.0, -1.0]]]]), torch.tensor([[[[3.0, -1.0]]]]))
    figures = tally.figures(PendingValues(tally.values()).read())
    assert figures is not None
    assert figures.mean_abs == pytest.approx(5 / 4)
    assert figures.max_abs == 3.0
    assert figures.mean_rel == pytest.approx((0.5 + 1.0) / 4, rel=1e-5)
    assert figures.max_rel == pytest.approx(1.0, rel=1e-5)
    assert figures.relative_l2 == pytest.approx((13 / 27) ** 0.5)
    assert (figures.samples, figures.calls) == (4, 2)


def test_nothing_compared_gives_no_figures() -> None:
    tally = QualityTally()
    assert tally.figures(PendingValues(tally.values()).read()) is None
