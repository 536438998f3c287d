"""ComfyUI: install a handler on a model, and take it off again.

Documented hooks of the host are used and nothing of it is patched or imported: the attention override in
``transformer_options``, and the wrappers around a sampling run and around a call of the network. ComfyUI 0.3.64 to
0.33 are supported. Where the host does not name the blocks of a Flux-like model (Flux in 0.3.75, all in 0.3.64), a
fourth hook, which replaces blocks, names them (``comfyui_blocks``). Other models without names give ``layer=None``:
whatever needs a layer refuses with that sentence, and the rest works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from attn_dispatch.adapters.comfyui_layout import LAYOUTS, LayoutReader
from attn_dispatch.adapters.comfyui_override import INSTALLED, OVERRIDE, ComfyOverride
from attn_dispatch.adapters.comfyui_wrappers import DIFFUSION_MODEL, OUTER_SAMPLE, HostWrappers
from attn_dispatch.call import AttentionHandler

__all__ = ["ComfyOverride", "install", "installed", "uninstall"]

_Patcher = TypeVar("_Patcher", bound=Any)


def install(
    model_patcher: _Patcher,
    handler: AttentionHandler,
    *,
    key: str = INSTALLED,
    layouts: Mapping[str, LayoutReader] = LAYOUTS,
) -> _Patcher:
    """Make a clone of a model whose attention calls reach ``handler``.

    An override that is already there becomes part of ``native``, and so does one that another node puts in its place
    later: the order of the nodes does not matter. Several handlers live side by side under different keys; the one
    installed last is asked first and the others are what its ``native`` asks. Installing under a key anew replaces.

    Args:
        model_patcher: ComfyUI's ``ModelPatcher``; stays as it is.
        handler: Answers the calls; shared by all later clones.
        key: Name of this installation.
        layouts: Reader of the token layout by class name of the network.

    Returns:
        The clone.

    Raises:
        ValueError: ``key`` is empty.
    """
    if not key:
        raise ValueError("an installation needs a key that is not empty")
    clone = uninstall(model_patcher, key=key)
    options: dict[str, Any] = clone.model_options.setdefault("transformer_options", {})
    override = ComfyOverride(handler, key=key, previous=options.get(OVERRIDE))
    options[OVERRIDE] = override
    options[INSTALLED] = {**options.get(INSTALLED, {}), key: override}
    wrappers = HostWrappers(override, layouts)
    clone.add_wrapper_with_key(OUTER_SAMPLE, key, wrappers.around_run)
    clone.add_wrapper_with_key(DIFFUSION_MODEL, key, wrappers.around_model)
    return clone


def uninstall(model_patcher: _Patcher, *, key: str = INSTALLED) -> _Patcher:
    """Make a clone of a model without the handler that was installed under ``key``, if there was one.

    What stood in the override's place before stands there again; where nothing did, the key is deleted. If another
    node keeps a reference to the override, that stays and lets every call of this clone pass.

    Args:
        model_patcher: ComfyUI's ``ModelPatcher``; stays as it is, handler included.
        key: Name of the installation.

    Returns:
        The clone.
    """
    clone: _Patcher = model_patcher.clone()
    options: dict[str, Any] = clone.model_options.setdefault("transformer_options", {})
    left = {name: one for name, one in options.get(INSTALLED, {}).items() if name != key}
    if left:
        options[INSTALLED] = left
    else:
        options.pop(INSTALLED, None)
    slot = options.get(OVERRIDE)
    while isinstance(slot, ComfyOverride) and left.get(slot.key) is not slot:
        slot = slot.previous
    if slot is not None:
        options[OVERRIDE] = slot
    else:
        options.pop(OVERRIDE, None)
    clone.remove_wrappers_with_key(OUTER_SAMPLE, key)
    clone.remove_wrappers_with_key(DIFFUSION_MODEL, key)
    return clone


def installed(model_patcher: Any) -> dict[str, AttentionHandler]:
    """Handlers of a model by the key under which they were installed, the first installed first."""
    options = model_patcher.model_options.get("transformer_options", {})
    return {key: override.handler for key, override in options.get(INSTALLED, {}).items()}
