"""Launches of the Triton kernels of attention through feature maps."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from attn_kernels.kernel_regression.feature_map import FeatureMap, HedgehogFeatureMap, MlpFeatureMap
from attn_kernels.kernel_regression.fused_config import KernelConfig, kernel_config, key_splits, triton_dtype
from attn_kernels.kernel_regression.fused_hedgehog import hedgehog_attention_fused
from attn_kernels.kernel_regression.fused_mlp import (
    mlp_features_fwd_kernel,
    mlp_hidden_fwd_kernel,
    mlp_readout_fwd_kernel,
)
from attn_kernels.kernel_regression.fused_state import state_fwd_kernel
from attn_kernels.kernel_regression.normaliser import drop_empty_rows, mean_values
from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.triton_support import interpreted

CHUNK_BYTES = 1 << 28
"""Bytes of hidden values held at a time."""


def feature_map_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    key_mask: Tensor | None,
    eps: float,
    map_dtype: torch.dtype | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Partial:
    """Compute ``feature_map_attention`` with Triton kernels.

    Operands of the maps are rounded to ``map_dtype`` (the dtype of ``q`` if ``None``), those of the sums over keys to
    the dtype of ``q``; all sums and functions are float32. Beyond inputs and outputs the device holds, of
    a three-layer map, ``chunk_bytes`` of hidden values (at least those of 128 tokens), as many features as belong to
    them, and the partial states of the splits; of a Hedgehog map the partial states alone.

    Arguments as in ``feature_map_attention``, checked; both maps are of one kind.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    # The kernels walk a row of q, k and v with stride 1.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    keep = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    if isinstance(map_q, HedgehogFeatureMap) and isinstance(map_k, HedgehogFeatureMap):
        part = hedgehog_attention_fused(q, k, v, map_q, map_k, keep=keep, eps=eps, map_dtype=map_dtype)
    elif isinstance(map_q, MlpFeatureMap) and isinstance(map_k, MlpFeatureMap):
        launch = _MlpLaunch(q, max(map_q.hidden, map_k.hidden), map_dtype, chunk_bytes)
        part = launch.read(q, v, map_q, *mean_values(*launch.state(k, v, map_k, keep), launch.state_dtype), eps)
    else:
        raise TypeError("the maps of queries and keys are of two kinds")
    return drop_empty_rows(part, key_mask)


