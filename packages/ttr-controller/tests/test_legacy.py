from pathlib import Path

import pytest
import torch
from attn_dispatch.call import StepContext
from torch import nn
from ttr_controller.legacy import LegacyController, read_legacy_controller, trainer_state, write_legacy_controller
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.trainer_state import TrainerManifest, unpack_optimizer
from ttr_distill.checkpoint import CheckpointError

LAYERS, EMBED, HIDDEN = 5, 16, 32


class Resolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(2 * EMBED, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))


class Controller(nn.Module):
    """State names and formula of the format, written out."""

    def __init__(self):
        super().__init__()
        self.resolution_embed = Resolution()
        first, second = nn.Linear(3 * EMBED, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(HIDDEN, LAYERS))

    @staticmethod
    def embed(value):
        half = EMBED // 2
        angle = value * 10_000.0 ** (-torch.arange(half) / (half - 1))
        return torch.cat([angle.sin(), angle.cos()])

    def forward(self, sigma, cfg, width, height):
        resolution = self.resolution_embed.proj(torch.cat([self.embed(width), self.embed(height)]))
        return self.mlp(torch.cat([self.embed(sigma), self.embed(cfg), resolution]))


@pytest.fixture
def theirs(tmp_path):
    """A file of another program with a trained controller: path, module and optimiser."""

    def write(**entries):
        torch.manual_seed(3)
        module = Controller()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        module(0.5, 3.0, 64.0, 32.0).sum().backward()
        optimizer.step()
        payload = {
            "format": "flux2_ttr_controller_v1",
            "num_layers": LAYERS,
            "embed_dim": EMBED,
            "hidden_dim": HIDDEN,
            "state_dict": module.state_dict(),
            "reward_baseline": -0.25,
            "reward_count": 7,
            "reward_baseline_quality_floor": -0.3,
            "lambda_entropy": 0.1,
            "optimizer_state_dict": optimizer.state_dict(),
        }
        path = tmp_path / "controller.pt"
        torch.save(payload | entries, path)
        return path, module, optimizer

    return write


def test_a_policy_answers_as_in_the_program_that_wrote_it(theirs):
    path, module, _ = theirs()
    with torch.inference_mode():
        policy = read_legacy_controller(path, layers=LAYERS).policy
    for sigma, cfg in ((0.1, 1.0), (0.9, 4.5)):
        step = StepContext(sigma, cfg, (24, 40))
        expected = module(sigma, cfg, 40 * 8.0, 24 * 8.0)
        torch.testing.assert_close(policy(step), expected, atol=1e-4, rtol=1e-4)


def test_training_state_is_read_by_parameter_name(theirs):
    path, module, optimizer = theirs()
    found = read_legacy_controller(path)
    assert (found.reward_baseline, found.reward_count) == (-0.25, 7)
    assert (found.quality_floor, found.lambda_entropy) == (-0.3, 0.1)
    for name, parameter in module.named_parameters():
        assert torch.equal(found.moments[name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
    bare, _, _ = theirs(optimizer_state_dict=None, reward_baseline=None, reward_count=None)
    found = read_legacy_controller(bare)
    assert found.moments == {}
    assert (found.reward_baseline, found.reward_count) == (None, 0)


def test_what_is_written_loads_in_the_other_program(theirs, tmp_path):
    path, _, optimizer = theirs()
    found = read_legacy_controller(path)
    again = write_legacy_controller(tmp_path / "again.pt", found._replace(fingerprint="klein"))
    payload = torch.load(again, weights_only=True)
    module = Controller()
    module.load_state_dict(payload["state_dict"])
    fresh = torch.optim.AdamW(module.parameters())
    fresh.load_state_dict(payload["optimizer_state_dict"])
    for left, right in zip(module.parameters(), optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(left, right)
        assert torch.equal(fresh.state[left]["exp_avg"], optimizer.state[right]["exp_avg"])
    assert {"reward_baseline", "reward_count", "lambda_entropy"} <= set(payload)
    assert read_legacy_controller(again, fingerprint="klein").reward_baseline == -0.25
    with pytest.raises(CheckpointError, match="saved for klein, the model here is dev"):
        read_legacy_controller(again, fingerprint="dev")


def test_a_policy_with_scaled_inputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unscaled inputs"):
        write_legacy_controller(tmp_path / "a.pt", LegacyController(RoutingPolicy(LAYERS, PolicyConfig()), {}))
    three = RoutingPolicy(LAYERS, PolicyConfig.legacy(), actions=3)
    with pytest.raises(ValueError, match="not 3 attentions"):
        write_legacy_controller(tmp_path / "a.pt", LegacyController(three, {}))
    assert not (tmp_path / "a.pt").exists()


def test_a_file_becomes_the_state_of_a_training(theirs):
    path, _, optimizer = theirs()
    found = read_legacy_controller(path)
    state = trainer_state(found)
    assert set(state["manifest"]) == set(TrainerManifest.__required_keys__)
    fresh = torch.optim.AdamW(found.policy.parameters())
    unpack_optimizer(fresh, found.policy, state["tensors"])
    for left, right in zip(found.policy.parameters(), optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(fresh.state[left]["exp_avg"], optimizer.state[right]["exp_avg"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "flux2_ttr_v2"}, "unsupported checkpoint format"),
        ({"num_layers": None}, "num_layers must be a whole number"),
        ({"num_layers": 6}, "has shape"),
        ({"embed_dim": 3}, "embed_dim must be even"),
        ({"state_dict": {}}, "lacks entries"),
        ({"state_dict": 3}, "no state dict"),
        ({"optimizer_state_dict": {}}, "no groups"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(theirs, entries, message):
    path, _, _ = theirs(**entries)
    with pytest.raises(CheckpointError, match=message) as error:
        read_legacy_controller(path)
    assert "\n" not in str(error.value)


def test_another_number_of_layers_is_named(theirs):
    path, _, _ = theirs()
    with pytest.raises(CheckpointError, match="routes 5 layers, the model has 38"):
        read_legacy_controller(path, layers=38)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        read_legacy_controller(tmp_path / "nowhere.pt")
