import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey, StepContext
from torch import Tensor
from ttr_distill.metrics import MetricValue
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller
from ttr_distill.training.loss import heldout_distance
from ttr_distill.training.update import UpdateConfig

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(3))
QUICK = CaptureConfig(query_cap=16, heldout_cap=8)


def bank_of(name: str, layers: tuple[LayerKey, ...] = LAYERS, seed: int = 0) -> StudentBank:
    settings = {"landmark_minimum": 8} if name == "hkr" else {"tile": 4, "top_k": 2}
    return StudentBank.for_layers(preset(name, **settings), layers, 2, 16, seed=seed)


def distiller_of(
    name: str = "near_far", layers: tuple[LayerKey, ...] = LAYERS, *, seed: int = 1, **config: object
) -> Distiller:
    settings = DistillConfig(**{"capture": QUICK, "min_swap_layers": len(layers), **config})  # type: ignore[arg-type]
    return Distiller(bank_of(name, layers), ReadinessTracker(), settings, seed=seed)


def sampling_run(
    distiller: Distiller, make_call: CallMaker, native: Native, run: int, layers: tuple[LayerKey, ...], steps: int = 2
) -> list[Tensor]:
    """One run of a host: every layer in every step, in inference mode."""
    outputs = []
    with torch.inference_mode():
        distiller.begin_run()
        try:
            for step in range(steps):
                for layer in layers:
                    seed = 1000 * run + 10 * step
                    call = make_call(seed, layer=layer, step=StepContext(1.0 - step / steps, 3.0))
                    outputs.append(distiller(call, native))
        finally:
            distiller.end_run()
    return outputs


def weights(distiller: Distiller) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.bank.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_student_learns_inside_inference_mode_what_the_mean_of_v_cannot(make_call: CallMaker, native: Native) -> None:
    """Held-out distance on calls never seen before they are measured: from the mean of v to a third of it."""
    layer = LAYERS[:1]
    config = {"capture": CaptureConfig(), "update": UpdateConfig(learning_rate=2e-3), "train_steps_per_call": 2}
    distiller = distiller_of("hkr", layer, **config)
    assert isinstance(distiller, AttentionHandler)
    for run in range(75):
        sampling_run(distiller, make_call, native, run, layer, steps=1)
    distiller.raise_pending()
    rows = list(distiller.metrics)
    first, last = (
        sum(float(row["heldout_cosine"] or 0) for row in part) / len(part) for part in (rows[:2], rows[-15:])
    )
    loss = [sum(float(row["huber"] or 0) for row in part) / len(part) for part in (rows[:2], rows[-15:])]
    call = make_call(999_999)
    teacher = native(call)
    mean_of_v = call.v.mean(dim=2, keepdim=True).expand_as(teacher)
    trivial, _ = heldout_distance(mean_of_v, teacher)
    served, _ = heldout_distance(StudentBackend(distiller.bank)(call), teacher)
    assert first > 0.8 * trivial
    assert last < first / 2.5
    assert loss[1] < loss[0] / 1.25
    assert served < trivial / 2.5
    assert distiller.updates == 150


def test_the_teacher_is_returned_bit_for_bit_and_the_host_is_not_touched(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of()
    call = make_call(0, layer=LAYERS[0])
    before = [tensor.clone() for tensor in (call.q, call.k, call.v)]
    teacher = native(call)
    answer = distiller(call, lambda _: teacher)
    assert answer is teacher
    assert torch.equal(teacher, native(call))
    assert distiller.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, (call.q, call.k, call.v), strict=True))


@pytest.mark.parametrize("name", ["hkr", "near_far"])
def test_two_runs_with_one_seed_give_one_student(make_call: CallMaker, native: Native, name: str) -> None:
    ends = []
    for seed in (1, 1, 2):
        distiller = distiller_of(name, seed=seed, min_swap_layers=1)
        for run in range(3):
            torch.rand(5)  # the global stream does not matter
            sampling_run(distiller, make_call, native, run, LAYERS)
        distiller.raise_pending()
        ends.append(weights(distiller))
    assert_equal(ends[0], ends[1])
    assert any(not torch.equal(ends[0][key], ends[2][key]) for key in ends[0])


