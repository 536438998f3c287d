"""The pack as ComfyUI sees it: one extension and its nodes. Needs a running ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .nodes.values import ClockedSweepValues, Combinations, LoadPromptListFromJSON, RandomSeedBatch


class ApproximateAttention(ComfyExtension):  # type: ignore[misc]  # the host has no types here
    """Nodes of Approximate Attention."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes in the order of registration."""
        return [RandomSeedBatch, LoadPromptListFromJSON, ClockedSweepValues, Combinations]
