"""INT4 weight-only in groups of consecutive inputs, round to nearest.

Symmetric: scale = max|w| / 7 over the group, value = clamp(round(w / scale), -8, 7) + 8. (Dividing by 7.5, which uses
all sixteen codes but clips the largest magnitude, has the smaller squared error and measured the worse perplexity on
SmolLM2: 42.9 against 41.0.)
Asymmetric: scale = (max - min) / 15 with the range widened to hold zero, zero = round(-min / scale),
value = clamp(round(w / scale) + zero, 0, 15).
Scales are rounded to float16 first and the values computed against the rounded scale. An all-zero group gets scale 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.quantize.methods.base import QuantizedRows

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (128, 64, 32)


class Int4WeightOnly:
    """See the module. ``group_size`` -1 is one group for the whole row."""

    def scheme(self, in_features: int, group_size: int, symmetric: bool) -> tuple[WeightScheme, str | None]:
        size, note = group_size, None
        if in_features % 2:
            raise UnsupportedError(
                "WIDTH_ODD",
                f"a layer with {in_features} inputs cannot hold two int4 values a byte",
                "--method int8-weight-only",
            )
        if size != -1 and in_features % size:
            smaller = [candidate for candidate in GROUP_SIZES if candidate < size and in_features % candidate == 0]
            if not smaller:
                raise UnsupportedError(
                    "GROUP_SIZE",
                    f"no group size of {', '.join(map(str, GROUP_SIZES))} up to {size} divides {in_features} inputs",
                    "--group-size -1, or --override 'PATTERN=int8-weight-only' for such layers",
                )
            size = smaller[0]
            note = f"group size {size}: {group_size} does not divide {in_features} inputs"
        return (
            WeightScheme(type="int4", granularity="group", group_size=size, symmetric=symmetric, scale_dtype="float16"),
            note,
        )

    def tensors(
        self, scheme: WeightScheme, out_features: int, in_features: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = 1 if scheme.group_size == -1 else in_features // (scheme.group_size or in_features)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("U8", (out_features, in_features // 2)),
            "weight_scale": ("F16", (out_features, groups)),
        }
        if not scheme.symmetric:
            shapes["weight_zero"] = ("U8", (out_features, groups))
        return shapes

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme) -> QuantizedRows:
        import torch

        from trtllm_cli.ops.quantized import dequantize_int4, pack_int4

        count, width = rows.shape
        size = width if scheme.group_size == -1 else scheme.group_size or width
        grouped = rows.view(count, width // size, size)
        if scheme.symmetric:
            span = grouped.abs().amax(dim=2)
            scale = _storable(span / 7, span)
            zero = None
            values = (grouped / scale[:, :, None]).round().clamp(-8, 7) + 8
        else:
            low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
            scale = _storable((high - low) / 15, high - low)
            offset = (-low / scale).round().clamp(0, 15)
            values = ((grouped / scale[:, :, None]).round() + offset[:, :, None]).clamp(0, 15)
            zero = offset.to(torch.uint8)
        packed = pack_int4(values.to(torch.uint8).view(count, width))
        stored = scale.to(torch.float16)
        tensors = {"weight": packed, "weight_scale": stored}
        if zero is not None:
            tensors["weight_zero"] = zero
        return QuantizedRows(tensors, dequantize_int4(packed, stored, zero))


def _storable(scale: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The scale as float16 will hold it, never zero; 1 for an empty span."""
    import torch

    info = torch.finfo(torch.float16)
    if float(scale.max()) > info.max:
        raise UnsupportedError(
            "SCALE_RANGE",
            f"a group spans {float(span.max()):.3g}, its scale does not fit float16",
            "use int8-weight-only",
        )
    rounded = scale.to(torch.float16).float().clamp(min=info.smallest_normal)
    return torch.where(span > 0, rounded, torch.ones_like(rounded))


METHOD = Int4WeightOnly()
