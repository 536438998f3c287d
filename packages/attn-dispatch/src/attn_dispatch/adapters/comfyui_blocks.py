"""Names for the blocks of Flux-like networks in releases of ComfyUI that do not name them.

Newer releases write ``block_type`` and ``block_index`` into the options before each block. Older ones let a node
replace a block through ``patches_replace``; what is put there writes the same two entries and runs the block. It goes
into the options of one model call and nothing else, so the model and other nodes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

TYPE = "block_type"
"""Key in ``transformer_options`` of the kind of the running block: ``"double"`` or ``"single"``."""

INDEX = "block_index"
"""Key in ``transformer_options`` of its number within its kind."""

STREAMS = ("double", "single")
"""Kinds of blocks; a network keeps them in ``<kind>_blocks``, and ``patches_replace`` calls one ``<kind>_block``."""

Block = Callable[[dict[str, Any], dict[str, Any]], Any]
"""What stands for a block: called with its arguments and ``{"original_block": ...}``."""


class NamedBlock:
    """Runs a block under its name.

    Args:
        stream: Kind of the block.
        index: Number of the block within its kind.
        previous: What another node put in the block's place; ``None`` = the block itself.
    """

    def __init__(self, stream: str, index: int, previous: Block | None) -> None:
        self.stream = stream
        self.index = index
        self.previous = previous

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        """Answer as the block; arguments as ComfyUI passes them."""
        options = args.get("transformer_options")
        if options is not None:
            options[TYPE], options[INDEX] = self.stream, self.index
        return extra["original_block"](args) if self.previous is None else self.previous(args, extra)


@lru_cache(maxsize=64)
def _mentions(mro: tuple[Hashable, ...], word: str) -> bool:
    """Whether a word stands in the code of one of these classes."""
    functions = (value for base in mro for value in vars(base).values())
    codes = (getattr(function, "__code__", None) for function in functions)
    return any(word in code.co_consts for code in codes if code is not None)


def nameable(network: Any) -> bool:
    """Whether a network does not name its blocks and ``name_blocks`` can."""
    mro = type(network).__mro__
    has_blocks = all(isinstance(getattr(network, f"{one}_blocks", None), nn.ModuleList) for one in STREAMS)
    return has_blocks and not _mentions(mro, TYPE) and all(_mentions(mro, f"{one}_block") for one in STREAMS)


def names_blocks(network: Any) -> bool:
    """Whether the attention calls of a network have names, its own or those of ``name_blocks``."""
    return _mentions(type(network).__mro__, TYPE) or nameable(network)


def name_blocks(network: Any, options: dict[str, Any]) -> None:
    """See that the blocks of one model call run under their names; does nothing where they have them, or cannot.

    Args:
        network: The diffusion network.
        options: ``transformer_options`` of the call; dicts within, which other calls share, are copied.
    """
    if not nameable(network):
        return
    replaced: Mapping[str, Any] = options.get("patches_replace", {})
    blocks: dict[Any, Any] = dict(replaced.get("dit", {}))
    if any(isinstance(one, NamedBlock) for one in blocks.values()):
        return
    for stream in STREAMS:
        for index in range(len(getattr(network, f"{stream}_blocks"))):
            place = (f"{stream}_block", index)
            blocks[place] = NamedBlock(stream, index, blocks.get(place))
    options["patches_replace"] = {**replaced, "dit": blocks}
