from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ttr_distill.tiny.data import COLOURS
from ttr_distill.tiny.text import BEGIN, NULL, PAD, TextEncoder, Vocabulary


@pytest.fixture
def words() -> Vocabulary:
    return Vocabulary.of_concepts(("red apple", "t rex", "meat on bone"), COLOURS, text_tokens=6)


def test_ids(words: Vocabulary) -> None:
    number = {word: index for index, word in enumerate(words.words)}
    rows = words.ids(["Red-Apple on blue", ""])
    assert rows.tolist() == [
        [BEGIN, number["red"], number["apple"], number["on"], number["blue"], PAD],
        [NULL, PAD, PAD, PAD, PAD, PAD],
    ]


def test_white_is_no_background(words: Vocabulary) -> None:
    assert torch.equal(words.ids(["t rex on white"]), words.ids(["t-rex"]))
    assert words.parse("t rex") == ("t rex", "white")
    assert words.parse("red apple on blue") == ("red apple", "blue")
    assert words.parse("meat on bone") == ("meat on bone", "white")
    assert words.parse("meat on bone on blue") == ("meat on bone", "blue")


def test_errors_name_the_caption(words: Vocabulary) -> None:
    with pytest.raises(ValueError, match=r"unknown words \['pear'\]"):
        words.ids(["red pear"])
    with pytest.raises(ValueError, match="background 'mauve'"):
        words.ids(["red apple on mauve"])
    with pytest.raises(ValueError, match="at most 5 fit"):
        words.ids(["red red red red red red"])
    with pytest.raises(ValueError, match="distinct"):
        Vocabulary((*words.words, "red"), words.concepts, words.colours)
    with pytest.raises(ValueError, match="white"):
        Vocabulary(words.words, words.concepts, {"blue": (0.0, 0.0, 1.0)})


def test_round_trip(words: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(words.dumps(), encoding="utf-8")
    assert Vocabulary.load(path) == words


def test_pooled_is_the_normalised_sum_over_present_words() -> None:
    encoder = TextEncoder(9, 8)
    ids = torch.tensor([[1, 5, 7, 0, 0], [2, 0, 0, 0, 0]])
    tokens, pooled = encoder(ids)
    table = encoder.pooled_table.weight
    torch.testing.assert_close(pooled[0], (table[1] + table[5] + table[7]) / 3**0.5)
    torch.testing.assert_close(pooled[1], table[2])
    torch.testing.assert_close(tokens[0, 4], encoder.token_table.weight[0])
