"""ComfyUI node pack of Approximate Attention. Importing it needs neither ComfyUI nor torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from ._bootstrap import add_sibling_packages

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = str(Path(__file__).parent / "web")
"""Folder of files for the page (help pages), read by ComfyUI."""

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


def comfy_entrypoint() -> "ComfyExtension":
    """Give ComfyUI the pack's nodes; ComfyUI calls it once while it loads the pack.

    Returns:
        The extension, a ``comfy_api.latest.ComfyExtension``.

    Raises:
        ImportError: A package that the nodes use is neither installed nor beside this one.
    """
    missing = add_sibling_packages(Path(__file__).resolve().parents[3])
    try:
        from .extension import ApproximateAttentionExtension
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0].replace("_", "-")
        if package not in missing:
            raise
        raise ImportError(
            f"the nodes need the package {package}; install it with pip into the Python that runs ComfyUI, or link the "
            "folder packages/comfy-nodes of the whole repository instead of copying it"
        ) from error
    return ApproximateAttentionExtension()
