"""Check what built wheels hold: all of a package's source folder, its licence, and nothing else."""

import re
import sys
import tomllib
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

MEGABYTE = 1_000_000
LARGEST = 20 * MEGABYTE
"""The embedded teacher may weigh 15 MB."""


def expected_files(package: Path) -> dict[str, bytes]:
    """Every file below ``src`` by its name in the wheel, compiled Python left out."""
    source = package / "src"
    return {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def faults(wheel: Path, package: Path) -> list[str]:
    """What is wrong with the wheel of the package in folder ``package``, one sentence each."""
    found = []
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = expected_files(package)
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        inside = {name: archive.read(name) for name in names}
    about = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    files = {name: content for name, content in inside.items() if not name.startswith(f"{about}/")}
    found += [f"lacks {name}" for name in expected if name not in files]
    found += [f"holds {name}, which is not in src" for name in files if name not in expected]
    found += [
        f"holds another {name} than src" for name in expected if files.get(name, expected[name]) != expected[name]
    ]
    if f"{project['name'].replace('-', '_')}/py.typed" not in files:
        found.append("lacks py.typed")
    if inside.get(f"{about}/licenses/LICENSE") != (package / "LICENSE").read_bytes():
        found.append("lacks the licence, or holds another one")
    if wheel.stat().st_size > LARGEST:
        found.append(f"is {wheel.stat().st_size / MEGABYTE:.1f} MB, at most {LARGEST / MEGABYTE:.0f}")
    metadata = Parser().parsestr(inside.get(f"{about}/METADATA", b"").decode())
    return found + _metadata_faults(metadata, project)


def _metadata_faults(metadata: Message, project: dict[str, object]) -> list[str]:
    found = []
    for key, field in (("Name", "name"), ("Version", "version"), ("License-Expression", "license")):
        if metadata[key] != project[field]:
            found.append(f"says {key}: {metadata[key]}, pyproject.toml says {project[field]}")
    for requirement in metadata.get_all("Requires-Dist", []):
        if " @ " in requirement or re.search(r"\bfile:", requirement):
            found.append(f"requires a path: {requirement}")
    return found


def main(built: Path) -> int:
    """Check the wheel of every package of this workspace in folder ``built``; 1 if any is missing or faulty."""
    status = 0
    packages = Path(__file__).resolve().parents[1] / "packages"
    for package in sorted(path.parent for path in packages.glob("*/pyproject.toml")):
        wheels = list(built.glob(f"{package.name.replace('-', '_')}-*.whl"))
        found = faults(wheels[0], package) if len(wheels) == 1 else [f"there are {len(wheels)} wheels, not one"]
        size = f"{wheels[0].stat().st_size / 1000:.0f} kB" if wheels else "no wheel"
        print(f"{package.name}: {size}")
        for fault in found:
            print(f"{package.name}: the wheel {fault}", file=sys.stderr)
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
