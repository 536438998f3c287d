"""Whether a picture of the embedded teacher still shows what its prompt names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, tensor


class RetrievalScorer:
    """1 where the nearest of the embedded teacher's pictures is the one that the prompt names, else 0."""

    needs_prompts = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score ``[B, 3, H, W]`` images in [0, 1] by their B prompts; answer ``[B]``."""
        from ttr_distill.tiny import retrieval_accuracy

        rows = zip(images, prompts, strict=True)
        return tensor([retrieval_accuracy(image[None], [prompt]) for image, prompt in rows])
