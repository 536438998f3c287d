import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.metrics import MetricValue
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller
from ttr_distill.training.layer import LayerTraining
from ttr_distill.training.memory import MemoryLadder
from ttr_distill.training.replay import ReplaySample

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
BankMaker = Callable[..., StudentBank]
DistillerMaker = Callable[..., Distiller]
Runner = Callable[..., list[Tensor]]
LAYERS = tuple(LayerKey("single", index) for index in range(3))
QUICK = CaptureConfig(query_cap=16, heldout_cap=8)


def test_unready_students_never_serve_and_ready_ones_do_in_a_preview(
    make_call: CallMaker, native: Native, bank_of: BankMaker, sampling_run: Runner
) -> None:
    layer = LAYERS[:1]
    for threshold, preview, served in ((1e-9, True, False), (0.5, True, True), (0.5, False, False)):
        readiness = ReadinessTracker(ReadinessConfig(threshold, 0.9, minimum_updates=3))
        config = DistillConfig(capture=QUICK, preview=preview)
        distiller = Distiller(bank_of("near_far", layer), readiness, config, seed=0)
        by_student = []
        for run in range(5):
            call = make_call(run, layer=layer[0])
            for output in sampling_run(distiller, run, layer, steps=1, call=call):
                by_student.append(not torch.equal(output, native(call)))
        distiller.raise_pending()
        # The third measurement makes it ready, at the end of its run.
        assert by_student == [False, False, False, served, served]


def test_rows_reach_the_sinks_and_a_full_disk_waits_for_the_image(bank_of: BankMaker, sampling_run: Runner) -> None:
    class List:
        def __init__(self) -> None:
            self.rows: list[Mapping[str, MetricValue]] = []

        def write(self, row: Mapping[str, MetricValue]) -> None:
            self.rows.append(row)

    class Full:
        def write(self, row: Mapping[str, MetricValue]) -> None:
            raise OSError(28, "No space left on device")

    rows = List()
    distiller = Distiller(bank_of("near_far"), ReadinessTracker(), DistillConfig(capture=QUICK), sinks=(rows, Full()))
    outputs = sampling_run(distiller, 0, LAYERS)
    assert len(outputs) == 6
    assert rows.rows == list(distiller.metrics) != []
    drawn = {row["layers_swapped"] for row in rows.rows}
    assert len(drawn) == 1, "what was drawn for the last step"
    assert drawn <= {1, 2, 3}
    assert {row["layers_total"] for row in rows.rows} == {3}
    with pytest.raises(OSError, match="No space left"):
        distiller.raise_pending()
    distiller.raise_pending()


