"""Asking ComfyUI for device memory while a model is being sampled."""

import torch


def reserve_memory(needed: int, device: torch.device) -> None:
    """Make ComfyUI free memory on a device by moving models away that the current run does not use.

    Args:
        needed: Bytes that must be free.
        device: Where; on a CPU nothing is done.
    """
    if device.type == "cpu":
        return
    from comfy import model_management

    in_use = [one for one in model_management.current_loaded_models if one.currently_used]
    model_management.free_memory(needed, device, keep_loaded=in_use)
