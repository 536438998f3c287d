"""Copies of students to serve with, in the dtype of the calls; the weights that learn stay float32."""

from copy import deepcopy

import torch
from attn_dispatch import LayerKey

from ttr_distill.grad import training_mode
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.feature_map import StudentFeatureMap

_HALF = (torch.bfloat16, torch.float16)
Version = tuple[int, tuple[tuple[int, int, int], ...]]


def serving_copy(student: StudentAttention, dtype: torch.dtype) -> StudentAttention:
    """Copy a student, cast its feature maps and freeze it.

    Only feature maps are cast: they hold nearly all weights, and the few others (blends, temperatures, the conditioner)
    lose more by it than it saves.

    Args:
        student: Left as it is.
        dtype: Dtype of the copy's feature maps.
    """
    with training_mode():
        copy = deepcopy(student).eval().requires_grad_(False)
        for module in copy.modules():
            if isinstance(module, StudentFeatureMap):
                module.to(dtype)
    return copy


class ServingCopies:
    """Keeps one cast copy per layer and makes it anew when the weights have changed.

    Whether they have is read from counters on the host, never from the device.
    """

    def __init__(self) -> None:
        self._copies: dict[LayerKey, tuple[torch.dtype, Version, StudentAttention]] = {}

    def get(
        self, layer: LayerKey, student: StudentAttention, dtype: torch.dtype, *, products_only: bool = False
    ) -> StudentAttention:
        """Return what should answer a call.

        Args:
            layer: Which layer the student is of.
            student: The student with the weights that learn.
            dtype: Dtype of the feature maps: that of the call, or half precision for a call that has more.
            products_only: The call has more, so that only maps whose products alone would be half may be cast.

        Returns:
            A copy in ``dtype`` for half precision if the student has a feature map, else the student itself.
        """
        maps = [module for module in student.modules() if isinstance(module, StudentFeatureMap)]
        if dtype not in _HALF or not maps or (products_only and not all(one.half_products for one in maps)):
            return student
        version = _version(student)
        kept = self._copies.get(layer)
        if kept is None or kept[:2] != (dtype, version):
            kept = (dtype, version, serving_copy(student, dtype))
            self._copies[layer] = kept
        return kept[2]


def _version(student: StudentAttention) -> Version:
    # An update raises the revision, any other change in place the tensor's counter; a move changes the storage.
    return student.revision, tuple((id(one), one.data_ptr(), one._version) for one in student.parameters())
