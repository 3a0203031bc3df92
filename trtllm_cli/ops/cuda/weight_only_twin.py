"""The weight-only product in plain torch: the definition the kernels are tested against, and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtllm_cli.ops.cuda.weight_only_packing import PackedWeight, unpack_weight


def weight_only_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    gate: str = "none",
) -> Tensor:
    """``act(norm(x) @ W.T + bias) + residual`` for x [M, K], in float32, for float64 x in float64; of x's type.

    The normalised x is rounded to x's type before the product (float64 is not), the result once, at the end.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    left = x.to(wide)
    if norm_weight is not None:
        scale = torch.rsqrt(left.square().mean(dim=-1, keepdim=True) + norm_eps)
        left = (left * scale * (norm_offset + norm_weight.to(wide))).to(x.dtype).to(wide)
    y = left @ unpack_weight(weight, wide).T
    if bias is not None:
        y = y + bias.to(wide)
    if gate != "none":
        pairs = y.view(y.shape[0], -1, 2, 8)
        width = y.shape[1] // 2
        y = activate(pairs[:, :, 0].reshape(-1, width), gate) * pairs[:, :, 1].reshape(-1, width)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)


def activate(x: Tensor, gate: str) -> Tensor:
    """silu, gelu (erf) or gelu_tanh."""
    return F.silu(x) if gate == "silu" else F.gelu(x, approximate="tanh" if gate == "gelu_tanh" else "none")
