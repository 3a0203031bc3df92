"""FP8 weights: E4M3 (Micikevicius et al., 2022, "FP8 Formats for Deep Learning"), round to nearest, ties to even.

scale = max|w| / 448 per output channel or for the whole tensor, value = e4m3(w / scale). A row (or tensor) of zeros
gets scale 1. The same weights serve weight-only and, with an activation scheme beside them, FP8 products.

A floating-point grid looks the same at every power of two, so a scale can only move the weights within one octave.
``search`` tries :data:`PHASES` scales from max/448 up to just below twice that (nothing is clipped) and keeps the one
of the smallest squared error for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods.base import QuantizedRows

if TYPE_CHECKING:
    import torch

#: scales an octave that the search tries
PHASES = 8


class Fp8:
    """A WeightMethod; see the module. Group size and symmetry do not apply.

    With granularity "tensor" :meth:`quantize` must be given the whole weight: one scale serves all its rows.
    """

    def __init__(self, granularity: Literal["channel", "tensor"] = "channel") -> None:
        self.granularity = granularity

    def scheme(self, in_features: int, group_size: int, symmetric: bool) -> tuple[WeightScheme, str | None]:
        return WeightScheme(type="fp8", granularity=self.granularity), None

    def tensors(
        self, scheme: WeightScheme, out_features: int, in_features: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        scales = 1 if scheme.granularity == "tensor" else out_features
        return {"weight": ("F8_E4M3", (out_features, in_features)), "weight_scale": ("F32", (scales,))}

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme, search: bool = False) -> QuantizedRows:
        import torch

        from trtllm_cli.ops.quantized import dequantize_8bit

        scale = scales(rows, scheme.granularity == "tensor", search)
        values = (rows / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return QuantizedRows({"weight": values, "weight_scale": scale}, dequantize_8bit(values, scale))


def scales(rows: torch.Tensor, per_tensor: bool, search: bool) -> torch.Tensor:
    """Scales of float32 rows [n, K]: float32 [n], or [1] per tensor."""
    import torch

    from trtllm_cli.ops.quantized import TOP, round_8bit

    largest = rows.abs().amax().view(1) if per_tensor else rows.abs().amax(dim=1)
    # below this a division would overflow: such rows are zero for every purpose
    base = torch.where(largest > torch.finfo(torch.float32).tiny * TOP["fp8"], largest / TOP["fp8"], 1.0)
    if not search:
        return base
    best, best_error = base, None
    for phase in range(PHASES):
        scale = base * 2 ** (phase / PHASES)
        error = (round_8bit(rows / scale[:, None], "fp8") * scale[:, None] - rows).square().sum(dim=1)
        error = error.sum().view(1) if per_tensor else error
        if best_error is None:
            best, best_error = scale, error
        else:
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


METHOD = Fp8()
