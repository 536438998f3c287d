"""Files as another program writes them: modules, optimisers and payload built here by the names of the format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

HEADS, WIDTH, FEATURES = 2, 16, 256
LAYERS = ("single:0", "single:3")


class Kernel(nn.Module):
    """Two feature networks; in the first generation one shallow network under both names."""

    def __init__(self, first_generation: bool) -> None:
        super().__init__()
        if first_generation:
            hidden = max(FEATURES, WIDTH)
            self.phi_net_q = nn.Sequential(nn.Linear(WIDTH, hidden), nn.SiLU(), nn.Linear(hidden, FEATURES))
            self.phi_net_k = self.phi_net_q
        else:
            self.phi_net_q, self.phi_net_k = self.deep(), self.deep()

    @staticmethod
    def deep() -> nn.Sequential:
        hidden = max(WIDTH, 2 * FEATURES)
        first, second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, hidden)
        return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden, FEATURES))


class Conditioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 4))


class Layer(nn.Module):
    """A layer with the state names of the format."""

    def __init__(self, first_generation: bool = False, alpha: float = -2.1972) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.kernel = Kernel(first_generation)
        if not first_generation:
            self.conditioner = Conditioner()

    def optimizer(self) -> torch.optim.AdamW:
        rest = [parameter for name, parameter in self.named_parameters() if name != "alpha"]
        return torch.optim.AdamW([{"params": rest, "lr": 1e-4}, {"params": [self.alpha], "lr": 5e-4}])


@pytest.fixture
def layer_type() -> type[Layer]:
    return Layer


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Layer], dict[str, object]]]:
    """Write a file after two optimiser steps; returns its path, its layers and what was saved."""

    def write(
        first_generation: bool = False, alpha: float = -2.1972, **entries: object
    ) -> tuple[Path, dict[str, Layer], dict[str, object]]:
        torch.manual_seed(7)
        layers = {name: Layer(first_generation, alpha) for name in LAYERS}
        states = {}
        for name, layer in layers.items():
            optimizer = layer.optimizer()
            for _ in range(2):
                loss = sum(parameter.square().sum() for parameter in layer.parameters())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            states[name] = optimizer.state_dict()
        payload: dict[str, object] = {
            "format": "flux2_ttr_v2",
            "feature_dim": FEATURES,
            "learning_rate": 1e-4,
            "layer_specs": {name: {"num_heads": HEADS, "head_dim": WIDTH} for name in (*LAYERS, "single:5")},
            "layer_ema_loss": dict.fromkeys(LAYERS, 0.25),
            "layer_update_count": {"single:0": 30, "single:3": 31},
            "layer_ready": {"single:0": True, "single:3": False},
            "layers": {name: layer.state_dict() for name, layer in layers.items()},
        }
        if first_generation:
            payload |= {"landmark_count": 96, "alpha_init": 0.1}
        else:
            pair = [nn.Parameter(torch.tensor([0.25])), nn.Parameter(torch.tensor([-1.5]))]
            weights = torch.optim.AdamW(pair, lr=1e-4)
            sum(parameter.sum() for parameter in pair).backward()
            weights.step()
            payload |= {
                "alpha_format": "logit",
                "loss_log_var_huber": 0.25,
                "loss_log_var_cosine": -1.5,
                "landmark_fraction": 0.1,
                "landmark_min": 32,
                "landmark_max": 512,
                "alpha_init": 0.1,
                "alpha_max": 0.3,
                "gamma": 1.5,
                "readiness_threshold": 0.12,
                "layer_ema_cosine_dist": {"single:0": 0.1, "single:3": 0.004},
                "optimizer_states": states,
                "loss_weight_optimizer_state": weights.state_dict(),
            }
        payload |= entries
        path = tmp_path / "students.pt"
        torch.save(payload, path)
        return path, layers, payload

    return write