@pytest.mark.parametrize(("least", "most"), [(0, 0), (1, 1), (2, 3), (0, 3), (5, None), (1, 2)])
def test_layers_are_drawn_for_every_step(make_call: CallMaker, native: Native, least: int, most: int | None) -> None:
    distiller = distiller_of(min_swap_layers=least, max_swap_layers=most)
    counts = []
    for run in range(12):
        before = {layer: distiller._layers[layer].updates if layer in distiller._layers else 0 for layer in LAYERS}
        sampling_run(distiller, make_call, native, run, LAYERS, steps=1)
        after = {layer: distiller._layers[layer].updates if layer in distiller._layers else 0 for layer in LAYERS}
        counts.append(tuple(after[layer] - before[layer] for layer in LAYERS))
    distiller.raise_pending()
    numbers = {sum(count) for count in counts}
    top = 3 if most is None else most
    assert numbers == set(range(min(least, top), top + 1))
    if 0 < top < 3:
        assert all(any(count[index] for count in counts) for index in range(3)), "every layer gets its turn"


def test_one_draw_serves_all_calls_of_a_step(make_call: CallMaker, native: Native) -> None:
    """The layers of a step are drawn at its first call, also where the host does not name its steps."""
    for step in (StepContext(0.5), None):
        distiller = distiller_of(min_swap_layers=1, max_swap_layers=1)
        for _ in range(5):
            before = distiller.updates
            distiller.begin_run()
            for layer in LAYERS:
                distiller(make_call(0, layer=layer, step=step), native)
            assert distiller.updates == before + 1


def test_100_updates_equal_twice_50_with_a_save_between(make_call: CallMaker, native: Native) -> None:
    layer = LAYERS[:1]
    config = {"train_steps_per_call": 5, "capture": replace(QUICK, query_cap=8)}
    whole = distiller_of("hkr", layer, **config)
    for run in range(20):
        sampling_run(whole, make_call, native, run, layer, steps=1)
    half = distiller_of("hkr", layer, **config)
    for run in range(10):
        sampling_run(half, make_call, native, run, layer, steps=1)
    state = half.state_dict()
    resumed = Distiller(bank_of("hkr", layer, seed=99), ReadinessTracker(), half.config, seed=77)
    resumed.bank.load_state_dict(weights(half))
    resumed.readiness.load_state_dict(half.readiness.state_dict())
    resumed.load_state_dict(state)
    for run in range(10, 20):
        sampling_run(resumed, make_call, native, run, layer, steps=1)
    assert (whole.updates, resumed.updates, half.updates) == (100, 100, 50)
    assert_equal(weights(whole), weights(resumed))
    left, right = whole.state_dict(), resumed.state_dict()
    assert_equal(left.tensors, right.tensors)
    assert left.facts == right.facts
    assert whole.readiness.state_dict() == resumed.readiness.state_dict()
    assert list(whole.metrics)[10:] == list(resumed.metrics)


def test_settings_of_the_resuming_distiller_hold(make_call: CallMaker, native: Native) -> None:
    first = distiller_of("near_far")
    sampling_run(first, make_call, native, 0, LAYERS)
    second = distiller_of("near_far", update=UpdateConfig(learning_rate=0.5))
    second.load_state_dict(first.state_dict())
    rates = {group["lr"] for state in second._layers.values() for group in state.optimizer.param_groups}
    assert rates == {0.5}
    assert second.updates == first.updates > 0


