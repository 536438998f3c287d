from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor, nn
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.exp_feature_map import ExpFeatureMap
from ttr_distill.student.feature_map import KernelFeatureMap, StudentFeatureMap
from ttr_distill.student.feature_map_catalog import FeatureMaps, MapRequest
from ttr_distill.student.presets import StudentConfig, build_student, preset

CallMaker = Callable[..., AttentionCall]


class Squares(StudentFeatureMap):
    """A custom map: squares of one linear layer."""

    def __init__(self, request: MapRequest) -> None:
        super().__init__(request.feature_dim)
        self.net = nn.Linear(request.width, request.feature_dim)
        with torch.no_grad():
            self.net.weight.normal_(generator=request.generator)

    def query(self, q: Tensor) -> Tensor:
        return self.net(q).square()

    def key(self, k: Tensor) -> Tensor:
        return self.net(k).square()

    def flops_per_token(self) -> float:
        return 2.0 * self.net.weight.numel()


def test_a_custom_map_is_handed_in_trained_and_served(make_call: CallMaker) -> None:
    maps = FeatureMaps().with_map("squares", Squares)
    config = preset("local-kernel", feature_map="squares", feature_dim=10, radius=1)
    bank = StudentBank.for_layers(config, (LayerKey("single", 0),), 2, 16, feature_maps=maps)
    student, call = bank[LayerKey("single", 0)], make_call(0)
    student(call).square().sum().backward()
    gradients = {name: weight.grad for name, weight in student.named_parameters() if name.startswith("kernel.")}
    assert set(gradients) == {"kernel.net.weight", "kernel.net.bias"}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert call.layout is not None
    assert student.flops(call.layout, 1, 2, 16) > 0
    assert StudentConfig.from_dict(config.to_dict()) == config


def test_only_the_handed_object_knows_it() -> None:
    FeatureMaps().with_map("squares", Squares)
    config = preset("local-kernel", feature_map="squares")
    with pytest.raises(ValueError, match=r"must be one of exp, mlp, got 'squares'; add it with FeatureMaps.with_map"):
        build_student(config, 2, 16)
    with pytest.raises(ValueError, match="there is a feature map 'exp' already"):
        FeatureMaps().with_map("exp", Squares)


def test_built_in_maps_get_what_was_asked() -> None:
    mlp = FeatureMaps().make("mlp", MapRequest(2, 16, 256, qk_norm=True, eps=1e-3, map_dtype="bfloat16"))
    assert isinstance(mlp, KernelFeatureMap)
    assert (mlp.features, mlp.qk_norm, mlp.eps, mlp.dtype) == (256, True, 1e-3, torch.bfloat16)
    exp = FeatureMaps().make("exp", MapRequest(3, 16, 8, hidden=4))
    assert isinstance(exp, ExpFeatureMap)
    assert exp.query_side.weight.shape == (3, 4, 4)
