from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid
from hypothesis import given, settings
from hypothesis import strategies as st
from ttr_distill.training.replay import Queries, ReplayBuffer, ReplaySample

LAYERS = tuple(LayerKey("single", index) for index in range(4))
SampleMaker = Callable[..., ReplaySample]


def make_sample(layer: LayerKey = LAYERS[0], tokens: int = 6, *, tag: float = 0.0) -> ReplaySample:
    """A sample of ``8 * tokens + 48`` bytes."""

    def queries(count: int) -> Queries:
        return Queries(torch.full((1, 1, count, 1), tag), torch.zeros(1, 1, count, 1), torch.arange(count))

    layout = TokenLayout(tokens, (), (TokenGrid(0, 1, tokens),))
    k, v = torch.full((1, 1, tokens, 1), tag), torch.zeros(1, 1, tokens, 1)
    return ReplaySample(layer, k, v, queries(2), queries(1), layout)


def test_bytes_count_every_tensor() -> None:
    sample = make_sample(tokens=6)
    assert sample.nbytes == 4 * (6 + 6) + 4 * (2 + 2) + 8 * 2 + 4 * 2 + 8
    masked = replace(sample, key_mask=torch.ones(1, 6, dtype=torch.bool), selection=torch.zeros(1, 1, 3, 2).long())
    assert masked.nbytes == sample.nbytes + 6 + 48


@given(
    budget=st.integers(100, 3000),
    adds=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 120)), max_size=60),
)
@settings(max_examples=150, deadline=None)
def test_the_budget_is_never_exceeded(budget: int, adds: list[tuple[int, int]]) -> None:
    buffer, added = ReplayBuffer(budget), []
    for index, tokens in adds:
        sample = make_sample(LAYERS[index], tokens)
        before = buffer.samples()
        if sample.nbytes > budget:
            with pytest.raises(ValueError, match=f"set replay_bytes to at least {sample.nbytes}"):
                buffer.add(sample)
            assert buffer.samples() == before
        else:
            buffer.add(sample)
            added.append(sample)
            assert buffer.samples()[-1] is sample
        stored = buffer.samples()
        assert buffer.nbytes == sum(one.nbytes for one in stored) <= budget
        for layer in LAYERS:
            assert buffer.layer_bytes(layer) == sum(one.nbytes for one in stored if one.layer == layer)
        # Of each layer the newest remain, in order.
        for layer in LAYERS:
            mine = [one for one in stored if one.layer == layer]
            assert mine == [one for one in added if one.layer == layer][len(mine) * -1 :] or not mine


def test_a_busy_layer_cannot_push_out_the_others() -> None:
    size = make_sample().nbytes
    buffer = ReplayBuffer(8 * size)
    for layer in LAYERS:
        buffer.add(make_sample(layer))
    for _ in range(50):
        buffer.add(make_sample(LAYERS[3]))
    assert [len(buffer.samples(layer)) for layer in LAYERS] == [1, 1, 1, 5]
    for _ in range(50):
        for layer in LAYERS:
            buffer.add(make_sample(layer))
    assert [len(buffer.samples(layer)) for layer in LAYERS] == [2, 2, 2, 2]


def test_the_layer_with_most_bytes_loses_its_oldest() -> None:
    big = make_sample(LAYERS[0], 100)
    small = [make_sample(LAYERS[1], 5, tag=float(index)) for index in range(4)]
    buffer = ReplayBuffer(big.nbytes + 4 * small[0].nbytes)
    for sample in (*small, big):
        buffer.add(sample)
    buffer.add(make_sample(LAYERS[1], 5))
    assert buffer.samples(LAYERS[0]) == ()
    assert len(buffer.samples(LAYERS[1])) == 5


def test_draws_are_uniform_over_the_layer_and_repeat_with_the_seed() -> None:
    buffer = ReplayBuffer(10_000)
    mine = [make_sample(tag=float(index)) for index in range(4)]
    for sample in (*mine, make_sample(LAYERS[1])):
        buffer.add(sample)
    assert buffer.draw(LAYERS[2], torch.Generator()) is None
    generator = torch.Generator().manual_seed(0)
    drawn = [buffer.draw(LAYERS[0], generator) for _ in range(800)]
    counts = [sum(one is sample for one in drawn) for sample in mine]
    assert sum(counts) == 800
    assert min(counts) > 150
    again = torch.Generator().manual_seed(0)
    assert all(buffer.draw(LAYERS[0], again) is one for one in drawn)


