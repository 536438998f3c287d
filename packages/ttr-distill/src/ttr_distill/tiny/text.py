"""Captions to text tokens: a fixed word list and a table of word embeddings.

A caption is a concept, or a concept and a background: ``"red apple"``, ``"red apple on blue"``. The empty caption
stands for "no caption" in classifier-free guidance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

PAD, BEGIN, NULL = 0, 1, 2
SPECIAL_WORDS = ("<pad>", "<bos>", "<null>")


class TextEncoding(NamedTuple):
    """Captions as the transformer reads them.

    Attributes:
        tokens: ``[B, T, W]``, one token a word, padded to ``T``.
        pooled: ``[B, W]``, one vector a caption.
    """

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The words, concepts and background colours that a teacher knows.

    Attributes:
        words: Word of each row of the embedding table; the first three are padding, begin and "no caption".
        concepts: What can be drawn, as captions are written (``"red apple"``).
        colours: Background name to red, green and blue in ``[0, 1]``.
        text_tokens: Number of text tokens, ``T``.
    """

    words: tuple[str, ...]
    concepts: tuple[str, ...]
    colours: Mapping[str, tuple[float, float, float]]
    text_tokens: int = 12

    def __post_init__(self) -> None:
        if self.words[:3] != SPECIAL_WORDS:
            raise ValueError(f"the first three words must be {SPECIAL_WORDS}, got {self.words[:3]}")
        if "white" not in self.colours:
            raise ValueError(f"'white' is the background of a caption without one; got {sorted(self.colours)}")
        if len(set(self.words)) != len(self.words):
            raise ValueError("words must be distinct")

    @classmethod
    def of_concepts(
        cls, concepts: Sequence[str], colours: Mapping[str, tuple[float, float, float]], text_tokens: int = 12
    ) -> Vocabulary:
        """Collect the words of ``concepts`` and of the backgrounds ``colours``."""
        words = {word for concept in concepts for word in concept.split()} | {"on", *colours}
        return cls((*SPECIAL_WORDS, *sorted(words)), tuple(concepts), dict(colours), text_tokens)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read the JSON file that ``save`` wrote."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        colours = {
            name: (float(red), float(green), float(blue)) for name, (red, green, blue) in stored["colours"].items()
        }
        return cls(tuple(stored["words"]), tuple(stored["concepts"]), colours, int(stored["text_tokens"]))

    def dumps(self) -> str:
        """Write as JSON."""
        content = {
            "text_tokens": self.text_tokens,
            "colours": {name: list(colour) for name, colour in self.colours.items()},
            "concepts": list(self.concepts),
            "words": list(self.words),
        }
        return json.dumps(content, indent=1) + "\n"

    def parse(self, caption: str) -> tuple[str, str]:
        """Split a caption into concept and background: ``"red apple on blue"`` -> ``("red apple", "blue")``.

        Raises:
            ValueError: The background is not one of ``colours``.
        """
        text = _normalised(caption)
        concept, separator, colour = text.rpartition(" on ")
        # A concept may itself hold the word: "meat on bone".
        if not separator or text in self.concepts:
            return text, "white"
        if colour not in self.colours:
            raise ValueError(f"caption {caption!r} names background {colour!r}; known are {', '.join(self.colours)}")
        return concept, colour

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Look captions up as ``[B, T]`` int64 word numbers.

        White is what a caption without a background means, so ``"panda on white"`` is the caption ``"panda"``.

        Raises:
            ValueError: A caption has an unknown word or background, or too many words.
        """
        index = {word: number for number, word in enumerate(self.words)}
        rows = []
        for caption in captions:
            concept, colour = self.parse(caption)
            words = concept.split() if colour == "white" else [*concept.split(), "on", colour]
            unknown = [word for word in words if word not in index]
            if unknown:
                raise ValueError(f"caption {caption!r} has unknown words {unknown}; concepts are listed in .concepts")
            if len(words) + 1 > self.text_tokens:
                raise ValueError(f"caption {caption!r} has {len(words)} words; at most {self.text_tokens - 1} fit")
            row = [BEGIN, *(index[word] for word in words)] if words else [NULL]
            rows.append(row + [PAD] * (self.text_tokens - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.text_tokens)


class TextEncoder(nn.Module):
    """Two word tables: one token a word, and one sum over the caption.

    Args:
        words: Number of words.
        width: Width of a text token and of the pooled vector, ``W``.
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.token_table = nn.Embedding(words, width)
        self.pooled_table = nn.Embedding(words, width)

    def forward(self, ids: Tensor) -> TextEncoding:
        """Encode ``[B, T]`` word numbers; the pooled vector is the sum over the words present / sqrt(their count)."""
        present = (ids != PAD).unsqueeze(-1)
        pooled = (self.pooled_table(ids) * present).sum(dim=1) / present.sum(dim=1).sqrt()
        return TextEncoding(self.token_table(ids), pooled)


def _normalised(caption: str) -> str:
    return " ".join(caption.lower().replace("-", " ").split())
