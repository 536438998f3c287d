"""Pictures of a run as data URIs."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path

from ttr_controller.report.results import ResultsError, Sheet

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """One picture of the sheet; without ``uri`` it could not be read, and ``problem`` says why."""

    alt: str
    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def sheet_rows(sheet: Sheet, run_dir: Path) -> list[tuple[str, list[Picture]]]:
    """Read the sheet's pictures: for each prompt, one picture per column.

    Raises:
        ResultsError: An image path leaves the run's folder.
    """
    rows = []
    for index, prompt in enumerate(sheet.prompts):
        pictures = [
            embed(run_dir, column.images[index], f"{prompt}: {column.label}, {column.detail}".rstrip(", "))
            for column in sheet.columns
        ]
        rows.append((prompt, pictures))
    return rows


def embed(run_dir: Path, name: str, alt: str) -> Picture:
    """Read one PNG below ``run_dir``; a missing or broken file becomes a picture that says so.

    Raises:
        ResultsError: The path leaves the run's folder.
    """
    path = run_dir / name
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise ResultsError(f"image {name!r} lies outside the run's folder {run_dir}")
    try:
        data = path.read_bytes()
    except OSError:
        return Picture(alt, problem=f"picture missing: {name}")
    if not data.startswith(_SIGNATURE) or len(data) < 24 or not data.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):
        return Picture(alt, problem=f"picture broken: {name}")
    width, height = struct.unpack(">II", data[16:24])
    return Picture(alt, "data:image/png;base64," + base64.b64encode(data).decode("ascii"), width, height)
