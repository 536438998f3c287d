from dataclasses import dataclass
from typing import Any

import pytest
from attn_dispatch.backends import Option, option


@dataclass(frozen=True)
class Settings:
    on: bool = option(True, "A switch.")
    count: int = option(4, "A number of things.", 0, 8, 2)
    share: float = option(0.5, "A share.", 0.0, 1.0, 0.05)
    kind: str = option("a", "A choice.", choices=("a", "b"))
    unlisted: int = 3


def test_inputs_say_what_the_fields_say(host: Any) -> None:
    from comfy_nodes.schema import inputs_of

    on, count, share, kind = inputs_of(Settings)
    assert [(i.id, i.type, i.default, i.tooltip) for i in (on, count, share, kind)] == [
        ("on", "BOOLEAN", True, "A switch."),
        ("count", "INT", 4, "A number of things."),
        ("share", "FLOAT", 0.5, "A share."),
        ("kind", "COMBO", "a", "A choice."),
    ]
    assert (count.min, count.max, count.step) == (0, 8, 2)
    assert isinstance(count.max, int)
    assert (share.min, share.max, share.step, share.round) == (0.0, 1.0, 0.05, False)
    assert kind.options == ["a", "b"]
    assert not any(i.optional or i.advanced for i in (on, count, share, kind))


def test_chosen_folded_and_optional_inputs(host: Any) -> None:
    from comfy_nodes.schema import inputs_of

    share, on = inputs_of(Settings, "share", "on", advanced=("on",), optional=True)
    assert (share.id, share.advanced, share.optional) == ("share", False, True)
    assert (on.id, on.advanced, on.optional) == ("on", True, True)
    assert all(one.advanced for one in inputs_of(Settings, advanced=True))
    with pytest.raises(ValueError, match=r"Settings has no option unlisted; it has on, count"):
        inputs_of(Settings, "unlisted")


def test_an_older_host_is_not_told_what_it_does_not_know(old_host: Any) -> None:
    from comfy_nodes.schema import inputs_of, node_schema, widget

    assert not any(one.advanced for one in inputs_of(Settings, advanced=True))
    assert widget("text", "", Option("A text."), advanced=True, multiline=True).multiline
    assert node_schema(node_id="Mine", search_aliases=["x"]).node_id == "Mine"


def test_a_new_host_is_told(host: Any) -> None:
    from comfy_nodes.schema import node_schema, widget

    assert node_schema(node_id="Mine", search_aliases=["x"]).search_aliases == ["x"]
    key = widget("key", "", Option("A text."), socketless=True)
    assert (key.type, key.socketless) == ("STRING", True)
    assert widget("size", 2, Option("No range.")).min is None


def test_what_a_node_got_becomes_its_configuration(host: Any) -> None:
    from comfy_nodes.schema import config_from

    assert config_from(Settings, {"count": 6, "model": object(), "unlisted": 9}) == Settings(count=6)


def test_types_of_links(host: Any) -> None:
    from comfy_nodes import sockets

    assert sockets.TRAINING_CONFIG.io_type == "TTR_TRAINING_CONFIG"
    assert sockets.CONTROLLER.io_type == "TTR_CONTROLLER"


@pytest.mark.parametrize(
    ("minimum", "step", "expected"),
    [
        (0.0, 0.05, 0.05),
        (1e-12, 1e-6, 1e-12),
        (1e-7, 1e-7, 1e-7),
        (0.01, 0.001, 0.001),
        (-10.0, 0.001, 0.001),
        (None, 1, 1),
    ],
)
def test_every_number_of_the_range_can_be_reached(
    host: Any, minimum: float | None, step: float, expected: float
) -> None:
    from comfy_nodes.schema import reachable_step

    assert reachable_step(minimum, step) == expected
