"""The embedded teacher: a small, genuine Flux transformer that draws emoji from captions.

The transformer is ``diffusers.FluxTransformer2DModel`` itself, so whatever works on it works on the architecture of the
large models. Weights, word list and thumbnails lie beside this file in ``weights``; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ttr_distill.tiny.codec import PatchCodec
from ttr_distill.tiny.text import TextEncoder, TextEncoding, Vocabulary

__all__ = ["CANVAS", "PatchCodec", "TextEncoding", "TinyTeacher", "Vocabulary", "build_transformer", "load_teacher"]

CANVAS = 16.0
"""Width and height of the picture in position units, at every resolution."""

WEIGHTS = Path(__file__).with_name("weights")
CONFIG_FILE = "transformer_config.json"
TRANSFORMER_FILE = "transformer.safetensors"
TEXT_FILE = "text_and_codec.safetensors"
VOCABULARY_FILE = "vocabulary.json"


def build_transformer(config: Mapping[str, object]) -> nn.Module:
    """Build a ``diffusers.FluxTransformer2DModel`` from its config.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
    """
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise ImportError('the tiny teacher needs diffusers: pip install "ttr-distill[diffusers]"') from error
    return cast(nn.Module, FluxTransformer2DModel.from_config(dict(config)))


@dataclass(frozen=True, eq=False)
class TinyTeacher:
    """A text-to-image model small enough for a processor.

    Attributes:
        transformer: ``FluxTransformer2DModel`` in float32, not trainable.
        text: Word tables.
        codec: Pixels to latent tokens and back.
        vocabulary: Words, concepts and background colours.
        fingerprint: sha256 of the weights.
    """

    transformer: nn.Module
    text: TextEncoder
    codec: PatchCodec
    vocabulary: Vocabulary
    fingerprint: str

    @property
    def concepts(self) -> tuple[str, ...]:
        """What the teacher can draw."""
        return self.vocabulary.concepts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codec.mean.device

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        """Encode captions to tokens ``[B, 12, 64]`` and pooled ``[B, 64]``; ``""`` is "no caption".

        Raises:
            ValueError: A caption has an unknown word or too many words.
        """
        with torch.no_grad():
            return cast(TextEncoding, self.text(self.vocabulary.ids(prompts).to(self.device)))

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images ``[B, 3, h, w]`` in ``[0, 1]`` to latent tokens ``[B, h * w / 16, 16]``."""
        return self.codec.encode(images.to(self.device))

    def decode(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        """Decode latent tokens ``[B, N, 16]`` to images ``[B, 3, 4 * rows, 4 * columns]`` in ``[0, 1]``."""
        return self.codec.decode(latent, rows, columns)

    def velocity(self, latent: Tensor, sigma: float, encoding: TextEncoding, rows: int, columns: int) -> Tensor:
        """Predict noise minus data.

        Args:
            latent: ``[B, N, 16]`` at noise level ``sigma``, tokens in raster order.
            sigma: Noise level in ``[0, 1]``: ``latent = (1 - sigma) * data + sigma * noise``.
            encoding: Captions of the batch.
            rows: Rows of tokens.
            columns: Columns of tokens; ``N = rows * columns``.

        Returns:
            ``[B, N, 16]``.

        Raises:
            ValueError: N is not ``rows * columns``, or the encoding is of another batch size.
        """
        if latent.ndim != 3 or latent.shape[1] != rows * columns:
            raise ValueError(f"latent must be [B, {rows * columns}, 16], got {tuple(latent.shape)}")
        if encoding.tokens.shape[0] != latent.shape[0]:
            raise ValueError(f"encoding has {encoding.tokens.shape[0]} captions for {latent.shape[0]} latents")
        times = torch.full((latent.shape[0],), sigma, dtype=latent.dtype, device=latent.device)
        return predict_velocity(self.transformer, latent, times, encoding, rows, columns)


def position_ids(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Positions ``[N, 3]`` of image tokens: ``(0, row, column)`` at the patch centres of a 16 x 16 canvas.

    The canvas keeps its size in position units whatever the number of tokens, so resolutions share what was learnt.
    """
    row = (torch.arange(rows, device=device) + 0.5) * (CANVAS / rows)
    column = (torch.arange(columns, device=device) + 0.5) * (CANVAS / columns)
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = row[:, None]
    ids[..., 2] = column[None, :]
    return ids.reshape(rows * columns, 3)


def predict_velocity(
    transformer: nn.Module, latent: Tensor, times: Tensor, encoding: TextEncoding, rows: int, columns: int
) -> Tensor:
    """Run a Flux transformer on ``latent`` ``[B, N, 16]`` at ``times`` ``[B]`` in ``[0, 1]``; differentiable."""
    answer = transformer(
        hidden_states=latent,
        encoder_hidden_states=encoding.tokens,
        pooled_projections=encoding.pooled,
        timestep=times,
        img_ids=position_ids(rows, columns, latent.device),
        txt_ids=torch.zeros(encoding.tokens.shape[1], 3, device=latent.device),
        return_dict=False,
    )
    return cast(Tensor, answer[0])


def load_teacher(device: torch.device | str = "cpu", *, directory: Path | None = None) -> TinyTeacher:
    """Load the embedded teacher, or one trained by ``python -m ttr_distill.tiny.train``.

    Args:
        device: Where to put the weights.
        directory: Folder with a trained teacher; ``None`` is the one that comes with the package.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: ``directory`` lacks a file of a teacher.
    """
    folder = WEIGHTS if directory is None else Path(directory)
    missing = [
        name for name in (CONFIG_FILE, TRANSFORMER_FILE, TEXT_FILE, VOCABULARY_FILE) if not (folder / name).is_file()
    ]
    if missing:
        raise FileNotFoundError(f"{folder} is not a tiny teacher: it lacks {', '.join(missing)}")
    # Fresh modules draw random weights; they are overwritten, and the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        transformer = build_transformer(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        stored = load_file(folder / TEXT_FILE)
        text = TextEncoder(*stored["text.token_table.weight"].shape)
    # `assign` would keep the stored float16; copying into the built float32 parameters widens it.
    transformer.load_state_dict(load_file(folder / TRANSFORMER_FILE))
    text.load_state_dict({name.removeprefix("text."): t for name, t in stored.items() if name.startswith("text.")})
    codec = PatchCodec(stored["codec.mean"], stored["codec.basis"], stored["codec.scale"])
    for module in (transformer, text, codec):
        module.to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for name in (TRANSFORMER_FILE, TEXT_FILE):
        digest.update((folder / name).read_bytes())
    return TinyTeacher(transformer, text, codec, Vocabulary.load(folder / VOCABULARY_FILE), digest.hexdigest())
