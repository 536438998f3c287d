"""Prompt lists from JSON files."""

import json
import os
from pathlib import Path

_EXAMPLE = '["a red apple", "a blue house"]'


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a JSON file that holds one list of prompts, as ``["a red apple", "a blue house"]``.

    Args:
        path: The file, UTF-8 with or without a byte order mark. ``~`` is the home folder; blanks at both ends are cut.

    Returns:
        The prompts in the file's order; an empty list is lawful.

    Raises:
        ValueError: The path is blank, or the file is not UTF-8, not JSON, not a list, or holds anything but text.
        FileNotFoundError: There is no such file, or it is a folder.
    """
    typed = os.fspath(path).strip()
    if not typed:
        raise ValueError(f"the path of the prompt file is empty; give a JSON file that holds a list like {_EXAMPLE}")
    file = Path(typed).expanduser()
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a folder; give the JSON file in it")
    if not file.is_file():
        raise FileNotFoundError(f"no prompt file at {file} (looked from {Path.cwd()})")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8") from None
    return _parse(text, file)


def _parse(text: str, file: Path) -> list[str]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{file} is not JSON: {error.msg} in {where}; write a list like {_EXAMPLE}") from None
    except (RecursionError, ValueError):
        raise ValueError(f"{file} is nested too deeply or has a number too long to read; write {_EXAMPLE}") from None
    if not isinstance(items, list):
        raise ValueError(f"{file} must hold a JSON list like {_EXAMPLE}, got {_kind(items)}")
    for position, item in enumerate(items, 1):
        if not isinstance(item, str):
            raise ValueError(
                f"{file}: prompt {position} of {len(items)} must be text in double quotes, got {_kind(item)}"
            )
    return items


def _kind(item: object) -> str:
    if item is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(item), "a number")
