import logging
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid
from attn_kernels.testing import make_qkv
from torch.profiler import ProfilerActivity, profile
from ttr_distill.grad import training_mode
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import PRESETS, preset
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.layer import LayerTraining
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.reservation import reserve_device_memory, training_bytes
from ttr_distill.training.update import UpdateConfig

LAYER = LayerKey("single", 0)


def new_bank(name: str, heads: int, width: int, **settings: object) -> StudentBank:
    return StudentBank.for_layers(preset(name, **settings), (LAYER,), heads, width, seed=0)


def new_sample(bank: StudentBank, batch: int, side: int) -> ReplaySample:
    tokens = 77 + side * side
    q, k, v = make_qkv(batch, bank.heads, tokens, bank.width, dtype=torch.float32, seed=0)
    layout = TokenLayout(tokens, ((0, 77),), (TokenGrid(77, side, side),))
    call = AttentionCall(q, k, v, layer=LAYER, step=StepContext(0.5), layout=layout)
    with torch.no_grad():
        selection = bank[LAYER].select(call)
    generator = torch.Generator().manual_seed(0)
    sample = capture(call, v, LAYER, layout, selection, CaptureConfig(128), seed=0, generator=generator)
    assert sample is not None
    return sample


def peak_of_an_update(bank: StudentBank, sample: ReplaySample, config: UpdateConfig) -> int:
    """Most bytes that are alive beside students and sample while one is measured and trained, moments included."""
    with training_mode():
        state = LayerTraining.start(LAYER, bank[LAYER], config)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            torch.empty(1)
            for _ in range(2):
                moved = sample.moved(torch.device("cpu"))
                state.measure(moved)
                state.update(moved)
                del moved
    sizes: list[tuple[int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        alive = getattr(event.extra_fields, "total_allocated", None)
        if alive is not None:
            sizes.append((event.start_time_ns, alive))
    sizes.sort()
    return max(alive for _, alive in sizes) - sizes[0][1]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("batch", "heads", "width", "side", "key_count"), [(2, 4, 32, 24, 0), (1, 2, 64, 32, 0), (1, 2, 64, 32, 256)]
)
def test_the_estimate_is_between_the_peak_and_twice_the_peak(
    name: str, batch: int, heads: int, width: int, side: int, key_count: int
) -> None:
    bank = new_bank(name, heads, width)
    sample = new_sample(bank, batch, side)
    config = UpdateConfig(key_count=key_count)
    peak = peak_of_an_update(bank, sample, config)
    estimate = training_bytes(bank, sample, config)
    assert peak <= estimate <= 2 * peak + 2**20, f"{peak / 2**20:.1f} MiB, estimated {estimate / 2**20:.1f}"


def test_the_estimate_follows_the_workspace_and_the_average() -> None:
    bank, small = new_bank("hkr", 2, 32), new_bank("hkr", 2, 32, workspace_bytes=2**20)
    sample, config = new_sample(bank, 1, 64), UpdateConfig(key_count=0)
    whole = training_bytes(bank, sample, config)
    less = training_bytes(small, sample, config)
    assert less < 0.8 * whole
    assert peak_of_an_update(small, sample, config) <= less
    averaged = training_bytes(bank, sample, replace(config, average_decay=0.9))
    assert averaged - whole == 4 * sum(weight.numel() for weight in bank.parameters())


def test_unknown_sizes_are_those_of_the_workspace() -> None:
    config = UpdateConfig()
    few, many = (training_bytes(new_bank("hkr", 4, 32, workspace_bytes=size), None, config) for size in (2**20, 2**24))
    assert many - few == 2 * (2**24 - 2**20)
    assert training_bytes(new_bank("near_far", 4, 32), None, config) > 0


def test_half_precision_and_held_out_queries_do_not_shrink_the_estimate() -> None:
    bank, config = new_bank("near_far", 2, 64), UpdateConfig()
    sample = new_sample(bank, 1, 24)
    half = replace(sample, k=sample.k.half(), v=sample.v.half(), trainable=False)
    assert training_bytes(bank, half, config) == training_bytes(bank, sample, config), "updates are in float32"


def test_nothing_is_reserved_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", None)
    reserve_device_memory(2**60, torch.device("cpu"))


def test_what_is_not_to_be_had_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[int, object]] = []

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        asked.append((size * dtype.itemsize, device))
        if size > 100:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        reserve_device_memory(100, device)
        assert not caplog.records
        reserve_device_memory(5 << 20, device)
    assert asked == [(100, device), (5 << 20, device)]
    assert "does not have the 5 MiB free that training is estimated to need" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_there_after_it_was_reserved() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    reserve_device_memory(64 << 20, device)
    assert torch.cuda.memory_reserved() - before >= 64 << 20
    assert torch.cuda.memory_allocated() <= before
