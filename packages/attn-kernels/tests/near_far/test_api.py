import pytest
import torch
from attn_kernels import NearFarConfig, NearFarCorrections, TokenGrid, near_far_attention, select_tiles
from attn_kernels.near_far import api as module
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.triton_support import interpreted

GRID = TokenGrid(6, 8, 8)
CONFIG = NearFarConfig(2, 1, 2)


def run(q, k, v, **options):
    return near_far_attention(q, k, v, **{"grids": [GRID], "config": CONFIG, **options})


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_the_order_of_text_tokens_does_not_matter(impl):
    q, k, v = make_qkv(1, 2, 74, 8)
    order = torch.cat([torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(6, 70), torch.tensor([73, 70, 72, 71])])
    part, other = run(q, k, v, impl=impl), run(q[:, :, order], k[:, :, order], v[:, :, order], impl=impl)
    assert_close("out", other.out, part.out[:, :, order], 2e-6)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_scaling(impl):
    q, k, v = make_qkv(1, 2, 70, 8)
    part = run(q, k, v, impl=impl)
    assert_close("values", run(q, k, -3.0 * v, impl=impl).out, -3.0 * part.out, 2e-6)
    assert_close("queries", run(2 * q, k, v, scale=0.5 * 8**-0.5, impl=impl).out, part.out, 2e-6)
    shift = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    moved = run(q, k + shift, v, impl=impl)
    assert_close("one shift of all keys leaves the weights", moved.out, part.out, 1e-5)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_masked_tokens_do_not_matter(impl):
    q, k, v = make_qkv(2, 2, 70, 8)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) > 0.4
    part = run(q, k, v, key_mask=mask, impl=impl)
    drop = ~mask[:, None, :, None]
    # Queries of masked tokens leave the choice of tiles too, so their values may change without effect elsewhere.
    other = run(q.masked_fill(drop, 9.0), k.masked_fill(drop, 9.0), v.masked_fill(drop, 9.0), key_mask=mask, impl=impl)
    kept = mask[:, None].expand(-1, 2, -1)
    assert torch.equal(other.out[kept], part.out[kept])


def test_a_given_choice_equals_the_one_made_here():
    q, k, v = make_qkv(1, 2, 70, 8)
    chosen = select_tiles(q, k, grids=[GRID], config=CONFIG)
    assert torch.equal(run(q, k, v, selection=chosen).out, run(q, k, v).out)
    nothing = run(q, k, v, selection=torch.full_like(chosen, -1)).out
    assert_close("none", nothing, run(q, k, v, config=NearFarConfig(2, 1, 0)).out, 1e-6)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_no_key_counts_twice_when_a_choice_repeats_or_is_near(impl):
    q, k, v = make_qkv(1, 2, 70, 8)
    config = NearFarConfig(2, 1, 4)
    twice = torch.full((1, 2, 16, 4), -1)
    twice[:, :, 0] = torch.tensor([10, 1, 10, 0])
    once = torch.full((1, 2, 16, 4), -1)
    once[:, :, 0, 0] = 10
    a, b = (run(q, k, v, config=config, selection=chosen, impl=impl) for chosen in (twice, once))
    assert_close("out", a.out, b.out, 1e-6)
    assert_close("lse", a.lse, b.lse, 1e-6)


def test_auto_is_blocked_unless_a_gradient_or_some_queries_are_wanted(monkeypatch):
    ran = []
    for name in ("near_far_blocked", "near_far_reference"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _r=real, **o: (ran.append(_n), _r(*a, **o))[1])
    q, k, v = make_qkv(1, 2, 70, 8)
    chosen, rows = select_tiles(q, k, grids=[GRID], config=CONFIG), torch.arange(70)
    run(q, k, v)
    run(q, k, v, selection=chosen, query_positions=rows)
    run(q, k, v.clone().requires_grad_())
    run(q, k, v, corrections=NearFarCorrections(torch.ones(2), torch.zeros(2, requires_grad=True)))
    with torch.no_grad():
        run(q, k, v.clone().requires_grad_())
    with torch.inference_mode():
        run(q, k, v)
    reference, blocked = "near_far_reference", "near_far_blocked"
    assert ran == [blocked, reference, reference, reference, blocked, blocked]


