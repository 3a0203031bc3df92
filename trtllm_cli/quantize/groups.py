"""What the layer-wise walk works on: linears that share an input, and what a layer became."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trtllm_cli.artifacts.schema import LayerQuantization
from trtllm_cli.ops.quantized import quantize_activation
from trtllm_cli.quantize.selection import Choice
from trtllm_cli.quantize.statistics import Statistics

#: token rows on which a module's output error is measured
_ERROR_ROWS = 512


@dataclass(frozen=True)
class Group:
    """Linears of one input. Scale moves out of the input into ``source``: a norm, or the rows of a linear."""

    key: str
    modules: tuple[str, ...]
    source: str
    norm: bool


GROUPS = (
    Group("attn.qkv", ("attn.q", "attn.k", "attn.v"), "attn_norm", True),
    Group("attn.o", ("attn.o",), "attn.v", False),
    Group("mlp.gate_up", ("mlp.gate", "mlp.up"), "mlp_norm", True),
    Group("mlp.down", ("mlp.down",), "mlp.up", False),
)


@dataclass
class LayerResult:
    """What a layer became: tensors by canonical name (only those that changed or are new) and a record a module."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerQuantization] = field(default_factory=list)


def output_error(found: Statistics, weight: Tensor, made: Tensor, choice: Choice, scale: Tensor | None) -> float:
    """||Y - Y'|| / ||Y|| over some of the sampled tokens, the input's quantization included."""
    x = found.sample[:: max(1, found.sample.shape[0] // _ERROR_ROWS)].float()
    exact = F.linear(x, weight)
    if choice.activation is None:
        difference = F.linear(x, made - weight)
    else:
        values, scales = quantize_activation(x, choice.activation.type, scale)
        difference = F.linear(values * scales, made) - exact
    norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) / norm if norm else 0.0
