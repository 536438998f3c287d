"""Independent random streams from one seed."""

import hashlib

import torch


def stream(seed: int, *names: object) -> torch.Generator:
    """Make a CPU generator that depends on the seed and on what it is for, and on nothing else.

    The weights of a layer, say, are then the same whichever other layers were made before it.

    Args:
        seed: The user's seed.
        *names: What the stream is for; compared by ``str``.
    """
    text = "/".join([str(seed), *(str(name) for name in names)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
