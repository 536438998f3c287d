"""What a node tells while it runs."""


def say_on_node(text: str, node_id: object) -> None:
    """Show a text on a node of the page.

    Args:
        text: A line or a few.
        node_id: The node's ``unique_id``; without one, or without a server, nothing is shown.
    """
    try:
        from server import PromptServer  # type: ignore[import-not-found]
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, str(node_id))
