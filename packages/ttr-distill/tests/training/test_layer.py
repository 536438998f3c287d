from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.grad import training_mode
from ttr_distill.student.presets import build_student, preset
from ttr_distill.student.readiness import LayerReadiness
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.layer import COUNTERS, LayerTraining
from ttr_distill.training.update import UpdateConfig

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYER = LayerKey("single", 0)


def started(config: UpdateConfig | None = None, *, seed: int = 0, worker: int = 0) -> LayerTraining:
    student = build_student(preset("hkr", landmark_minimum=8), 2, 16, generator=torch.Generator().manual_seed(5))
    with training_mode():
        return LayerTraining.start(LAYER, student, config or UpdateConfig(), seed=seed, worker=worker)


def trained(state: LayerTraining, call: AttentionCall, target: Tensor, updates: int) -> None:
    assert call.layout is not None
    with training_mode():
        for _ in range(updates):
            config = CaptureConfig(16, 8, storage_dtype="float32")
            queries = state.generators["queries"]
            sample = capture(call, target, LAYER, call.layout, None, config, seed=0, generator=queries)
            assert sample is not None
            state.update(sample)
            state.measure(sample)


@pytest.mark.parametrize(
    "config", [UpdateConfig(), UpdateConfig(key_count=16), UpdateConfig(average_decay=0.5, schedule="cosine")]
)
def test_a_layer_goes_on_where_it_was(make_call: CallMaker, native: Native, config: UpdateConfig) -> None:
    call = make_call(0)
    whole, half = started(config), started(config)
    trained(whole, call, native(call), 6)
    trained(half, call, native(call), 3)
    resumed = started(config, seed=99)
    resumed.student.load_state_dict(half.student.state_dict())
    resumed.restore(half.tensors(), {name: getattr(half, name) for name in COUNTERS})
    trained(resumed, call, native(call), 3)
    assert resumed.updates == whole.updates == 6
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True))


@pytest.mark.parametrize("key_count", [16, 0])
def test_every_update_draws_its_keys_from_the_stream_of_the_layer(
    make_call: CallMaker, native: Native, key_count: int
) -> None:
    state, call = started(UpdateConfig(key_count=key_count)), make_call(0)
    before = state.generators["keys"].get_state()
    trained(state, call, native(call), 1)
    after = state.generators["keys"].get_state()
    assert torch.equal(before, after) == (key_count == 0)


def test_streams_belong_to_the_seed_the_layer_and_the_worker() -> None:
    draws = [
        torch.rand(1, generator=started(seed=seed, worker=worker).generators["queries"]).item()
        for seed, worker in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_what_does_not_fit_is_refused() -> None:
    state = started()
    good, counters = state.tensors(), dict.fromkeys(COUNTERS, 0)
    for broken, message in (
        ({"odd.x": torch.zeros(1)}, "unknown tensor 'odd.x'"),
        ({"rng.odd": torch.zeros(1)}, "unknown random stream 'odd'"),
        ({"loss.odd": torch.zeros(1)}, "the loss of layer single:0 has"),
    ):
        with pytest.raises(ValueError, match=message):
            started().restore(good | broken, counters)
    with pytest.raises(ValueError, match="'updates' must be a whole number"):
        started().restore(good, counters | {"updates": "many"})


def test_a_row_holds_the_means_of_the_run(make_call: CallMaker, native: Native) -> None:
    state = started()
    trained(state, make_call(0), native(make_call(0)), 2)
    row = state.row(LayerReadiness(updates=2, ema_cosine=0.5, level="partial"))
    assert row["huber"] == pytest.approx(sum(result.huber for result in state.results) / 2)
    assert row["heldout_cosine"] == pytest.approx(sum(pair[0] for pair in state.heldout) / 2)
    assert (row["updates"], row["level"], row["ema_cosine"], row["learning_rate"]) == (2, "partial", 0.5, 1e-3)
    assert row["mse"] == pytest.approx(sum(result.mse for result in state.results) / 2)
    assert (row["log_var_huber"], row["log_var_cosine"]) == tuple(float(value) for value in state.loss.parameters())
    assert row["log_var_huber"] != 0.0, "it is learned"
    step = make_call(0).step
    assert step is not None
    assert (row["sigma"], row["cfg_scale"]) == (step.sigma, step.cfg_scale)
    alpha = dict(state.student.named_parameters()).get("alpha")
    assert row.get("alpha_sigmoid") == (None if alpha is None else pytest.approx(float(alpha.detach().sigmoid())))
    state.start_run()
    assert (state.results, state.heldout) == ([], [])
