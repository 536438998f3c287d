"""The students of a model, by layer."""

from collections.abc import Callable, Iterable, Mapping

import torch
from attn_dispatch import LayerKey
from torch import Tensor, nn

from ttr_distill.grad import training_mode
from ttr_distill.seeding import stream
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.feature_map_catalog import FeatureMaps
from ttr_distill.student.presets import StudentConfig, build_student
from ttr_distill.student.serving import serving_copy


class StudentBank(nn.Module):
    """One student per attention layer.

    Safe to make and to move inside ``torch.inference_mode()``: the parameters are ordinary tensors all the same.

    Args:
        config: Which student.
        students: The students by layer; at least one, all with the same heads and width.
    """

    def __init__(self, config: StudentConfig, students: Mapping[LayerKey, StudentAttention]) -> None:
        super().__init__()
        if not students:
            raise ValueError("a StudentBank needs at least one layer")
        self.config = config
        self.layers: tuple[LayerKey, ...] = tuple(sorted(students))
        first = students[self.layers[0]]
        self.heads, self.width = first.heads, first.width
        # Module names may hold anything but dots.
        self.students = nn.ModuleDict({str(layer).replace(".", "/"): students[layer] for layer in self.layers})
        self._by_layer = dict(students)
        self.eval()

    @classmethod
    def for_layers(
        cls,
        config: StudentConfig,
        layers: Iterable[LayerKey],
        heads: int,
        width: int,
        *,
        seed: int = 0,
        feature_maps: FeatureMaps | None = None,
    ) -> "StudentBank":
        """Make fresh students.

        Args:
            config: Which student.
            layers: Which layers.
            heads: Number of heads, H.
            width: Width of a head, D.
            seed: Initial weights; those of a layer do not depend on which other layers are in the bank.
            feature_maps: Custom feature maps that the config names; the built-in ones if ``None``.
        """
        with training_mode():
            students = {
                layer: build_student(
                    config, heads, width, generator=stream(seed, "student", layer), feature_maps=feature_maps
                )
                for layer in layers
            }
        return cls(config, students)

    def serving_copy(self, dtype: torch.dtype) -> "StudentBank":
        """Return a frozen copy to serve with, its feature maps in ``dtype``; the bank stays as it is."""
        return StudentBank(self.config, {layer: serving_copy(self[layer], dtype) for layer in self.layers})

    def __getitem__(self, layer: LayerKey) -> StudentAttention:
        return self._by_layer[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._by_layer

    def __len__(self) -> int:
        return len(self.layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StudentBank":
        # bank.to(device) in inference mode would leave inference tensors that can never be trained.
        with training_mode():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
