from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor, nn
from ttr_distill.legacy import TRAINING_SETTINGS, read_legacy_students, write_legacy_students
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import DistillConfig, Distiller

LAYERS = (LayerKey("single", 1), LayerKey("single", 2))


@pytest.fixture
def learned(make_call: Callable[..., AttentionCall], native: Callable[[AttentionCall], Tensor]) -> Distiller:
    bank = StudentBank.for_layers(preset("hkr", landmark_maximum=256, gamma=1.0), LAYERS, 2, 16, seed=1)
    distiller = Distiller(bank, ReadinessTracker(ReadinessConfig(0.3, 0.3)), DistillConfig(min_swap_layers=2), seed=4)
    for run in range(3):
        distiller.begin_run()
        for layer in LAYERS:
            distiller(make_call(run, layer=layer, heads=2, width=16), native)
        distiller.end_run()
    distiller.raise_pending()
    return distiller


def test_what_is_written_is_read_back(learned: Distiller, tmp_path: Path) -> None:
    bank, readiness = learned.bank, learned.readiness
    path = write_legacy_students(tmp_path / "a.pt", bank, readiness, learned.state_dict(), fingerprint="klein")
    found = read_legacy_students(path, fingerprint="klein", readiness=readiness.config)
    assert found.bank.config == bank.config
    assert found.readiness.state_dict() == readiness.state_dict()
    left, right = found.bank.state_dict(), bank.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)
    expected = learned.state_dict(include_replay=False)
    assert set(found.training.tensors) == set(expected.tensors)
    for name, value in expected.tensors.items():
        if ".adam." in name and ".step" not in name and value.numel() > 1:
            assert torch.equal(found.training.tensors[name], value), name
    assert found.training.facts["layers"] == expected.facts["layers"]


def test_another_program_reads_it(learned: Distiller, layer_type: type[nn.Module], tmp_path: Path) -> None:
    """Modules and optimisers built by the names of the format take the file without a missing or unknown entry."""
    path = write_legacy_students(tmp_path / "a.pt", learned.bank, learned.readiness, learned.state_dict())
    payload = torch.load(path, weights_only=True)
    assert set(TRAINING_SETTINGS) <= set(payload)
    assert payload["alpha_format"] == "logit"
    for layer in LAYERS:
        module = layer_type()
        module.load_state_dict(payload["layers"][str(layer)], strict=True)
        optimizer = module.optimizer()
        optimizer.load_state_dict(payload["optimizer_states"][str(layer)])
        mine = learned.layer_training(layer)
        weight = mine.learner.get_parameter("kernel.phi_net_k.2.weight")
        theirs = optimizer.state[module.kernel.phi_net_k[2].weight]
        assert torch.equal(theirs["exp_avg"], mine.optimizer.state[weight]["exp_avg"])
        assert optimizer.param_groups[1]["params"] == [module.alpha]
        entry = payload["layer_readiness"][str(layer)]
        assert entry["update_count"] == learned.readiness[layer].updates
        assert entry["ema_cosine_dist"] == learned.readiness[layer].ema_cosine
    pair = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    torch.optim.AdamW(pair).load_state_dict(payload["loss_weight_optimizer_state"])
    huber = [float(learned.layer_training(layer).loss.log_var_huber) for layer in LAYERS]
    assert payload["loss_log_var_huber"] == pytest.approx(sum(huber) / 2)


def test_writing_changes_nothing(learned: Distiller, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in learned.bank.state_dict().items()}
    write_legacy_students(tmp_path / "a.pt", learned.bank, learned.readiness, learned.state_dict())
    after = learned.bank.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_settings_of_a_file_survive_a_round_trip(learned: Distiller, tmp_path: Path) -> None:
    kept = {"huber_beta": 0.2, "layer_ema_loss": {"single:1": 0.5}, "gamma": 9.0}
    path = write_legacy_students(tmp_path / "a.pt", learned.bank, learned.readiness, settings=kept)
    found = read_legacy_students(path)
    assert found.settings["huber_beta"] == 0.2
    assert found.settings["layer_ema_loss"] == {"single:1": 0.5}
    assert found.bank.config == learned.bank.config, "the bank's own setting must win"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("near_far", {}, "hold 'hkr' students only"),
        ("hkr", {"qk_norm": False}, "cannot say qk_norm=False, only True"),
        ("hkr", {"map_layers": 2}, "cannot say map_layers=2"),
        ("hkr", {"sigma_scale": 1000.0}, "cannot say sigma_scale"),
    ],
)
def test_what_the_format_cannot_say_is_refused(
    tmp_path: Path, name: str, overrides: dict[str, object], message: str
) -> None:
    bank = StudentBank.for_layers(preset(name, **overrides), LAYERS, 2, 16)
    with pytest.raises(ValueError, match=message):
        write_legacy_students(tmp_path / "a.pt", bank, ReadinessTracker())
    assert not (tmp_path / "a.pt").exists()
