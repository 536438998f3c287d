"""Students as something that a router may choose."""

import torch
from attn_dispatch import AttentionCall
from torch import Tensor

from ttr_distill.student.bank import StudentBank
from ttr_distill.student.feature_map_gradient import native_products
from ttr_distill.student.serving import ServingCopies


class StudentBackend:
    """Answers calls with the student of their layer, without gradients.

    Calls in half precision are answered by copies whose feature maps are cast once, and again only after a change of
    the weights; the bank itself stays float32.

    Args:
        bank: The students.
        mixed_precision: Answer float32 calls by copies too, whose feature networks multiply in bfloat16, on devices
            that multiply it faster than float32; features and sums over tokens stay float32.
    """

    name = "student"

    def __init__(self, bank: StudentBank, *, mixed_precision: bool = False) -> None:
        self.bank = bank
        self.mixed_precision = mixed_precision
        self._copies = ServingCopies()

    def refuses(self, call: AttentionCall) -> str | None:
        """Say why no student can answer; ``None`` if one can."""
        if call.layer is None:
            return "the host does not name its layers"
        if call.layer not in self.bank:
            return "no student for this layer"
        return self.bank[call.layer].refuses(call)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, N, Dv]`` in the dtype of v.

        Raises:
            ValueError: ``refuses`` has a reason.
        """
        reason = self.refuses(call)
        if reason is not None or call.layer is None:
            raise ValueError(f"the student cannot answer this call: {reason}")
        dtype, widened = call.q.dtype, False
        if self.mixed_precision and dtype is torch.float32:
            dtype, widened = native_products(call.q.device) or dtype, True
        student = self._copies.get(call.layer, self.bank[call.layer], dtype, products_only=widened)
        if student.training:
            student.eval()
        with torch.no_grad():
            output: Tensor = student(call)
        return output
