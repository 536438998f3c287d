import torch
from ttr_controller.quality.embedded import RetrievalScorer
from ttr_distill.tiny import heldout_prompts
from ttr_distill.tiny.data import load_thumbnails, load_vocabulary


def test_a_picture_counts_when_it_shows_what_the_prompt_names():
    thumbnails, vocabulary = load_thumbnails(), load_vocabulary()
    prompts = heldout_prompts()[:3]
    index = torch.tensor([thumbnails.concepts.index(vocabulary.parse(prompt)[0]) for prompt in prompts])
    colours = torch.tensor([vocabulary.colours[vocabulary.parse(prompt)[1]] for prompt in prompts])
    images = torch.nn.functional.interpolate(thumbnails.on(index, colours), scale_factor=4)
    scorer = RetrievalScorer()
    assert scorer(images, prompts).tolist() == [1.0, 1.0, 1.0]
    assert scorer(images.flip(0), prompts).tolist() == [0.0, 1.0, 0.0]
