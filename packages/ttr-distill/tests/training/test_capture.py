from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, TokenLayout
from torch import Tensor
from ttr_distill.grad import training_mode
from ttr_distill.training.capture import CaptureConfig, capture, split_positions
from ttr_distill.training.replay import ReplaySample

CallMaker = Callable[..., AttentionCall]


def taken(call: AttentionCall, target: Tensor, config: CaptureConfig, *, draw: int = 0, seed: int = 0) -> ReplaySample:
    sample = maybe_taken(call, target, config, draw=draw, seed=seed)
    assert sample is not None
    return sample


def maybe_taken(
    call: AttentionCall, target: Tensor, config: CaptureConfig, *, draw: int = 0, seed: int = 0
) -> ReplaySample | None:
    generator = torch.Generator().manual_seed(draw)
    layer, layout = call.layer, call.layout
    assert layer is not None
    assert isinstance(layout, TokenLayout)
    with training_mode():
        return capture(call, target, layer, layout, None, config, seed=seed, generator=generator)


def test_all_keys_and_the_named_queries_are_kept(make_call: CallMaker) -> None:
    call = make_call(0, batch=2)
    target = torch.randn_like(call.v)
    config = CaptureConfig(query_cap=20, heldout_cap=5, storage_dtype="float32")
    sample = taken(call, target, config)
    assert torch.equal(sample.k, call.k)
    assert torch.equal(sample.v, call.v)
    for queries, count in ((sample.train, 20), (sample.heldout, 5)):
        assert queries.positions.numel() == count == len(set(queries.positions.tolist()))
        assert torch.equal(queries.q, call.q[:, :, queries.positions])
        assert torch.equal(queries.target, target[:, :, queries.positions])
    assert (sample.step, sample.layout, sample.layer) == (call.step, call.layout, call.layer)


def test_held_out_positions_are_never_trained_on(make_call: CallMaker) -> None:
    call = make_call(0)
    config = CaptureConfig(query_cap=64, heldout_cap=8)
    samples = [taken(call, call.v, config, draw=draw, seed=3) for draw in range(60)]
    train = {position for sample in samples for position in sample.train.positions.tolist()}
    heldout = {position for sample in samples for position in sample.heldout.positions.tolist()}
    assert train.isdisjoint(heldout)
    assert train | heldout == set(range(call.k.shape[2])), "every position gets its turn"
    assert len(heldout) == round(106 / 8)
    other = taken(call, call.v, config, seed=4)
    assert set(other.heldout.positions.tolist()) - heldout, "the seed decides which"


@pytest.mark.parametrize("tokens", [2, 3, 8, 63, 500])
@pytest.mark.parametrize("share", [0.001, 0.125, 0.999])
def test_positions_are_split_without_loss(tokens: int, share: float) -> None:
    train, heldout = split_positions(tokens, share, 0)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(tokens))
    assert train.numel() >= 1
    assert heldout.numel() >= 1


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_storage_dtype(make_call: CallMaker, name: str) -> None:
    sample = taken(make_call(0), make_call(0).v, CaptureConfig(storage_dtype=name))  # type: ignore[arg-type]
    wanted = getattr(torch, name)
    assert {sample.k.dtype, sample.v.dtype, sample.train.q.dtype, sample.heldout.target.dtype} == {wanted}


def test_what_overflows_float16_is_kept_in_bfloat16(make_call: CallMaker) -> None:
    call = make_call(0)
    big = call.k.clone()
    big[0, 0, 3, 2] = -70_000.0
    sample = taken(replace(call, k=big), call.v, CaptureConfig(storage_dtype="float16"))
    assert sample.k.dtype is torch.bfloat16
    assert torch.isfinite(sample.k).all()
    assert sample.v.dtype is torch.float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "target"])
def test_a_call_with_a_number_that_is_not_finite_is_not_kept(make_call: CallMaker, where: str, bad: float) -> None:
    call, target = make_call(0), make_call(1).v
    tensor = {"q": call.q, "k": call.k, "v": call.v, "target": target}[where].clone()
    tensor[0, 1, 50, 3] = bad
    if where == "target":
        assert maybe_taken(call, tensor, CaptureConfig()) is None
    else:
        assert maybe_taken(replace(call, **{where: tensor}), target, CaptureConfig()) is None
    assert maybe_taken(call, target, CaptureConfig()) is not None


def test_inference_tensors_become_trainable_copies(make_call: CallMaker) -> None:
    with torch.inference_mode():
        call = make_call(0, key_mask=torch.ones(1, 106, dtype=torch.bool))
        sample = taken(call, call.v * 2, CaptureConfig(storage_dtype="float32"))
    assert not any(tensor.is_inference() for tensor in sample.tensors().values())
    before = call.k.clone()
    sample.k.zero_()
    assert torch.equal(call.k, before), "a sample shares no memory with the host"


def test_a_single_token_cannot_be_split(make_call: CallMaker) -> None:
    call = make_call(0, text=0, rows=1, columns=1)
    assert maybe_taken(call, call.v, CaptureConfig()) is None


@pytest.mark.parametrize(
    "bad", [{"query_cap": 0}, {"heldout_cap": 0}, {"heldout_share": 1.0}, {"storage_dtype": "int8"}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        CaptureConfig(**bad)  # type: ignore[arg-type]
