"""What a data-free weight method provides. Calibrated methods add the statistics they need beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.artifacts.schema import WeightScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a weight, quantized: tensors by suffix (``weight``, ``weight_scale``, ``weight_zero``), and what
    they stand for (float32, same shape as the rows)."""

    tensors: Mapping[str, torch.Tensor]
    dequantized: torch.Tensor


class WeightMethod(Protocol):
    """A method whose result for a row depends on that row alone, so a weight can be streamed in blocks of rows."""

    def scheme(self, in_features: int, group_size: int, symmetric: bool) -> tuple[WeightScheme, str | None]:
        """The scheme for a layer of that width, and a note where it is not the one asked for.

        Raises UnsupportedError when no scheme fits.
        """
        ...

    def tensors(
        self, scheme: WeightScheme, out_features: int, in_features: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (safetensors dtype code, shape) of what :meth:`quantize` makes for the whole weight."""
        ...

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme, search: bool = False) -> QuantizedRows:
        """Quantize float32 rows [n, K]; with ``search`` each scale is the one with the least squared error.

        With one scale per tensor ``rows`` must be the whole weight.
        """
        ...