class _MlpLaunch:
    """What the launches of one call share.

    Args:
        q: ``[B, H, Nq, D]``.
        hidden: The wider of both maps' hidden layers.
        map_dtype: Dtype of the maps' operands; that of ``q`` if ``None``.
        chunk_bytes: Bytes of hidden values held at a time.
    """

    def __init__(self, q: Tensor, hidden: int, map_dtype: torch.dtype | None, chunk_bytes: int) -> None:
        self.batch, self.heads, _, width = q.shape
        self.sequences = self.batch * self.heads
        self.dtype = map_dtype or q.dtype
        self.state_dtype = q.dtype
        self.target = device_target(q.device)
        self.interpret = interpreted()
        self.approximate = self.dtype is not torch.float32 and torch.version.hip is None and not self.interpret
        self.block_d = max(16, triton.next_power_of_2(width))
        rows = chunk_bytes // (self.sequences * hidden * self.dtype.itemsize)
        self.chunk = max(128, rows // 128 * 128)
        self.device = q.device

    def config(self, kernel: str, dtype: torch.dtype) -> KernelConfig:
        """Look up block sizes."""
        return kernel_config(kernel, self.target, dtype is not torch.float32)

    def hidden(self, x: Tensor, feature_map: MlpFeatureMap) -> Tensor:
        """Compute the hidden values ``[B * H, n, hidden]`` of ``x`` ``[B, H, n, D]``."""
        tokens, hidden = x.shape[2], feature_map.hidden
        out = torch.empty(self.sequences, tokens, hidden, dtype=self.dtype, device=self.device)
        config = self.config("mlp_hidden", self.dtype)
        grid = (triton.cdiv(tokens, config.rows), triton.cdiv(hidden, config.columns), self.sequences)
        mlp_hidden_fwd_kernel[grid](
            x,
            feature_map.w1,
            feature_map.b1,
            feature_map.w2,
            feature_map.b2,
            out,
            tokens,
            self.heads,
            *x.stride()[:3],
            WIDTH=x.shape[3],
            HIDDEN=hidden,
            BLOCK_D=self.block_d,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_J=config.inner,
            OPERAND=triton_dtype(self.dtype),
            APPROXIMATE=self.approximate,
            INTERPRET=self.interpret,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        return out

    def features(self, k: Tensor, feature_map: MlpFeatureMap, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute features ``[B * H, n, F]`` and weights ``[B * H, n]`` of keys ``[B, H, n, D]``."""
        hidden, tokens = self.hidden(k, feature_map), k.shape[2]
        phi = torch.empty(self.sequences, tokens, feature_map.features, dtype=self.state_dtype, device=self.device)
        weight = torch.empty(self.sequences, tokens, dtype=torch.float32, device=self.device)
        config = self.config("mlp_features", self.dtype)
        mlp_features_fwd_kernel[(triton.cdiv(tokens, config.rows), self.sequences)](
            hidden,
            feature_map.w3,
            feature_map.b3,
            keep,
            phi,
            weight,
            tokens,
            self.heads,
            0 if keep is None else keep.stride(0),
            feature_map.norm_eps,
            HIDDEN=feature_map.hidden,
            FEATURES=feature_map.features,
            NORMALISE=feature_map.normalise,
            BLOCK_M=config.rows,
            BLOCK_F=config.columns,
            BLOCK_K=config.inner,
            OPERAND=triton_dtype(self.dtype),
            INTERPRET=self.interpret,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        return phi, weight

    def state(self, k: Tensor, v: Tensor, feature_map: MlpFeatureMap, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum features with values ``[B * H, F, Dv]`` and alone ``[B * H, F]``, chunk by chunk."""
        feature_map = self.cast(feature_map)
        config = self.config("state", self.state_dtype)
        features, values, keys = feature_map.features, v.shape[3], k.shape[2]
        blocks = triton.cdiv(features, config.rows)
        state = torch.zeros(self.sequences, features, values, dtype=torch.float32, device=self.device)
        sums = torch.zeros(self.sequences, features, dtype=torch.float32, device=self.device)
        for start in range(0, keys, self.chunk):
            some = slice(start, min(start + self.chunk, keys))
            kept = None if keep is None else keep[:, some]
            phi, weight = self.features(k[:, :, some], feature_map, kept)
            chunk_values = v[:, :, some]
            splits, per_split = key_splits(blocks * self.sequences, some.stop - some.start)
            parts = state.new_empty(splits, *state.shape)
            part_sums = sums.new_empty(splits, *sums.shape)
            state_fwd_kernel[(blocks, splits, self.sequences)](
                phi,
                weight,
                chunk_values,
                parts,
                part_sums,
                phi.shape[1],
                self.heads,
                per_split,
                *v.stride()[:3],
                FEATURES=features,
                VALUES=values,
                BLOCK_F=config.rows,
                BLOCK_N=config.columns,
                BLOCK_V=max(16, triton.next_power_of_2(values)),
                OPERAND=triton_dtype(self.state_dtype),
                INTERPRET=self.interpret,
                STAGES=config.stages,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            state += parts.sum(dim=0)
            sums += part_sums.sum(dim=0)
        return state, sums

    def read(
        self,
        q: Tensor,
        v: Tensor,
        feature_map: MlpFeatureMap,
        means: Tensor,
        weights: Tensor,
        scale: Tensor,
        eps: float,
    ) -> Partial:
        """Read ``mean_values`` out by the queries ``[B, H, Nq, D]``, chunk by chunk."""
        feature_map = self.cast(feature_map)
        config = self.config("mlp_readout", self.dtype)
        queries, values = q.shape[2], v.shape[3]
        out = torch.empty(self.batch, self.heads, queries, values, dtype=v.dtype, device=self.device)
        lse = torch.empty(self.batch, self.heads, queries, dtype=torch.float32, device=self.device)
        for start in range(0, queries, self.chunk):
            some = slice(start, min(start + self.chunk, queries))
            hidden = self.hidden(q[:, :, some], feature_map)
            mlp_readout_fwd_kernel[(triton.cdiv(hidden.shape[1], config.rows), self.sequences)](
                hidden,
                feature_map.w3,
                feature_map.b3,
                means,
                weights,
                scale,
                out[:, :, some],
                lse[:, :, some],
                hidden.shape[1],
                self.heads,
                *out.stride()[:3],
                *lse.stride()[:2],
                feature_map.norm_eps,
                eps,
                HIDDEN=feature_map.hidden,
                FEATURES=feature_map.features,
                VALUES=values,
                NORMALISE=feature_map.normalise,
                BLOCK_M=config.rows,
                BLOCK_F=config.columns,
                BLOCK_K=config.inner,
                BLOCK_V=max(16, triton.next_power_of_2(values)),
                OPERAND=triton_dtype(self.dtype),
                STATE_OPERAND=triton_dtype(self.state_dtype),
                INTERPRET=self.interpret,
                STAGES=config.stages,
                num_warps=config.warps,
                num_stages=config.stages,
            )
        return Partial(out, lse)

    def cast(self, feature_map: MlpFeatureMap) -> MlpFeatureMap:
        """Bring matrices into the dtype of the operands; a bias is added in float32 and stays as it is."""
        matrices = {name: getattr(feature_map, name).to(self.dtype).contiguous() for name in ("w1", "w2", "w3")}
        vectors = {name: getattr(feature_map, name).contiguous() for name in ("b1", "b2", "b3")}
        return replace(feature_map, **matrices, **vectors)