def test_gradients_reach_every_input_through_auto():
    tensors = [x.requires_grad_() for x in make_qkv(1, 2, 70, 8)]
    corrections = NearFarCorrections(torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True))
    run(*tensors, corrections=corrections).out.square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (*tensors, *corrections))


def test_tensors_made_in_inference_mode_do_not_leak_into_training():
    q, k, v = make_qkv(1, 2, 70, 8)
    with torch.inference_mode():
        run(q, k, v, impl="reference")
    run(q.requires_grad_(), k, v).out.sum().backward()
    assert q.grad.isfinite().all()


def test_blocked_refuses_what_it_cannot_do():
    q, k, v = make_qkv(1, 2, 70, 8)
    with pytest.raises(ValueError, match="has no gradient"):
        run(q.clone().requires_grad_(), k, v, impl="blocked")
    chosen = select_tiles(q, k, grids=[GRID], config=CONFIG)
    with pytest.raises(ValueError, match="query_positions"):
        run(q, k, v, selection=chosen, query_positions=torch.arange(70), impl="blocked")


def test_fused_refuses_what_it_cannot_do():
    q, k, v = make_qkv(1, 2, 70, 8)
    with pytest.raises(ValueError, match="impl 'fused' cannot run here: it has no gradient"):
        run(q.clone().requires_grad_(), k, v, impl="fused")
    chosen = select_tiles(q, k, grids=[GRID], config=CONFIG)
    with pytest.raises(ValueError, match="query_positions names some"):
        run(q, k, v, selection=chosen, query_positions=torch.arange(70), impl="fused")
    if interpreted():
        with pytest.raises(ValueError, match=r"float32 at most, got torch\.float64"):
            run(q.double(), k.double(), v.double(), impl="fused")
        with pytest.raises(ValueError, match="top_k up to 128, got 129"):
            run(q, k, v, config=NearFarConfig(2, 1, 129), impl="fused")
        wide = make_qkv(1, 1, 70, 257)
        with pytest.raises(ValueError, match="head widths up to 256, got 257"):
            run(*wide, impl="fused")


def test_fused_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"CUDA tensors|not installed"):
        run(*make_qkv(1, 2, 70, 8), impl="fused")


def test_auto_takes_the_kernels_where_they_can_run(monkeypatch):
    pytest.importorskip("triton")
    from attn_kernels.near_far import fused

    ran = []
    monkeypatch.setattr(module, "refuse_fused", lambda *_, **__: None)
    monkeypatch.setattr(fused, "near_far_fused", lambda *a, **o: ran.append(o["config"]))
    q, k, v = make_qkv(1, 2, 70, 8)
    run(q, k, v)
    assert ran == [CONFIG]
    run(q.requires_grad_(), k, v)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": []}, "at least one TokenGrid"),
        ({"grids": [TokenGrid(7, 8, 8)]}, "end by 70"),
        ({"key_mask": torch.ones(1, 69, dtype=torch.bool)}, "key_mask"),
        ({"selection": torch.zeros(1, 2, 16, 3, dtype=torch.int64)}, r"\[B, H, T, top_k\] = \(1, 2, 16, 2\)"),
        ({"selection": torch.zeros(1, 2, 16, 2, dtype=torch.int32)}, "must be int64"),
        ({"query_positions": torch.arange(69)}, r"\[Nq\] = \(70,\)"),
        ({"query_positions": torch.arange(70)}, "needs a selection"),
        ({"corrections": NearFarCorrections(torch.ones(2), torch.ones(3))}, r"corrections.bias must be \[H\] = \(2,\)"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    q, k, v = make_qkv(1, 2, 70, 8)
    with pytest.raises(ValueError, match=message):
        run(q, k, v, **options)


def test_some_queries_need_positions():
    q, k, v = make_qkv(1, 2, 10, 8, kv_tokens=70)
    with pytest.raises(ValueError, match="name the rows of q with query_positions"):
        run(q, k, v)
