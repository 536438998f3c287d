"""Putting handlers on a model so that the order of the nodes does not matter."""

from typing import Any

from attn_dispatch.adapters.comfyui import install, installed, uninstall
from attn_dispatch.call import AttentionHandler

TAYLOR = "taylor"
HYBRID = "hybrid"
APPROXIMATE = "approximate"
NATIVE = "native"


def install_below(model: Any, handler: AttentionHandler, key: str) -> Any:
    """Make a clone of a model whose exact attention ``handler`` answers, whatever else is on it.

    Handlers that are there already, in their order, stay above: they are asked first, and this one computes what they
    leave.

    Args:
        model: ComfyUI's ``ModelPatcher``; stays as it is.
        handler: Answers what the others leave.
        key: Name of this installation.

    Returns:
        The clone.
    """
    above = {name: one for name, one in installed(model).items() if name != key}
    clone = model
    for name in above:
        clone = uninstall(clone, key=name)
    clone = install(clone, handler, key=key)
    for name, one in above.items():
        clone = install(clone, one, key=name)
    return clone
