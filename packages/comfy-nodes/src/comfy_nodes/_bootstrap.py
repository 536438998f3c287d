"""Lets the nodes of a clone or a linked folder find the packages that lie beside this one."""

import sys
from importlib.util import find_spec
from pathlib import Path

SIBLINGS = ("attn-kernels", "attn-dispatch", "ttr-distill", "ttr-controller", "value-utils")
"""Packages of this repository that nodes may import."""


def add_sibling_packages(packages: Path) -> tuple[str, ...]:
    """Append ``<packages>/<sibling>/src`` to ``sys.path`` for each sibling that cannot be imported yet.

    An installed package is left alone. Only folders of the known names are looked at: if this pack was copied,
    ``packages`` may be a folder full of other people's packs.

    Args:
        packages: Folder in which the siblings may lie.

    Returns:
        The siblings that are neither installed nor there.
    """
    missing = []
    for sibling in SIBLINGS:
        module = sibling.replace("-", "_")
        if find_spec(module) is not None:
            continue
        source = packages / sibling / "src"
        if (source / module / "__init__.py").is_file():
            sys.path.append(str(source))
        else:
            missing.append(sibling)
    return tuple(missing)
