import sys
from typing import Any

import pytest


def test_a_text_reaches_the_node(host: Any) -> None:
    from comfy_nodes.progress import say_on_node

    say_on_node("it runs", 7)
    say_on_node("nobody", None)
    assert host.shown == [("it runs", "7")]


def test_without_a_server_nothing_happens(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nodes.progress import say_on_node

    monkeypatch.setattr(sys.modules["server"].PromptServer, "instance", None)
    say_on_node("it runs", 7)
    monkeypatch.setitem(sys.modules, "server", None)
    say_on_node("it runs", 7)
    assert host.shown == []
