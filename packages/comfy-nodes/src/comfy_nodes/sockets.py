"""Types of links between nodes of this pack."""

from comfy_api.latest import io

TRAINING_CONFIG = io.Custom("TTR_TRAINING_CONFIG")
"""Settings of training: a dictionary with four sections."""

CONTROLLER = io.Custom("TTR_CONTROLLER")
"""A trained routing policy."""
