"""Entry point for ComfyUI when this folder is linked or copied into ``custom_nodes``."""

from .src.comfy_nodes import WEB_DIRECTORY, comfy_entrypoint

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
