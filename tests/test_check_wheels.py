"""scripts/check_wheels.py accepts a right wheel and names what is wrong with a wrong one."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from check_wheels import LARGEST, faults

ABOUT = "some_pack-0.1.0.dist-info"
METADATA = "Metadata-Version: 2.4\nName: some-pack\nVersion: 0.1.0\nLicense-Expression: Apache-2.0\n"
RIGHT = {
    "some_pack/__init__.py": b"x = 1\n",
    "some_pack/py.typed": b"",
    "some_pack/tiny/weights.safetensors": b"\x00\x01",
    f"{ABOUT}/licenses/LICENSE": b"the licence",
    f"{ABOUT}/METADATA": METADATA.encode(),
    f"{ABOUT}/RECORD": b"",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "some-pack"
    for name in ("some_pack/__init__.py", "some_pack/py.typed", "some_pack/tiny/weights.safetensors"):
        path = folder / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RIGHT[name])
    cache = folder / "src" / "some_pack" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_bytes(b"compiled")
    (folder / "LICENSE").write_bytes(b"the licence")
    text = '[project]\nname = "some-pack"\nversion = "0.1.0"\nlicense = "Apache-2.0"\n'
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def wheel_of(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "some_pack-0.1.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_right_wheel_has_no_fault(package: Path, tmp_path: Path) -> None:
    assert faults(wheel_of(tmp_path, RIGHT), package) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"some_pack/tiny/weights.safetensors": None}, "lacks some_pack/tiny/weights.safetensors"),
        ({"some_pack/tiny/weights.safetensors": b"\x00"}, "holds another some_pack/tiny/weights.safetensors than src"),
        ({"tests/test_a.py": b""}, "holds tests/test_a.py, which is not in src"),
        ({"some_pack/py.typed": None}, "lacks py.typed"),
        ({f"{ABOUT}/licenses/LICENSE": None}, "lacks the licence, or holds another one"),
        ({f"{ABOUT}/licenses/LICENSE": b"another"}, "lacks the licence, or holds another one"),
        (
            {f"{ABOUT}/METADATA": METADATA.replace("0.1.0", "0.2.0").encode()},
            "says Version: 0.2.0, pyproject.toml says 0.1.0",
        ),
        ({f"{ABOUT}/METADATA": f"{METADATA}Requires-Dist: a @ file:///x\n".encode()}, "requires a path: a @ file:///x"),
    ],
)
def test_a_fault_is_named(change: dict[str, bytes | None], fault: str, package: Path, tmp_path: Path) -> None:
    files = {name: content for name, content in {**RIGHT, **change}.items() if content is not None}
    assert fault in faults(wheel_of(tmp_path, files), package)


def test_a_heavy_wheel_is_a_fault(package: Path, tmp_path: Path) -> None:
    weights = bytes(LARGEST + 1)
    (package / "src" / "some_pack" / "tiny" / "weights.safetensors").write_bytes(weights)
    found = faults(wheel_of(tmp_path, {**RIGHT, "some_pack/tiny/weights.safetensors": weights}), package)
    assert found == ["is 20.0 MB, at most 20"]