def test_a_state_without_replay_loads_and_a_wrong_one_is_refused(make_call: CallMaker, native: Native) -> None:
    first = distiller_of("near_far")
    sampling_run(first, make_call, native, 0, LAYERS)
    state = first.state_dict(include_replay=False)
    assert not any(name.startswith("replay/") for name in state.tensors)
    second = distiller_of("near_far")
    second.load_state_dict(state)
    assert second.replay.nbytes == 0
    for broken, message in (
        (state._replace(tensors=state.tensors | {"optim/odd": torch.zeros(1)}), "tensors of no layer: optim/odd"),
        (state._replace(facts=state.facts | {"rung": "x"}), "'rung' must be a whole number"),
        (state._replace(tensors={}), "lacks the random stream"),
    ):
        with pytest.raises(ValueError, match=message):
            distiller_of("near_far").load_state_dict(broken)
    with pytest.raises(ValueError, match="which the bank lacks"):
        distiller_of("near_far", LAYERS[:1]).load_state_dict(state)


def test_unready_students_never_serve_and_ready_ones_do_in_a_preview(make_call: CallMaker, native: Native) -> None:
    layer = LAYERS[:1]
    for threshold, preview, served in ((1e-9, True, False), (0.5, True, True), (0.5, False, False)):
        readiness = ReadinessTracker(ReadinessConfig(threshold, 0.9, minimum_updates=3))
        config = DistillConfig(capture=QUICK, preview=preview)
        distiller = Distiller(bank_of("near_far", layer), readiness, config, seed=0)
        by_student = []
        for run in range(5):
            call = make_call(run, layer=layer[0])
            for output in sampling_run(distiller, lambda *_, call=call, **__: call, native, run, layer, steps=1):
                by_student.append(not torch.equal(output, native(call)))
        distiller.raise_pending()
        # The third measurement makes it ready, at the end of its run.
        assert by_student == [False, False, False, served, served]


