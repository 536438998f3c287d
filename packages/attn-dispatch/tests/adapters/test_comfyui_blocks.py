"""Names for blocks; that calls are named in every host is tested in ``test_comfyui.py``."""

from types import SimpleNamespace
from typing import Any

import torch
from attn_dispatch.adapters.comfyui_blocks import NamedBlock, name_blocks, nameable, names_blocks
from attn_dispatch.adapters.comfyui_fake import FakeFlux
from torch import nn


class Replaceable(FakeFlux):
    """Lets a node replace blocks and names none."""

    def __init__(self) -> None:
        super().__init__(named=False)
        self.double_blocks, self.single_blocks = self.tiny.transformer_blocks, self.tiny.single_transformer_blocks


class Named(Replaceable):
    """Names its blocks itself."""

    def _name(self, options: dict[str, Any], kind: str, index: int) -> None:
        options["block_type"] = kind


class Fixed(nn.Module):
    """Has such blocks, and nobody can replace them."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList()


def test_only_networks_without_names_whose_blocks_can_be_replaced_are_named() -> None:
    assert [nameable(one) for one in (Replaceable(), Named(), Fixed(), FakeFlux(named=False), None)] == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert [names_blocks(one) for one in (Replaceable(), Named(), Fixed())] == [True, True, False]


def test_what_another_node_put_in_a_block_s_place_still_runs_and_its_dict_stays() -> None:
    seen: list[Any] = []

    def foreign(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append((args["transformer_options"]["block_type"], args["transformer_options"]["block_index"]))
        return extra["original_block"](args)

    theirs = {("single_block", 1): foreign}
    shared = {"dit": theirs, "attn1": {}}
    options: dict[str, Any] = {"patches_replace": shared}
    network = Replaceable()
    given = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 8)
    plain = network(*given, transformer_options={"patches_replace": shared | {"dit": {}}})
    name_blocks(network, options)
    name_blocks(network, options)
    assert shared == {"dit": theirs, "attn1": {}}
    assert theirs == {("single_block", 1): foreign}
    blocks = options["patches_replace"]["dit"]
    assert len(blocks) == 2 + 3
    assert not any(isinstance(one.previous, NamedBlock) for one in blocks.values()), "named once"
    assert torch.equal(network(*given, transformer_options=options), plain)
    assert seen == [("single", 1)]


def test_a_block_that_is_called_without_options_runs() -> None:
    extra = {"original_block": lambda args: {"img": args["img"] + 1}}
    assert NamedBlock("double", 0, None)({"img": 1}, extra) == {"img": 2}


def test_a_network_that_names_itself_is_left_alone() -> None:
    options: dict[str, Any] = {}
    name_blocks(Named(), options)
    name_blocks(SimpleNamespace(), options)
    assert options == {}
