"""Use an installed package once, for real: ``python -I smoke.py attn-kernels``.

The wheels session runs this where nothing but the wheels is installed, so it finds what an editable installation hides:
a data file that was not packed, a dependency that was not declared.
"""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path


def attn_kernels() -> str:
    """Join two halves of the keys and compare with attention over all of them."""
    import torch
    from attn_kernels import merge_partials, softmax_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    halves = [softmax_attention(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(merge_partials(*halves), softmax_attention(q, k, v))
    return "two halves of the keys join to the whole"


def attn_dispatch() -> str:
    """Send torch's own attention through a router without routes: bit-equal."""
    import torch
    from attn_dispatch import AttentionRouter, SdpaMode
    from torch.nn.functional import scaled_dot_product_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    expected = scaled_dot_product_attention(q, k, v)
    with SdpaMode(AttentionRouter(())):
        routed = scaled_dot_product_attention(q, k, v)
    if not torch.equal(routed, expected):
        raise AssertionError("an empty router changed the attention")
    return "an empty router is bit-equal"


def ttr_distill() -> str:
    """Load the embedded teacher from the wheel and take two sampling steps."""
    from ttr_distill.tiny import TinySampler, load_teacher, training_prompts

    samples = TinySampler(load_teacher(), rows=8, columns=8, steps=2).sample(training_prompts()[:1], [0])
    if tuple(samples.images.shape) != (1, 3, 32, 32) or not bool(samples.images.isfinite().all()):
        raise AssertionError(f"the embedded teacher gave {tuple(samples.images.shape)}")
    return "the embedded teacher samples"


def ttr_controller() -> str:
    """Ask the installed command for its help."""
    command = Path(sys.executable).with_name("ttr")
    run = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=120)
    if "quickstart" not in run.stdout:
        raise AssertionError(f"ttr --help does not name quickstart:\n{run.stdout}")
    return "ttr --help names quickstart"


def comfy_nodes() -> str:
    """Resolve the entry point by which ComfyUI finds the pack."""
    (point,) = (one for one in entry_points(group="comfyui.custom_nodes") if one.value == "comfy_nodes")
    if not Path(point.load().WEB_DIRECTORY).is_dir():
        raise AssertionError("the pack's web folder was not packed")
    return "ComfyUI's entry point resolves"


def value_utils() -> str:
    """Combine two lists."""
    from value_utils import parse_numbers

    numbers = [float(number) for number in parse_numbers("1, 2.5, 4")]
    if numbers != [1.0, 2.5, 4.0]:
        raise AssertionError(f"parse_numbers gave {numbers}")
    return "a list of numbers is read"


USES = (attn_kernels, attn_dispatch, ttr_distill, ttr_controller, comfy_nodes, value_utils)


def main(package: str) -> None:
    """Use the package and say what worked."""
    (use,) = (one for one in USES if one.__name__ == package.replace("-", "_"))
    print(f"{package}: {use()}")


if __name__ == "__main__":
    main(sys.argv[1])
