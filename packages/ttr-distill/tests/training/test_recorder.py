import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey, StepContext
from torch import Tensor
from ttr_distill.student.bank import StudentBank
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.recorder import CaptureRecorder
from ttr_distill.training.replay import ReplaySample

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
BankMaker = Callable[..., StudentBank]
LAYERS = tuple(LayerKey("single", index) for index in range(3))


@pytest.fixture
def record(make_call: CallMaker, native: Native) -> Callable[[CaptureRecorder, int], None]:
    def one_run(recorder: CaptureRecorder, steps: int = 8) -> None:
        seed = 100 * recorder.run
        with torch.inference_mode():
            recorder.begin_run()
            for step in range(steps):
                for layer in LAYERS:
                    call = make_call(seed + step, layer=layer, step=StepContext(1.0 - step / steps))
                    assert torch.equal(recorder(call, native), native(call))
            recorder.end_run()

    return one_run


def test_every_call_is_recorded_and_one_step_of_a_run_is_held_out(
    bank_of: BankMaker, record: Callable[..., None]
) -> None:
    taken: list[ReplaySample] = []
    recorder = CaptureRecorder(bank_of("near_far"), taken.append, CaptureConfig(16, 8), seed=3)
    assert isinstance(recorder, AttentionHandler)
    places = []
    for _ in range(4):
        taken.clear()
        record(recorder)
        assert [sample.layer for sample in taken] == [*LAYERS] * 8
        held = [index // 3 for index, sample in enumerate(taken) if not sample.trainable]
        assert len(held) == 3
        assert len(set(held)) == 1, "a step is held out in all layers"
        places.append(held[0])
        assert all(sample.selection is not None for sample in taken)
        assert not any(tensor.is_inference() for sample in taken for tensor in sample.tensors().values())
    assert len(set(places)) > 1
    assert recorder.run == 4


def test_a_recording_continued_at_a_run_is_the_unbroken_one(bank_of: BankMaker, record: Callable[..., None]) -> None:
    whole: list[ReplaySample] = []
    recorder = CaptureRecorder(bank_of("near_far"), whole.append, CaptureConfig(16, 8), seed=3)
    for _ in range(3):
        record(recorder)
    rest: list[ReplaySample] = []
    record(CaptureRecorder(bank_of("near_far"), rest.append, CaptureConfig(16, 8), seed=3, run=2))
    for expected, found in zip(whole[48:], rest, strict=True):
        assert found.facts() == expected.facts()
        assert all(torch.equal(found.tensors()[name], value) for name, value in expected.tensors().items())


def test_calls_that_cannot_be_learned_from_are_counted(
    make_call: CallMaker, native: Native, bank_of: BankMaker
) -> None:
    taken: list[ReplaySample] = []
    recorder = CaptureRecorder(bank_of("near_far"), taken.append)
    broken = make_call(0)
    broken.v[0, 0, 0, 0] = math.nan
    for call in (make_call(0, layer=None), replace(make_call(0), layout=None), broken):
        assert recorder(call, native).shape == call.v.shape
    assert taken == []
    assert recorder.declined == {
        "the host does not name its layers": 1,
        "the host does not say where text and image tokens lie": 1,
        "the call holds a number that is not finite": 1,
    }