def test_calls_no_student_can_answer_get_the_teacher_and_are_counted(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
    distiller = distiller_of(layers=LAYERS[:1])
    for call in (make_call(0, layer=None), make_call(0, layer=LAYERS[1]), replace(make_call(0), layout=None)):
        assert torch.equal(distiller(call, native), native(call))
    assert distiller.declined == {
        "the host does not name its layers": 1,
        "no student for this layer": 1,
        "the host does not say where text and image tokens lie": 1,
    }
    assert distiller.updates == 0


def test_a_training_error_never_costs_the_image(
    monkeypatch: pytest.MonkeyPatch, distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of()

    def broken(*_: object, **__: object) -> None:
        raise KeyError("student broken on purpose")

    monkeypatch.setattr("ttr_distill.training.layer.update_student", broken)
    outputs = sampling_run(distiller, 0, LAYERS)
    assert len(outputs) == 6
    assert not distiller.learning
    with pytest.raises(KeyError, match="broken on purpose"):
        distiller.raise_pending()


def test_an_error_or_interrupt_of_the_host_passes(make_call: CallMaker, distiller_of: DistillerMaker) -> None:
    def interrupted(_: AttentionCall) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller_of()(make_call(0), interrupted)


def test_a_sample_larger_than_the_budget_says_which_budget_to_set(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of(replay_bytes=1000)
    sampling_run(distiller, 0, LAYERS)
    with pytest.raises(ValueError, match=r"the budget is 1000; set replay_bytes to at least \d+"):
        distiller.raise_pending()


def exhausted(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_layer_without_memory_steps_down_to_the_teacher_and_says_each_rung_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    distiller_of: DistillerMaker,
    sampling_run: Runner,
) -> None:
    distiller = distiller_of()
    work = LayerTraining.update
    attempts: list[int] = []

    def fails_in_layer_1(state: LayerTraining, sample: ReplaySample) -> None:
        if state.layer == LAYERS[1]:
            attempts.append(state.ladder.rung)
            exhausted()
        work(state, sample)

    monkeypatch.setattr(LayerTraining, "update", fails_in_layer_1)
    for run in range(2):
        assert len(sampling_run(distiller, run, LAYERS, steps=7)) == 21
    distiller.raise_pending()
    assert distiller.learning
    rungs = [distiller.layer_training(layer).ladder.rung for layer in LAYERS]
    assert rungs == [0, MemoryLadder.OFF, 0], "a layer's memory is its own"
    assert attempts == [0, 1, 2, 3, 4] * 2, "at the last rung nothing is tried until the next run"
    assert [distiller.layer_training(layer).updates for layer in LAYERS] == [14, 0, 14]
    assert [record.message.removeprefix("out of memory while training layer ") for record in caplog.records] == [
        "single:1: training on a quarter of the queries",
        "single:1: training on one batch row and 32 queries at a time",
        "single:1: training with fewer landmarks",
        "single:1: training on the newest sample alone",
        "single:1: training is off, the teacher answers",
    ]


def test_the_next_run_begins_as_configured_and_all_layers_off_is_training_off(
    monkeypatch: pytest.MonkeyPatch, distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of(layers=LAYERS[:1])
    with monkeypatch.context() as broken:
        broken.setattr("ttr_distill.training.layer.update_student", exhausted)
        sampling_run(distiller, 0, LAYERS[:1], steps=6)
        assert not distiller.learning
    sampling_run(distiller, 1, LAYERS[:1])
    assert distiller.learning
    assert distiller.updates == 2


def test_training_goes_on_one_rung_lower(make_call: CallMaker, native: Native, distiller_of: DistillerMaker) -> None:
    distiller = distiller_of("hkr", LAYERS[:1], capture=CaptureConfig(query_cap=80))
    state = distiller.layer_training(LAYERS[0])
    for rung in (2, 3, 4):
        state.ladder.rung = rung
        distiller(make_call(0, batch=2), native)
    distiller.raise_pending()
    assert distiller.updates == 3
    (sample,) = distiller.replay.samples()
    assert sample.train.positions.numel() == 32


def test_calls_with_numbers_that_are_not_finite_are_refused_and_counted(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
    distiller = distiller_of(layers=LAYERS[:1])
    call = make_call(0)
    call.v[0, 0, 5, 5] = math.inf
    distiller(call, native)
    assert distiller.updates == 0
    assert distiller.layer_training(LAYERS[0]).refused == 1
    assert distiller.replay.nbytes == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"replay_bytes": 0},
        {"train_steps_per_call": -1},
        {"max_swap_layers": 0},
        {"maximum_updates": -1},
        {"heldout_period": -1},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"got|below|negative"):
        DistillConfig(**bad)  # type: ignore[arg-type]


def test_parameters_made_in_inference_mode_are_named(make_call: CallMaker, native: Native, bank_of: BankMaker) -> None:
    bank = bank_of("near_far", LAYERS[:1])
    with torch.inference_mode():
        bank[LAYERS[0]].register_parameter("bias", torch.nn.Parameter(torch.zeros(2)))
    distiller = Distiller(bank, ReadinessTracker())
    distiller(make_call(0), native)
    with pytest.raises(ValueError, match=r"bias of layer single:0 was made in inference mode"):
        distiller.raise_pending()
