"""The 8-bit product in plain torch: what the kernels are tested against, and the operator's CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def w8a8_linear(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``(a @ w.T) * a_scale * w_scale (+ bias) (+ residual)``: [M, N] of ``out_dtype``.

    a [M, K] and w [N, K] both int8 or float8_e4m3fn, a_scale float32 [1] or [M], w_scale float32 [1] or [N], bias [N],
    residual [M, N]. The sums of int8 are exact, those of float8 float32 in torch's order; then one float32 operation
    after the other, left to right as written. With ``out_dtype`` float64 everything is float64.
    """
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    # float64 holds every sum of int8 products that int32 does
    inside = torch.float64 if a.dtype == torch.int8 else wide
    y = (a.to(inside) @ w.to(inside).T).to(wide)
    y = y * a_scale.to(wide).reshape(-1, 1)
    y = y * w_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(out_dtype)
