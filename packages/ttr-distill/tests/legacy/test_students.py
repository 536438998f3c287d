import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor, nn
from torch.nn import functional
from ttr_distill.checkpoint import CheckpointError
from ttr_distill.legacy import migrated_alpha, read_legacy_students
from ttr_distill.student.hkr import HkrConfig
from ttr_distill.student.readiness import ReadinessConfig
from ttr_distill.training.distiller import DistillConfig, Distiller
from ttr_distill.training.layer import LayerTraining

Writer = Callable[..., tuple[Path, dict[str, nn.Module], dict[str, object]]]
FIRST, SECOND, FRESH = LayerKey("single", 0), LayerKey("single", 3), LayerKey("single", 5)


def settings(path: Path) -> HkrConfig:
    found = read_legacy_students(path).bank.config.settings
    assert isinstance(found, HkrConfig)
    return found


def test_weights_specs_and_settings_are_read(write_file: Writer) -> None:
    path, layers, _ = write_file()
    with torch.inference_mode():
        bank = read_legacy_students(path).bank
    assert bank.layers == (FIRST, SECOND, FRESH)
    assert (bank.heads, bank.width) == (2, 16)
    assert not any(parameter.is_inference() for parameter in bank.parameters())
    for name, layer in layers.items():
        mine = bank[LayerKey.parse(name)].state_dict()
        assert set(mine) == set(layer.state_dict())
        assert all(torch.equal(mine[entry], value) for entry, value in layer.state_dict().items())
    found = settings(path)
    expected = (0.1, 32, 512, 0.3, 1.5)
    assert (
        found.landmark_fraction,
        found.landmark_minimum,
        found.landmark_maximum,
        found.alpha_max,
        found.gamma,
    ) == expected
    assert (found.sigma_scale, found.cfg_scale, found.blend, found.map_layers) == (1.0, 1.0, "convex", 3)


def test_missing_settings_take_the_defaults_of_the_format(write_file: Writer) -> None:
    path, _, _ = write_file(landmark_fraction=None, landmark_min=math.nan, alpha_max=None, gamma=None)
    found, defaults = settings(path), HkrConfig()
    assert (found.landmark_fraction, found.landmark_minimum) == (0.08, 64)
    assert (found.alpha_max, found.gamma) == (defaults.alpha_max, defaults.gamma) == (0.2, 2.0)


@pytest.mark.parametrize(("raw", "expected"), [(0.1, math.log(0.1 / 0.9)), (-2.5, -2.5), (1.0, 1.0), (0.0, 0.0)])
def test_an_alpha_saved_as_a_share_becomes_a_logit(write_file: Writer, raw: float, expected: float) -> None:
    assert float(migrated_alpha(torch.tensor(raw))) == pytest.approx(expected)
    path, layers, _ = write_file(alpha=raw, alpha_format=None)
    stored = float(layers["single:0"].alpha.detach())  # two optimiser steps away
    alpha = float(read_legacy_students(path).bank[FIRST].get_parameter("alpha"))
    assert alpha == pytest.approx(math.log(stored / (1 - stored)) if 0 < stored < 1 else stored)
    path, _, _ = write_file(alpha=raw)
    assert float(read_legacy_students(path).bank[FIRST].get_parameter("alpha")) == pytest.approx(stored)


def test_readiness_is_judged_by_the_thresholds_given(write_file: Writer) -> None:
    path, _, _ = write_file()
    old = read_legacy_students(path, readiness=ReadinessConfig(0.12, 0.12)).readiness
    assert [old.ready(layer) for layer in (FIRST, SECOND, FRESH)] == [True, True, False]
    assert old[SECOND].updates == 31
    assert old[SECOND].ema_cosine == 0.004
    assert old[SECOND].ema_relative_l2 == pytest.approx(math.sqrt(0.008))
    new = read_legacy_students(path).readiness
    assert [new.ready(layer) for layer in (FIRST, SECOND, FRESH)] == [False, True, False]


def layer_training(path: Path, name: str) -> tuple[Distiller, LayerTraining]:
    found = read_legacy_students(path)
    distiller = Distiller(found.bank, found.readiness, DistillConfig(min_swap_layers=3))
    distiller.load_state_dict(found.training)
    return distiller, distiller.layer_training(LayerKey.parse(name))


