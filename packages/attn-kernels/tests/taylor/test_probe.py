import pytest
import torch
from attn_kernels import TaylorConfig, denominator_probe, taylor_attention
from attn_kernels.testing import assert_close


@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("terms", [2, 3, 4, 6])
def test_all_queries_are_those_of_the_series(series, terms, masked, coefficients):
    q, k, v = series.make_case(std=1.0, dtype=torch.float64)
    mask = series.make_mask() if masked else None
    config = TaylorConfig(coefficients=coefficients)
    probe = denominator_probe(q, k, terms=terms, key_mask=mask, config=config)
    share = series.pairwise(q, k, v, terms, mask=mask)[2]
    if coefficients == "taylor":
        assert_close("minimum", probe.minimum, share.amin(-1), 1e-10)
    answers = taylor_attention(q, k, v, terms=terms, key_mask=mask, config=config, impl="reference")
    assert_close("fraction", probe.fraction_below + 1, answers.lse.isnan().double().mean(-1) + 1, 1e-12)


def test_a_steep_even_series_is_found_out_and_an_odd_one_is_sound(series):
    q, k, _ = series.make_case(std=4.0)
    even, odd = (denominator_probe(q, k, terms=terms) for terms in (2, 3))
    plain = denominator_probe(q, k, terms=4, config=TaylorConfig(centre=False))
    assert plain.fraction_below.max() > 0
    assert plain.minimum.amin() < 0
    assert even.minimum.shape == even.fraction_below.shape == (2, 3)
    assert odd.minimum.min() > 0.5
    assert not odd.fraction_below.count_nonzero()


def test_a_sample_is_centred_by_all_queries(series):
    q, k, _ = series.make_case(std=2.0)
    index = torch.tensor([3, 30, 7])
    probe = denominator_probe(q, k, terms=4, queries=index)
    _, _, share = series.pairwise(q, k, k, 4)
    assert_close("minimum", probe.minimum, share[:, :, index].amin(-1), 1e-4)
    few = denominator_probe(q[:, :, index], k, terms=4)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("centred by the sample", few.minimum, probe.minimum, 1e-2)


def test_blocks_answer_with_the_worst_and_the_mean(series):
    q, k, _ = series.make_case(std=3.0)
    config = TaylorConfig(blocks=3, mode="independent", centre=False)
    probe = denominator_probe(q, k, terms=4, scale=0.4, config=config)
    parts = [
        denominator_probe(
            q[..., 2 * b : 2 * b + 2], k[..., 2 * b : 2 * b + 2], terms=4, scale=0.4, config=TaylorConfig(centre=False)
        )
        for b in range(3)
    ]
    assert_close("minimum", probe.minimum, torch.stack([part.minimum for part in parts]).amin(0), 1e-6)
    assert_close("fraction", probe.fraction_below, torch.stack([p.fraction_below for p in parts]).mean(0), 1e-6)
    assert probe.fraction_below.max() > 0


def test_masked_keys_and_rows_without_keys_count_for_nothing(series):
    q, k, _ = series.make_case()
    mask = series.make_mask()
    mask[1] = False
    dirty = k.masked_fill(~mask[:, None, :, None], torch.nan)
    probe = denominator_probe(q, dirty, terms=3, key_mask=mask)
    clean = denominator_probe(q[:1], k[:1, :, mask[0]], terms=3)
    assert_close("kept", probe.minimum[:1], clean.minimum, 1e-5)
    assert torch.equal(probe.minimum[1], torch.full((3,), torch.inf))
    assert not probe.fraction_below.count_nonzero()


def test_not_a_number_has_no_answer(series):
    q, k, _ = series.make_case()
    k[0, 1, 3] = torch.nan
    probe = denominator_probe(q, k)
    assert probe.minimum[0, 1].isnan()
    assert probe.fraction_below[0, 1] == 1
    assert probe.minimum[1].isfinite().min()


def test_few_scores_at_a_time_change_nothing_and_no_value_is_read(series, monkeypatch):
    q, k, _ = series.make_case()
    whole = denominator_probe(q, k, terms=4)
    monkeypatch.setattr("attn_kernels.taylor.probe._SCORES_AT_ONCE", 222 * 5)
    assert_close("minimum", denominator_probe(q, k, terms=4).minimum, whole.minimum, 1e-5)
    index = torch.empty(5, dtype=torch.int64, device="meta")
    mask = torch.empty(2, 53, dtype=torch.bool, device="meta")
    probe = denominator_probe(q.to("meta"), k.to("meta"), queries=index, key_mask=mask)
    assert probe.minimum.shape == (2, 3)


def test_wrong_queries_are_refused(series):
    q, k, _ = series.make_case()
    for queries in (torch.tensor([1.0]), torch.tensor([[1]]), torch.empty(0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="queries must be int64"):
            denominator_probe(q, k, queries=queries)
    with pytest.raises(ValueError, match="queries are on"):
        denominator_probe(q, k, queries=torch.empty(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="no impl 'blocked'"):
        denominator_probe(q, k, impl="blocked")