def test_held_out_measurements_reach_readiness_once_a_run(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of()
    with torch.inference_mode():
        distiller.begin_run()
        distiller(make_call(0, layer=LAYERS[0]), native)
        assert distiller.readiness[LAYERS[0]].ema_cosine is None
        distiller.end_run()
    row = distiller.metrics[-1]
    assert row["heldout_cosine"] == distiller.readiness[LAYERS[0]].ema_cosine
    assert {"run": 1, "layer": "single:0", "updates": 1, "level": "unready"}.items() <= row.items()


def test_rows_reach_the_sinks_and_a_full_disk_waits_for_the_image(make_call: CallMaker, native: Native) -> None:
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
    outputs = sampling_run(distiller, make_call, native, 0, LAYERS)
    assert len(outputs) == 6
    assert rows.rows == list(distiller.metrics) != []
    with pytest.raises(OSError, match="No space left"):
        distiller.raise_pending()
    distiller.raise_pending()


def test_calls_no_student_can_answer_get_the_teacher_and_are_counted(make_call: CallMaker, native: Native) -> None:
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
    make_call: CallMaker, native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = distiller_of()

    def broken(*_: object, **__: object) -> None:
        raise KeyError("student broken on purpose")

    monkeypatch.setattr("ttr_distill.training.distiller.update_student", broken)
    outputs = sampling_run(distiller, make_call, native, 0, LAYERS)
    assert len(outputs) == 6
    assert not distiller.learning
    with pytest.raises(KeyError, match="broken on purpose"):
        distiller.raise_pending()


def test_an_error_or_interrupt_of_the_host_passes(make_call: CallMaker) -> None:
    def interrupted(_: AttentionCall) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distiller_of()(make_call(0), interrupted)


def test_a_sample_larger_than_the_budget_says_which_budget_to_set(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of(replay_bytes=1000)
    sampling_run(distiller, make_call, native, 0, LAYERS)
    with pytest.raises(ValueError, match=r"the budget is 1000; set replay_bytes to at least \d+"):
        distiller.raise_pending()


def test_running_out_of_memory_steps_down_to_the_teacher_and_says_each_rung_once(
    make_call: CallMaker, native: Native, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distiller = distiller_of()

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ttr_distill.training.distiller.update_student", exhausted)
    for run in range(3):
        assert len(sampling_run(distiller, make_call, native, run, LAYERS)) == 6
    assert distiller.ladder.off
    assert not distiller.learning
    distiller.raise_pending()
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "training on a quarter of the queries",
        "training on one batch row at a time",
        "training is off, the teacher answers",
    ]


def test_training_goes_on_one_rung_lower(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of("hkr", LAYERS[:1], capture=CaptureConfig(query_cap=80))
    distiller.ladder.rung = 2
    distiller(make_call(0, batch=2), native)
    distiller.raise_pending()
    assert distiller.updates == 1
    assert distiller.replay.samples()[0].train.positions.numel() == 32


def test_calls_with_numbers_that_are_not_finite_are_refused_and_counted(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of(layers=LAYERS[:1])
    call = make_call(0)
    call.v[0, 0, 5, 5] = math.inf
    distiller(call, native)
    assert distiller.updates == 0
    assert distiller._layers[LAYERS[0]].refused == 1
    assert distiller.replay.nbytes == 0


def test_training_ends_after_the_maximum_of_updates(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of(maximum_updates=7, train_steps_per_call=2)
    for run in range(4):
        sampling_run(distiller, make_call, native, run, LAYERS)
    assert distiller.updates == 7
    assert not distiller.learning


def test_finish_keeps_the_better_corrections_by_held_out_distance(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of("near_far", LAYERS[:2], update=UpdateConfig(learning_rate=3e-3), train_steps_per_call=4)
    for run in range(20):
        sampling_run(distiller, make_call, native, run, LAYERS[:2], steps=1)
    distiller.raise_pending()
    with torch.no_grad():
        distiller.bank[LAYERS[1]].state_dict()["temperature"].fill_(0.2)
    trained = weights(distiller)
    before = distiller.readiness[LAYERS[1]].ema_cosine
    assert distiller.finish() == {LAYERS[0]: True, LAYERS[1]: False}
    after = weights(distiller)
    assert torch.equal(after["students.single:0.temperature"], trained["students.single:0.temperature"])
    assert after["students.single:1.temperature"].tolist() == [1.0, 1.0]
    assert after["students.single:1.bias"].tolist() == [0.0, 0.0]
    assert distiller.readiness[LAYERS[1]].ema_cosine != before
    # What is kept is no worse on calls that were never seen.
    for layer in LAYERS[:2]:
        fresh = bank_of("near_far")
        pairs = []
        for seed in range(5_000, 5_010):
            call = make_call(seed, layer=layer)
            teacher = native(call)
            pairs.append([heldout_distance(StudentBackend(b)(call), teacher)[0] for b in (distiller.bank, fresh)])
        assert sum(pair[0] for pair in pairs) <= sum(pair[1] for pair in pairs) * 1.001


def test_finish_leaves_students_without_a_training_free_form_alone(make_call: CallMaker, native: Native) -> None:
    distiller = distiller_of("hkr", LAYERS[:1])
    sampling_run(distiller, make_call, native, 0, LAYERS[:1])
    before = weights(distiller)
    assert distiller.finish() == {}
    assert_equal(before, weights(distiller))


@pytest.mark.parametrize(
    "bad", [{"replay_bytes": 0}, {"train_steps_per_call": -1}, {"max_swap_layers": 0}, {"maximum_updates": -1}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"got|below|negative"):
        DistillConfig(**bad)  # type: ignore[arg-type]


def test_parameters_made_in_inference_mode_are_named(make_call: CallMaker, native: Native) -> None:
    bank = bank_of("near_far", LAYERS[:1])
    with torch.inference_mode():
        bank[LAYERS[0]].register_parameter("bias", torch.nn.Parameter(torch.zeros(2)))
    distiller = Distiller(bank, ReadinessTracker())
    distiller(make_call(0), native)
    with pytest.raises(ValueError, match=r"bias of layer single:0 was made in inference mode"):
        distiller.raise_pending()