def test_what_samples_share_counts_once_and_goes_with_the_last() -> None:
    first = make_sample(tokens=20, tag=1.0)
    others = [replace(make_sample(tokens=20), k=first.k, v=first.v) for _ in range(3)]
    own = first.nbytes - 160
    buffer = ReplayBuffer(160 + 3 * own)
    for sample in (first, *others):
        buffer.add(sample)
        assert buffer.nbytes == 160 + own * len(buffer.samples()) <= buffer.budget_bytes
    assert buffer.samples() == tuple(others), "the oldest went, its keys stay with the others"
    buffer.add(make_sample(tokens=20))
    assert buffer.nbytes == first.nbytes == buffer.layer_bytes(LAYERS[0]), "then they are gone too"
    buffer.clear()
    assert buffer.nbytes == 0


def test_samples_of_held_out_steps_are_never_drawn() -> None:
    buffer = ReplayBuffer(10_000)
    held, mine = replace(make_sample(), trainable=False), make_sample()
    buffer.add(held)
    assert buffer.draw(LAYERS[0], torch.Generator()) is None
    buffer.add(mine)
    generator = torch.Generator().manual_seed(0)
    assert all(buffer.draw(LAYERS[0], generator) is mine for _ in range(20))
    assert buffer.samples() == (held, mine)
    assert not ReplaySample.from_parts(held.tensors(), held.facts()).trainable


def test_clear_keeps_the_newest() -> None:
    buffer = ReplayBuffer(10_000)
    samples = [make_sample(LAYERS[index % 2], tag=float(index)) for index in range(6)]
    for sample in samples:
        buffer.add(sample)
    buffer.clear(LAYERS[0], keep=1)
    assert buffer.samples(LAYERS[0]) == (samples[4],)
    assert len(buffer.samples(LAYERS[1])) == 3
    buffer.clear(LAYERS[2], keep=1)


def test_clear_forgets_one_layer_or_all() -> None:
    buffer = ReplayBuffer(10_000)
    for layer in LAYERS:
        buffer.add(make_sample(layer))
    buffer.clear(LAYERS[0])
    assert buffer.samples(LAYERS[0]) == ()
    assert buffer.nbytes == 3 * make_sample().nbytes
    buffer.clear()
    assert buffer.nbytes == 0


def test_a_sample_is_rebuilt_from_its_parts() -> None:
    layout = TokenLayout(20, ((0, 2), (14, 16)), (TokenGrid(2, 3, 4),), (TokenGrid(16, 2, 2),))
    sample = replace(
        make_sample(tokens=20),
        layout=layout,
        scale=0.3,
        step=StepContext(0.5, 3.0, (6, 8), (0, 1)),
        selection=torch.zeros(1, 1, 2, 2).long(),
    )
    again = ReplaySample.from_parts(sample.tensors(), sample.facts())
    assert (again.layer, again.layout, again.scale, again.step) == (sample.layer, layout, 0.3, sample.step)
    assert again.key_mask is None
    assert all(torch.equal(again.tensors()[name], value) for name, value in sample.tensors().items())
    bare = ReplaySample.from_parts(make_sample().tensors(), make_sample().facts())
    assert bare.step is None
    assert bare.scale is None
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        ReplaySample.from_parts({}, sample.facts())


def test_moving_takes_rows_in_float32() -> None:
    sample = make_sample()
    both = replace(sample, k=torch.tensor([[1.0], [2.0]]).to(torch.bfloat16)[..., None, None])
    assert both.moved(torch.device("cpu"), slice(1, 2)).k.flatten().tolist() == [2.0]
    assert both.moved(torch.device("cpu")).k.dtype is torch.float32


def test_a_buffer_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget_bytes must be positive"):
        ReplayBuffer(0)
