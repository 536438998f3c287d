import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from value_utils import load_prompts

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXT), st.booleans())
def test_round_trip(prompts: list[str], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.json")
        file.write_text(json.dumps(prompts, ensure_ascii=ascii_only), encoding="utf-8")
        assert load_prompts(file) == load_prompts(f"  {file}\n") == prompts


def test_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('["苹果"]', encoding="utf-8-sig")
    assert load_prompts(file) == ["苹果"]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "prompts.json").write_text("[]", encoding="utf-8")
    assert load_prompts("~/prompts.json") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value in line 1, column 1; write a list like"),
        (b'["a",\n"b"', "is not JSON: Expecting ',' delimiter in line 2, column 4; write a list like"),
        ('["Äpfel"]'.encode("latin-1"), r"is not UTF-8 text \(byte 2\); save it again as UTF-8"),
        ('["a"]'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"prompts": ["a"]}', "must hold a JSON list like .*, got an object"),
        (b'"a"', "got a text"),
        (b"null", "got null"),
        (b'["a", "b", 3]', "prompt 3 of 3 must be text in double quotes, got a number"),
        (b'["a", ["b"]]', "prompt 2 of 2 must be text in double quotes, got a list"),
        (b"[false]", "prompt 1 of 1 must be text in double quotes, got true or false"),
        (b"[" * 200_000, "is nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "number too long to read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path of the prompt file is empty"):
        load_prompts("  ")
    with pytest.raises(FileNotFoundError, match=r"no prompt file at .*nothing\.json \(looked from"):
        load_prompts(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="is a folder; give the JSON file in it"):
        load_prompts(tmp_path)
