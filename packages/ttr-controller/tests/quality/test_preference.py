import sys

import pytest
import torch
from ttr_controller.quality.models import QualityError
from ttr_controller.quality.preference import HpsScorer, clip_input, third_party_scorer

SMALL = "ViT-S-32-alt"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(QualityError, match=r"open_clip is missing; install ttr-controller\[hps\]"):
        HpsScorer()


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (1, 3, 300, 401), (2, 3, 64, 50)])
def test_images_are_cut_like_clips(pictures, shape):
    """The library's own transform on the same pixels."""
    images = pictures(shape=shape)
    mine = clip_input(images, 224)
    assert mine.shape == (shape[0], 3, 224, 224)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    back = mine * std + mean
    assert back.min() >= -1e-5
    assert back.max() <= 1 + 1e-5
    if shape[2:] == (224, 224):
        torch.testing.assert_close(back, images)
    transforms = pytest.importorskip("torchvision.transforms")
    resize = transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC)
    expected = transforms.CenterCrop(224)(resize(images)).clamp(0, 1)
    assert (back - expected).abs().max() < 0.02


@pytest.mark.slow
def test_the_score_is_the_cosine_of_the_real_network(tmp_path, pictures):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    network = open_clip.create_model(SMALL, pretrained=None).eval()
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, tmp_path / "hps.pt")
    scorer = HpsScorer(tmp_path / "hps.pt", SMALL)
    images, prompts = pictures(shape=(2, 3, 96, 128)), ["a fox", "a red apple on blue"]
    scores = scorer(images, prompts)
    with torch.no_grad():
        seen = network.encode_image(clip_input(images, 224))
        read = network.encode_text(open_clip.get_tokenizer(SMALL)(prompts))
    torch.testing.assert_close(scores, torch.cosine_similarity(seen, read), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores, scorer(images, prompts[::-1]))
    with pytest.raises(ValueError, match="one prompt an image"):
        scorer(images, ["a fox"])


def test_missing_and_foreign_weights_say_what_to_do(hub, tmp_path, pictures):
    pytest.importorskip("open_clip")
    with pytest.raises(QualityError, match=r"HPS_v2.1_compressed.pt is downloaded once.*hps_checkpoint"):
        HpsScorer()(pictures(), ["a", "b"])
    (tmp_path / "hps.pt").write_bytes(b"hello")
    with pytest.raises(QualityError, match="HPS v2 cannot be loaded"):
        HpsScorer(tmp_path / "hps.pt", SMALL)(pictures(), ["a", "b"])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of somebody else, as an installer leaves it on disk."""
    facts = tmp_path / "judges-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: judges\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[ttr_controller.scorers]\nredness = judges_of_pictures:Redness\nbroken = judges_of_pictures:Nothing\n"
    )
    (tmp_path / "judges_of_pictures.py").write_text(
        "class Redness:\n    needs_prompts = False\n\n    def __call__(self, images, prompts):\n"
        "        return images[:, 0].mean(dim=(1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("judges_of_pictures", None)


@pytest.mark.usefixtures("installed")
def test_scorers_of_other_packages_are_found_by_name(pictures):
    images = pictures()
    torch.testing.assert_close(third_party_scorer("redness")(images, []), images[:, 0].mean(dim=(1, 2)))
    with pytest.raises(QualityError, match=r"no installed package offers the scorer 'beauty'.*broken, redness"):
        third_party_scorer("beauty")
    with pytest.raises(QualityError, match="the scorer 'broken' cannot be loaded"):
        third_party_scorer("broken")
