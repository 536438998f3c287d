import sys

import pytest
import torch
from ttr_controller.quality.learned import DreamSimDistance, LpipsDistance
from ttr_controller.quality.models import QualityError


def test_missing_packages_name_their_extra(monkeypatch):
    for package, make in (("lpips", LpipsDistance), ("dreamsim", DreamSimDistance)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(QualityError, match=rf"install ttr-controller\[{package}\]"):
            make()


def test_an_unknown_net_is_named():
    with pytest.raises(ValueError, match="one of alex, squeeze, vgg, got 'resnet'"):
        LpipsDistance("resnet")


def test_lpips_of_the_real_library_with_a_random_backbone(pictures):
    lpips = pytest.importorskip("lpips")
    before = torch.random.get_rng_state()
    distance = LpipsDistance("squeeze", random_backbone=True)
    teacher = pictures()
    assert (distance(teacher, teacher) == 0).all()
    errors = [distance(pictures(noise=noise), teacher).mean() for noise in (0.02, 0.1, 0.4)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(
        LpipsDistance("squeeze", random_backbone=True)(pictures(1), teacher), distance(pictures(1), teacher)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        direct = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        expected = direct(pictures(1) * 2 - 1, teacher * 2 - 1).flatten()
    torch.testing.assert_close(distance(pictures(1), teacher), expected)
    with pytest.raises(ValueError, match="at least 64 pixels"):
        distance(teacher[..., :40], teacher[..., :40])


def test_lpips_loads_weights_from_the_hub_folder_and_says_which_are_missing(hub, pictures):
    pytest.importorskip("lpips")
    import torchvision

    with pytest.raises(QualityError, match=r"place squeezenet1_1-b8a52dc0.pth in .*checkpoints"):
        LpipsDistance("squeeze")(pictures(), pictures(1))
    (hub / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, hub / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    distance = LpipsDistance("squeeze")
    assert (distance(pictures(), pictures(1)) > 0).all()
    loaded = dict(distance.model.on("cpu").named_parameters())
    assert any(torch.equal(value, state["features.0.weight"]) for value in loaded.values())


def test_dreamsim_says_which_weights_are_missing(hub, pictures):
    pytest.importorskip("dreamsim")
    with pytest.raises(QualityError, match=r"unpack dreamsim_open_clip_vitb32_checkpoint.zip in .*dreamsim"):
        DreamSimDistance()(pictures(), pictures(1))


@pytest.mark.slow
def test_dreamsim_of_the_real_library_with_random_weights(tmp_path, pictures):
    pytest.importorskip("dreamsim")
    from dreamsim.config import dreamsim_args
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = vit_base(patch_size=32)
    base.pos_drop = torch.nn.LayerNorm(base.embed_dim)
    weights = {**base.state_dict(), "proj": torch.randn(768, 512) / 28}
    torch.save({"state_dict": weights}, tmp_path / "clip_vitb32_pretrain.pth.tar")
    plain = PerceptualModel(**dreamsim_args["model_config"]["clip_vitb32"], device="cpu", load_dir=str(tmp_path))
    adapter = LoraConfig(r=4, lora_alpha=0.5, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    get_peft_model(plain, adapter).save_pretrained(tmp_path / "clip_vitb32_single_lora")
    distance = DreamSimDistance("clip_vitb32", tmp_path)
    teacher = pictures()
    assert (distance(teacher, teacher).abs() < 1e-5).all()
    errors = [distance(pictures(noise=noise), teacher).mean() for noise in (0.02, 0.4)]
    assert 0 < errors[0] < errors[1]
    assert distance(pictures(1), teacher).shape == (2,)
