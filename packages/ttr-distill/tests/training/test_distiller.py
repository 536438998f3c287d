from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, AttentionHandler, LayerKey, StepContext
from torch import Tensor
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import Distiller
from ttr_distill.training.loss import heldout_distance
from ttr_distill.training.update import UpdateConfig

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
BankMaker = Callable[..., StudentBank]
DistillerMaker = Callable[..., Distiller]
Runner = Callable[..., list[Tensor]]
LAYERS = tuple(LayerKey("single", index) for index in range(3))
QUICK = CaptureConfig(query_cap=16, heldout_cap=8)


def weights(distiller: Distiller) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.bank.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_student_learns_inside_inference_mode_what_the_mean_of_v_cannot(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    """Held-out distance on calls never seen before they are measured: from the mean of v to a third of it."""
    layer = LAYERS[:1]
    config = {"capture": CaptureConfig(), "update": UpdateConfig(learning_rate=2e-3), "train_steps_per_call": 2}
    distiller = distiller_of("hkr", layer, **config)
    assert isinstance(distiller, AttentionHandler)
    for run in range(75):
        sampling_run(distiller, run, layer, steps=1)
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


def test_the_teacher_is_returned_bit_for_bit_and_the_host_is_not_touched(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
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
def test_two_runs_with_one_seed_give_one_student(name: str, distiller_of: DistillerMaker, sampling_run: Runner) -> None:
    ends = []
    for seed in (1, 1, 2):
        distiller = distiller_of(name, seed=seed, min_swap_layers=1)
        for run in range(3):
            torch.rand(5)  # the global stream does not matter
            sampling_run(distiller, run, LAYERS)
        distiller.raise_pending()
        ends.append(weights(distiller))
    assert_equal(ends[0], ends[1])
    assert any(not torch.equal(ends[0][key], ends[2][key]) for key in ends[0])


@pytest.mark.parametrize(("least", "most"), [(0, 0), (1, 1), (2, 3), (0, 3), (5, None), (1, 2)])
def test_layers_are_drawn_for_every_step(
    least: int, most: int | None, distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of(min_swap_layers=least, max_swap_layers=most)
    counts = []
    for run in range(12):
        before = {layer: distiller._layers[layer].updates if layer in distiller._layers else 0 for layer in LAYERS}
        sampling_run(distiller, run, LAYERS, steps=1)
        after = {layer: distiller._layers[layer].updates if layer in distiller._layers else 0 for layer in LAYERS}
        counts.append(tuple(after[layer] - before[layer] for layer in LAYERS))
    distiller.raise_pending()
    numbers = {sum(count) for count in counts}
    top = 3 if most is None else most
    assert numbers == set(range(min(least, top), top + 1))
    if 0 < top < 3:
        assert all(any(count[index] for count in counts) for index in range(3)), "every layer gets its turn"


def test_one_draw_serves_all_calls_of_a_step(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
    """The layers of a step are drawn at its first call, also where the host does not name its steps."""
    for step in (StepContext(0.5), None):
        distiller = distiller_of(min_swap_layers=1, max_swap_layers=1)
        for _ in range(5):
            before = distiller.updates
            distiller.begin_run()
            for layer in LAYERS:
                distiller(make_call(0, layer=layer, step=step), native)
            assert distiller.updates == before + 1


def test_100_updates_equal_twice_50_with_a_save_between(
    distiller_of: DistillerMaker, bank_of: BankMaker, sampling_run: Runner
) -> None:
    layer = LAYERS[:1]
    config = {"train_steps_per_call": 5, "capture": replace(QUICK, query_cap=8)}
    whole = distiller_of("hkr", layer, **config)
    for run in range(20):
        sampling_run(whole, run, layer, steps=1)
    half = distiller_of("hkr", layer, **config)
    for run in range(10):
        sampling_run(half, run, layer, steps=1)
    state = half.state_dict()
    resumed = Distiller(bank_of("hkr", layer, seed=99), ReadinessTracker(), half.config)
    resumed.bank.load_state_dict(weights(half))
    resumed.readiness.load_state_dict(half.readiness.state_dict())
    resumed.load_state_dict(state)
    for run in range(10, 20):
        sampling_run(resumed, run, layer, steps=1)
    assert (whole.updates, resumed.updates, half.updates) == (100, 100, 50)
    assert_equal(weights(whole), weights(resumed))
    left, right = whole.state_dict(), resumed.state_dict()
    assert_equal(left.tensors, right.tensors)
    assert left.facts == right.facts
    assert whole.readiness.state_dict() == resumed.readiness.state_dict()
    assert list(whole.metrics)[10:] == list(resumed.metrics)


def test_settings_of_the_resuming_distiller_hold(distiller_of: DistillerMaker, sampling_run: Runner) -> None:
    first = distiller_of("near_far")
    sampling_run(first, 0, LAYERS)
    second = distiller_of("near_far", update=UpdateConfig(learning_rate=0.5))
    second.load_state_dict(first.state_dict())
    rates = {group["lr"] for state in second._layers.values() for group in state.optimizer.param_groups}
    assert rates == {0.5}
    assert second.updates == first.updates > 0


def test_a_state_without_replay_loads_and_a_wrong_one_is_refused(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    first = distiller_of("near_far")
    sampling_run(first, 0, LAYERS)
    state = first.state_dict(include_replay=False)
    assert not any(name.startswith("replay/") for name in state.tensors)
    second = distiller_of("near_far")
    second.load_state_dict(state)
    assert second.replay.nbytes == 0
    for broken, message in (
        (state._replace(tensors=state.tensors | {"optim/odd": torch.zeros(1)}), "tensors of no layer: optim/odd"),
        (state._replace(facts=state.facts | {"runs": "x"}), "'runs' must be a whole number"),
        (state._replace(tensors={}), "lacks the random stream"),
    ):
        with pytest.raises(ValueError, match=message):
            distiller_of("near_far").load_state_dict(broken)
    with pytest.raises(ValueError, match="which the bank lacks"):
        distiller_of("near_far", LAYERS[:1]).load_state_dict(state)


def test_held_out_measurements_reach_readiness_once_a_run(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker
) -> None:
    distiller = distiller_of()
    with torch.inference_mode():
        distiller.begin_run()
        distiller(make_call(0, layer=LAYERS[0]), native)
        assert distiller.readiness[LAYERS[0]].ema_cosine is None
        distiller.end_run()
    row = distiller.metrics[-1]
    assert row["heldout_cosine"] == distiller.readiness[LAYERS[0]].ema_cosine
    assert {"run": 1, "layer": "single:0", "updates": 1, "level": "unready"}.items() <= row.items()


def test_training_ends_after_the_maximum_of_updates(distiller_of: DistillerMaker, sampling_run: Runner) -> None:
    distiller = distiller_of(maximum_updates=7, train_steps_per_call=2)
    for run in range(4):
        sampling_run(distiller, run, LAYERS)
    assert distiller.updates == 7
    assert not distiller.learning


def test_finish_keeps_the_better_corrections_by_held_out_distance(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker, bank_of: BankMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of("near_far", LAYERS[:2], update=UpdateConfig(learning_rate=3e-3), train_steps_per_call=4)
    for run in range(20):
        sampling_run(distiller, run, LAYERS[:2], steps=1)
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


def test_finish_leaves_students_without_a_training_free_form_alone(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of("hkr", LAYERS[:1])
    sampling_run(distiller, 0, LAYERS[:1])
    before = weights(distiller)
    assert distiller.finish() == {}
    assert_equal(before, weights(distiller))


def test_held_out_steps_are_measured_and_never_trained_on(distiller_of: DistillerMaker, sampling_run: Runner) -> None:
    """One step of every four after the first four, which one is drawn."""
    places = []
    for seed in range(6):
        distiller = distiller_of(heldout_period=4, seed=seed)
        sampling_run(distiller, 0, LAYERS, steps=4)
        assert all(sample.trainable for sample in distiller.replay.samples())
        sampling_run(distiller, 1, LAYERS, steps=8)
        distiller.raise_pending()
        for layer in LAYERS:
            state = distiller.layer_training(layer)
            assert (state.updates, state.held_back, distiller.readiness[layer].updates) == (10, 2, 12)
            held = [n for n, sample in enumerate(distiller.replay.samples(layer)) if not sample.trainable]
            assert [n // 4 for n in held] == [1, 2]
            drawn = [distiller.replay.draw(layer, state.generators["replay"]) for _ in range(100)]
            assert all(sample is not None and sample.trainable for sample in drawn)
            places.append(tuple(held))
        assert len({tuple(places[-3:])}) == 1
        assert distiller.metrics[-1]["held_back"] == 2
    assert len(set(places)) > 1


def test_a_state_taken_before_a_held_out_step_holds_out_the_same_one(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    config = {"heldout_period": 4, "min_swap_layers": 1}
    whole, half = distiller_of(**config), distiller_of(**config)
    for run in range(4):
        sampling_run(whole, run, LAYERS, steps=3)
        if run < 2:
            sampling_run(half, run, LAYERS, steps=3)
    resumed = distiller_of(seed=None, **config)
    resumed.bank.load_state_dict(half.bank.state_dict())
    resumed.load_state_dict(half.state_dict())
    for run in (2, 3):
        sampling_run(resumed, run, LAYERS, steps=3)
    assert resumed.state_dict().facts == whole.state_dict().facts
    assert_equal(weights(whole), weights(resumed))


def test_the_budget_of_one_call_serves_several_sets_of_queries(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    distiller = distiller_of(layers=LAYERS[:1], capture=replace(QUICK, query_draws=3))
    sampling_run(distiller, 0, LAYERS[:1], steps=1)
    distiller.raise_pending()
    first, second, third = distiller.replay.samples()
    assert first.k is second.k is third.k
    assert first.heldout is third.heldout
    assert not torch.equal(first.train.positions, second.train.positions)
    assert distiller.replay.nbytes < 1.5 * first.nbytes < sum(one.nbytes for one in (first, second, third))
    state = distiller.state_dict()
    assert sum(name.endswith(".k") for name in state.tensors) == 1
    again = distiller_of(layers=LAYERS[:1])
    again.load_state_dict(state)
    assert again.replay.nbytes == distiller.replay.nbytes
    assert again.replay.samples()[0].k is again.replay.samples()[2].k
    broken = {name: value for name, value in state.tensors.items() if not name.endswith("0.k")}
    with pytest.raises(ValueError, match=r"replay sample 1 shares k with 0.k, which the state lacks"):
        distiller_of(layers=LAYERS[:1]).load_state_dict(state._replace(tensors=broken))


def test_what_a_layer_learns_does_not_depend_on_the_others(distiller_of: DistillerMaker, sampling_run: Runner) -> None:
    together, alone = distiller_of(heldout_period=3), distiller_of(layers=LAYERS[1:2], heldout_period=3)
    for run in range(3):
        sampling_run(together, run, LAYERS)
        sampling_run(alone, run, LAYERS[1:2])
    theirs, own = together.bank[LAYERS[1]].state_dict(), alone.bank[LAYERS[1]].state_dict()
    assert_equal(theirs, own)
    assert together.readiness[LAYERS[1]] == alone.readiness[LAYERS[1]]


def test_a_worker_draws_other_queries_and_holds_out_the_same(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    first, second = distiller_of(worker=0), distiller_of(worker=1)
    for distiller in (first, second):
        sampling_run(distiller, 0, LAYERS)
    pairs = list(zip(first.replay.samples(), second.replay.samples(), strict=True))
    assert any(not torch.equal(a.train.positions, b.train.positions) for a, b in pairs)
    held = [{p for sample in d.replay.samples() for p in sample.heldout.positions.tolist()} for d in (first, second)]
    trained = {p for d in (first, second) for sample in d.replay.samples() for p in sample.train.positions.tolist()}
    assert trained.isdisjoint(held[0] | held[1])


def test_an_average_of_the_weights_is_what_serves_is_measured_and_resumes(
    distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    layer = LAYERS[:1]
    plain, config = UpdateConfig(learning_rate=1e-2), UpdateConfig(learning_rate=1e-2, average_decay=0.9)
    live, averaged = distiller_of("hkr", layer, update=plain), distiller_of("hkr", layer, update=config)
    expected: dict[str, Tensor] = {}
    for run in range(6):
        for distiller in (live, averaged):
            sampling_run(distiller, run, layer, steps=1)
        decay = min(0.9, (run + 1) / (run + 11))
        now = {name: value.double() for name, value in weights(live).items()}
        start = expected or {name: value.double() for name, value in weights(distiller_of("hkr", layer)).items()}
        expected = {name: start[name].lerp(value, 1 - decay) for name, value in now.items()}
    state = averaged.layer_training(layer[0])
    assert state.learner is not averaged.bank[layer[0]]
    for name, value in state.learner.state_dict().items():
        assert torch.equal(value, live.bank[layer[0]].state_dict()[name]), "the learner learns as without an average"
    for name, value in weights(averaged).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    resumed = distiller_of("hkr", layer, update=config, seed=None)
    resumed.bank.load_state_dict(weights(averaged))
    resumed.load_state_dict(averaged.state_dict())
    for distiller in (averaged, resumed):
        sampling_run(distiller, 7, layer)
    assert_equal(weights(averaged), weights(resumed))
    assert_equal(averaged.state_dict().tensors, resumed.state_dict().tensors)


def test_captured_samples_can_be_studied_later(
    make_call: CallMaker, native: Native, distiller_of: DistillerMaker, sampling_run: Runner
) -> None:
    source = distiller_of(heldout_period=2)
    sampling_run(source, 0, LAYERS, steps=6)
    samples = source.replay.samples(LAYERS[0])
    assert {sample.trainable for sample in samples} == {True, False}
    distiller = distiller_of()
    distiller.begin_run()
    for sample in samples:
        distiller.study(sample)
    distiller.end_run()
    distiller.raise_pending()
    trainable = sum(sample.trainable for sample in samples)
    state = distiller.layer_training(LAYERS[0])
    assert (state.updates, state.held_back) == (trainable, len(samples) - trainable)
    assert distiller.readiness[LAYERS[0]].updates == len(samples) - trainable
    assert distiller.finish(lambda layer: source.replay.samples(layer)).keys() == set(LAYERS)
