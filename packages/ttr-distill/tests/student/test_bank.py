import pytest
import torch
from attn_dispatch import LayerKey
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset

LAYERS = (LayerKey("double", 0), LayerKey("single", 0), LayerKey("single", 12))


def test_layers_are_found_by_key_and_seeds_by_layer() -> None:
    bank = StudentBank.for_layers(preset("hkr"), reversed(LAYERS), 2, 16, seed=5)
    assert bank.layers == LAYERS
    assert len(bank) == 3
    assert LAYERS[1] in bank
    assert LayerKey("single", 1) not in bank
    alone = StudentBank.for_layers(preset("hkr"), LAYERS[2:], 2, 16, seed=5)
    name = "kernel.phi_net_q.0.weight"
    assert torch.equal(bank[LAYERS[2]].state_dict()[name], alone[LAYERS[2]].state_dict()[name])
    assert not torch.equal(bank[LAYERS[2]].state_dict()[name], bank[LAYERS[1]].state_dict()[name])
    other = StudentBank.for_layers(preset("hkr"), LAYERS[2:], 2, 16, seed=6)
    assert not torch.equal(other[LAYERS[2]].state_dict()[name], alone[LAYERS[2]].state_dict()[name])


def test_a_bank_made_and_moved_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        bank = StudentBank.for_layers(preset("near_far"), LAYERS, 2, 16).to(torch.float64).to("cpu")
    assert not any(parameter.is_inference() for parameter in bank.parameters())
    (bank[LAYERS[0]].state_dict(keep_vars=True)["temperature"] * 2).sum().backward()


def test_names_with_dots_are_possible() -> None:
    layers = (LayerKey("down_blocks.0.attn", 1), LayerKey("down_blocks.1.attn", 1))
    bank = StudentBank.for_layers(preset("near_far"), layers, 2, 16)
    other = StudentBank.for_layers(preset("near_far"), layers, 2, 16)
    with torch.no_grad():
        bank[layers[1]].get_parameter("bias").fill_(3.0)
    other.load_state_dict(bank.state_dict())
    assert float(other[layers[1]].state_dict()["bias"][0]) == 3.0
    assert float(other[layers[0]].state_dict()["bias"][0]) == 0.0


def test_an_empty_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        StudentBank.for_layers(preset("hkr"), (), 2, 16)
