"""Entry point for ComfyUI when this repository is cloned into ``custom_nodes``; Python projects import the packages."""

from importlib import import_module

_pack = import_module(".packages.comfy-nodes", __name__)
WEB_DIRECTORY, comfy_entrypoint = _pack.WEB_DIRECTORY, _pack.comfy_entrypoint
