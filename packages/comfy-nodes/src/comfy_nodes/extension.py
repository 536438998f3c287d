"""The pack as ComfyUI sees it: one extension and its nodes. Needs a running ComfyUI."""

import logging

from comfy_api.latest import ComfyExtension, io

from .nodes.approximate import ApproximateAttention, AttentionBackend
from .nodes.backends import HybridTaylorAttentionBackend, TaylorAttentionBackend
from .nodes.controller import Flux2TTRController
from .nodes.controller_training import Flux2TTRControllerTrainer
from .nodes.distill import Flux2TTR, Flux2TTRTrainer
from .nodes.report import AttentionReport
from .nodes.training_config import Flux2TTRTrainingParameters
from .nodes.values import ClockedSweepValues, Combinations, LoadPromptListFromJSON, RandomSeedBatch

logger = logging.getLogger(__name__)

NODES: tuple[type[io.ComfyNode], ...] = (
    ApproximateAttention,
    AttentionBackend,
    AttentionReport,
    TaylorAttentionBackend,
    HybridTaylorAttentionBackend,
    Flux2TTRTrainingParameters,
    Flux2TTRTrainer,
    Flux2TTRControllerTrainer,
    Flux2TTRController,
    Flux2TTR,
    RandomSeedBatch,
    LoadPromptListFromJSON,
    ClockedSweepValues,
    Combinations,
)
"""Every node, in the order of registration."""


class ApproximateAttentionExtension(ComfyExtension):  # type: ignore[misc]  # the host has no types here
    """Nodes of Approximate Attention."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes; ComfyUI asks once, while it loads the pack."""
        logger.info(
            "Approximate Attention: %d nodes; start with 'Approximate Attention' before the sampler", len(NODES)
        )
        return list(NODES)