def test_optimiser_states_counts_and_loss_weights_go_on(write_file: Writer) -> None:
    path, layers, payload = write_file()
    distiller, training = layer_training(path, "single:3")
    assert distiller.updates == 61
    assert float(training.loss.log_var_huber) == 0.25
    assert float(training.loss.log_var_cosine) == -1.5
    states = payload["optimizer_states"]["single:3"]["state"]
    names = [name for name, _ in layers["single:3"].named_parameters() if name != "alpha"] + ["alpha"]
    mine = dict(training.learner.named_parameters())
    for number, name in enumerate(names):
        entry = training.optimizer.state[mine[name]]
        assert float(entry["step"]) == 2.0
        assert torch.equal(entry["exp_avg"], states[number]["exp_avg"])
        assert torch.equal(entry["exp_avg_sq"], states[number]["exp_avg_sq"])
    weights = payload["loss_weight_optimizer_state"]["state"]
    assert torch.equal(training.optimizer.state[training.loss.log_var_cosine]["exp_avg"], weights[1]["exp_avg"][0])


def test_training_goes_on_from_a_file(
    write_file: Writer, make_call: Callable[..., AttentionCall], native: Callable[[AttentionCall], Tensor]
) -> None:
    path, _, _ = write_file()
    distiller, training = layer_training(path, "single:0")
    before = training.student.state_dict()["kernel.phi_net_k.4.weight"].clone()
    with torch.inference_mode():
        distiller.begin_run()
        distiller(make_call(1, layer=FIRST, heads=2, width=16), native)
        distiller.end_run()
    distiller.raise_pending()
    assert training.updates == 31
    assert not torch.equal(before, training.student.state_dict()["kernel.phi_net_k.4.weight"])


def test_missing_optimiser_states_are_tolerated(write_file: Writer) -> None:
    path, _, _ = write_file(optimizer_states=None, loss_weight_optimizer_state=None, loss_log_var_huber=math.nan)
    _, training = layer_training(path, "single:0")
    assert not training.optimizer.state
    assert float(training.loss.log_var_huber) == 0.0


def test_the_first_generation_answers_by_its_own_formula(
    write_file: Writer, make_call: Callable[..., AttentionCall]
) -> None:
    """Kernel regression plus alpha times attention over every token, written out."""
    path, layers, _ = write_file(first_generation=True, alpha=0.3, landmark_count=10_000)
    bank = read_legacy_students(path).bank
    call = make_call(3, layer=FIRST, heads=2, width=16)
    layer = layers["single:0"]
    q, k = (functional.elu(layer.kernel.phi_net_q(x)) + 1 for x in (call.q, call.k))
    q, k = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    weights = q @ k.transpose(-1, -2)
    kernel = (weights / weights.sum(-1, keepdim=True)) @ call.v
    landmarks = functional.scaled_dot_product_attention(call.q, call.k, call.v)
    with torch.no_grad():
        torch.testing.assert_close(bank[FIRST](call), kernel + layer.alpha * landmarks, atol=2e-5, rtol=1e-4)


def test_the_first_generation_has_counts_but_no_cosine_distance(write_file: Writer) -> None:
    path, _, _ = write_file(first_generation=True)
    found = read_legacy_students(path, readiness=ReadinessConfig(1.0, 1.0))
    assert settings(path).landmark_maximum == settings(path).landmark_minimum == 96
    assert found.readiness[FIRST].updates == 30
    assert not found.readiness.ready(FIRST)


def test_other_settings_are_handed_on_not_applied(write_file: Writer) -> None:
    path, _, _ = write_file(huber_beta=0.2)
    found = read_legacy_students(path)
    assert found.settings["huber_beta"] == 0.2
    assert found.settings["layer_ema_loss"] == {"single:0": 0.25, "single:3": 0.25}
    assert "layers" not in found.settings


def test_a_file_that_names_its_model_is_compared(write_file: Writer, caplog: pytest.LogCaptureFixture) -> None:
    path, _, _ = write_file()
    assert read_legacy_students(path, fingerprint="dev").fingerprint is None
    assert "does not say which model" in caplog.text
    path, _, _ = write_file(model_fingerprint="klein")
    assert read_legacy_students(path, fingerprint="klein").fingerprint == "klein"
    with pytest.raises(CheckpointError, match="saved for klein, the model here is dev"):
        read_legacy_students(path, fingerprint="dev")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "flux2_ttr_v9"}, "unsupported checkpoint format"),
        ({"feature_dim": "256"}, "invalid checkpoint feature_dim"),
        ({"feature_dim": 100}, "feature_dim must be a multiple of 256"),
        ({"feature_dim": 512}, "has shape"),
        ({"layer_specs": {}}, "has weights and no layer_specs"),
        ({"layers": {"single:0": {"alpha": torch.zeros(())}}}, "lacks entries: kernel.phi_net"),
        ({"layers": {"single:0": 3}}, "is no state dict"),
        ({"optimizer_states": {"single:0": {"state": {}, "param_groups": [{"params": [0]}]}}}, "of 1 parameters"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(write_file: Writer, entries: dict[str, object], message: str) -> None:
    path, _, _ = write_file(**entries)
    with pytest.raises(CheckpointError, match=message) as error:
        read_legacy_students(path)
    assert "\n" not in str(error.value)
