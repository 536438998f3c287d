from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext
from torch import Tensor
from ttr_distill.recorded_calls import Captures, CaptureWriter
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.training.calibration import CalibrateConfig, calibrate, heldout_samples
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.loss import heldout_distance
from ttr_distill.training.recorder import CaptureRecorder
from ttr_distill.training.update import UpdateConfig

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
BankMaker = Callable[..., StudentBank]
DistillerMaker = Callable[..., Distiller]
LAYERS = tuple(LayerKey("single", index) for index in range(2))


@pytest.fixture
def recording(tmp_path: Path, make_call: CallMaker, native: Native, bank_of: BankMaker) -> Captures:
    writer = CaptureWriter(tmp_path, {}, shard_bytes=400_000)
    recorder = CaptureRecorder(bank_of("hkr", LAYERS), writer.take, CaptureConfig(64, 8), seed=1, heldout_period=4)
    for run in range(3):
        with torch.inference_mode():
            recorder.begin_run()
            for step in range(4):
                for layer in LAYERS:
                    recorder(make_call(10 * run + step, layer=layer, step=StepContext(1 - step / 4)), native)
            recorder.end_run()
        writer.end_run()
    writer.flush()
    return Captures(tmp_path)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_many_epochs_learn_what_calls_never_seen_confirm(
    recording: Captures, make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
    distiller = distiller_of("hkr", LAYERS, update=UpdateConfig(learning_rate=3e-3))
    calibrate(distiller, recording, CalibrateConfig(6, 32))
    assert (distiller.runs, distiller.updates) == (6, 6 * 2 * 9)
    for layer in LAYERS:
        call = make_call(777, layer=layer, step=StepContext(0.5))
        fresh = distiller_of("hkr", LAYERS).bank
        learned, before = (
            heldout_distance(StudentBackend(bank)(call), native(call))[0] for bank in (distiller.bank, fresh)
        )
        assert learned < 0.8 * before
        rows = [row for row in distiller.metrics if row["layer"] == str(layer)]
        assert [row["run"] for row in rows] == list(range(1, 7))
        assert float(rows[-1]["heldout_cosine"] or 0) < 0.9 * float(rows[0]["heldout_cosine"] or 0)
        assert distiller.readiness[layer].updates == 6 * len(list(heldout_samples(recording, layer))) == 6 * 3


@pytest.mark.parametrize(
    "settings", [{}, {"update": UpdateConfig(average_decay=0.9, schedule="cosine", schedule_updates=20)}]
)
def test_equal_recordings_give_equal_students_and_an_interrupted_one_goes_on(
    recording: Captures, distiller_of: DistillerMaker, settings: dict[str, UpdateConfig]
) -> None:
    whole, twin = distiller_of("hkr", LAYERS[:1], **settings), distiller_of("hkr", LAYERS[:1], **settings)
    for distiller in (whole, twin):
        calibrate(distiller, recording, CalibrateConfig(3, 16))
    assert_equal(whole.bank.state_dict(), twin.bank.state_dict())
    half = distiller_of("hkr", LAYERS[:1], **settings)
    calibrate(half, recording, CalibrateConfig(1, 16))
    resumed = distiller_of("hkr", LAYERS[:1], seed=None, **settings)
    resumed.bank.load_state_dict(half.bank.state_dict())
    resumed.readiness.load_state_dict(half.readiness.state_dict())
    resumed.load_state_dict(half.state_dict(include_replay=False))
    seen: list[int] = []
    calibrate(resumed, recording, CalibrateConfig(3, 16), on_epoch=seen.append)
    assert seen == [2, 3]
    assert_equal(whole.bank.state_dict(), resumed.bank.state_dict())
    assert whole.state_dict().facts == resumed.state_dict().facts
    assert list(whole.metrics)[1:] == list(resumed.metrics)
    other = distiller_of("hkr", LAYERS[:1], seed=50, **settings)
    other.bank.load_state_dict(half.bank.state_dict())
    other.load_state_dict(half.state_dict(include_replay=False))
    calibrate(other, recording, CalibrateConfig(3, 16))
    assert other.updates == whole.updates
    assert not torch.equal(other.bank[LAYERS[0]].alpha, whole.bank[LAYERS[0]].alpha), "it draws by its own seed"


def test_each_update_draws_its_queries_and_each_epoch_its_order(
    recording: Captures, distiller_of: DistillerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = distiller_of("hkr", LAYERS[:1])
    seen: list[tuple[float, tuple[int, ...]]] = []

    def study(sample: object) -> None:
        if sample.trainable:  # type: ignore[attr-defined]
            sigma = sample.step.sigma  # type: ignore[attr-defined]
            seen.append((sigma, tuple(sample.train.positions.tolist())))  # type: ignore[attr-defined]

    monkeypatch.setattr(distiller, "study", study)
    calibrate(distiller, recording, CalibrateConfig(2, 16))
    first, second = seen[:9], seen[9:]
    assert {len(positions) for _, positions in seen} == {16}
    assert len({positions for _, positions in seen}) == 18
    assert [sigma for sigma, _ in first] != [sigma for sigma, _ in second]
    assert sorted(sigma for sigma, _ in first) == sorted(sigma for sigma, _ in second)


def test_what_is_missing_or_wrong_is_said(recording: Captures, distiller_of: DistillerMaker) -> None:
    with pytest.raises(ValueError, match="the recording has no calls of layer single:2"):
        calibrate(distiller_of("hkr"), recording)
    for bad in ({"epochs": 0}, {"queries_per_update": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            CalibrateConfig(**bad)


def test_layers_without_held_out_steps_are_judged_on_held_out_queries(
    recording: Captures, distiller_of: DistillerMaker
) -> None:
    class NothingHeldOut:
        layers: Sequence[LayerKey] = LAYERS
        load = staticmethod(recording.load)

        def trainable(self, layer: LayerKey) -> Sequence[int]:
            return [0, 1]

        def heldout(self, layer: LayerKey) -> Sequence[int]:
            return []

    distiller = distiller_of("hkr", LAYERS)
    calibrate(distiller, NothingHeldOut(), CalibrateConfig(1))
    assert (distiller.updates, distiller.readiness[LAYERS[0]].updates) == (4, 2)
