"""Attention through a positive feature map, in time linear in the tokens."""

from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.kernel_regression.reference import kernel_regression_reference
from attn_kernels.partial import Partial


def kernel_regression(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Average the values with weights ``phi_q . phi_k`` (Katharopoulos et al. 2020, eq. 5; Nadaraya-Watson regression).

    ``out_i = phi_i (sum_j phi_j v_j^T) / max(phi_i . sum_j phi_j, eps)``, summed in float32. The features must not be
    negative; that is not checked, since it would wait for the device.

    Args:
        phi_q: ``[B, H, Nq, F]``, features of the queries.
        phi_k: ``[B, H, Nk, F]``, features of the keys.
        v: ``[B, H, Nk, Dv]``.
        key_mask: ``[B, Nk]`` bool, True = keep.
        eps: Smallest denominator.
        impl: Only the reference exists; it is differentiable and its memory is bounded.

    Returns:
        ``Partial``; its ``lse`` is the logarithm of the denominator, so that the features' weights can share one
        denominator with weights ``exp(score)``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``eps`` is not positive.
    """
    # Features and values may differ in dtype; a view without columns stands for the values in the check.
    check_qkv(phi_q, phi_k, v[..., :0].to(phi_q.dtype))
    check_key_mask(key_mask, phi_k)
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")
    resolve_impl(impl, {Impl.REFERENCE: None})
    return kernel_regression_reference(phi_q, phi_k, v, key_mask=key_mask, eps=eps)
