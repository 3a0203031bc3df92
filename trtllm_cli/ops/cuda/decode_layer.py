"""Whole decoder layers for one token in one launch, blocks staying on their multiprocessors from layer to layer.

:class:`DecodeLayers` takes the layers once, checked and laid out for the kernel; its :meth:`~DecodeLayers.step` is the
operator ``trtllm_cli::decode_layers``. One step is all of a model's work on a token but embedding, last norm and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import decode_layer_params, decode_layer_twin, library
from trtllm_cli.ops.cuda.decode_layer_params import DecodeLayer
from trtllm_cli.ops.cuda.weight_only_packing import PackedWeight, WeightType

#: arguments of the operator after x which make up the layers, see :func:`_layers`
_PARTS = 12


class DecodeLayers:
    """Layers ready to run for one sequence at a time, on the device they lie on.

    Holds the table with the layers' addresses, the kernel's scratch memory and its failure word: two steps that may run
    at the same time need two. The layers' tensors must keep their places. Raises UnsupportedError KERNEL_REFUSED for
    layers that differ from each other or that the kernel does not know.
    """

    def __init__(
        self, layers: Sequence[DecodeLayer], *, norm_eps: float = 1e-5, norm_offset: float = 0.0, block_keys: int = 0
    ) -> None:
        decode_layer_params.check_layers(layers)
        self.layers = tuple(layers)
        self.norm_eps, self.norm_offset, self.block_keys = norm_eps, norm_offset, block_keys
        self.device = layers[0].k_cache.device
        self.failed = torch.zeros(1, dtype=torch.int32, device=self.device)
        size = 0
        if self.device.type == "cuda":
            params = decode_layer_params.sizes(layers[0], torch.empty(1, 1), 1)
            size = library.load().workspace_bytes("decode_layer", params)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._table = decode_layer_params.table(layers)
        first = layers[0].qkv
        self._kind = (first.type, first.group, first.has_zero)

    def step(
        self, x: Tensor, page_table: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, *, pdl: bool = False
    ) -> Tensor:
        """The last layer's output [1, hidden] for a token's row ``x`` [1, hidden] of the caches' type.

        ``page_table`` int32 [max_pages] and ``lengths`` int32 [1], the new token included, serve all layers; ``cos``
        and ``sin`` float32 [positions, D / 2] rotate the pairs (i, i + D / 2) of queries and keys by row
        ``lengths - 1``. The token's keys and values are written into every layer's cache. ``pdl``: the launch may
        overlap the end of the kernel before it.

        Raises UnsupportedError KERNEL_REFUSED for anything the kernel cannot do.
        """
        layers = self.layers
        weights = [w for layer in layers for w in layer.weights]
        result: Tensor = decode_layers(
            x,
            [layer.k_cache for layer in layers],
            [layer.v_cache for layer in layers],
            [w.data for w in weights],
            [w.scale for w in weights if w.scale is not None],
            [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)],
            [layer.qkv_bias for layer in layers if layer.qkv_bias is not None],
            [w.multiplier for w in weights],
            layers[0].qkv.n,
            layers[0].down.k,
            *self._kind,
            page_table,
            lengths,
            cos,
            sin,
            self._table,
            self.failed,
            self.workspace,
            self.norm_eps,
            self.norm_offset,
            self.block_keys,
            pdl,
        )
        return result

    def check(self) -> None:
        """Waits for the steps queued so far. Raises UnsupportedError KERNEL_LOST where blocks of one waited in vain for
        each other, which takes another kernel that holds multiprocessors for seconds: its results are void, and so is
        the scratch memory."""
        if int(self.failed):
            raise UnsupportedError(
                "KERNEL_LOST",
                "a step of decode_layer gave up: not all of its blocks could run at once",
                "run nothing else on this GPU, or use weight_only and mmha",
            )


@torch.library.custom_op(
    "trtllm_cli::decode_layers", mutates_args=("k_caches", "v_caches", "failed", "workspace"), device_types="cuda"
)
def decode_layers(
    x: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    data: list[Tensor],
    scales: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    multipliers: list[float],
    qkv_rows: int,
    wide: int,
    type: str,
    group: int,
    has_zero: bool,
    page_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor,
    failed: Tensor,
    workspace: Tensor,
    norm_eps: float,
    norm_offset: float,
    block_keys: int,
    pdl: bool,
) -> Tensor:
    """:meth:`DecodeLayers.step` with the layers' parts; ``table`` holds the addresses of the very same tensors."""
    layer = _layers(
        k_caches[:1], v_caches, data, scales, norms, biases, multipliers, qkv_rows, wide, type, group, has_zero
    )[0]
    decode_layer_params.check_step(x, layer, page_table, lengths, cos, sin, norm_eps)
    out = torch.empty_like(x)
    params = decode_layer_params.sizes(layer, cos, page_table.shape[0])
    params.layers = len(k_caches)
    for name, tensor in (("x", x), ("out", out), ("table", table), ("page_table", page_table), ("lengths", lengths)):
        setattr(params, name, tensor.data_ptr())
    params.cos, params.sin, params.failed = cos.data_ptr(), sin.data_ptr(), failed.data_ptr()
    params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.nbytes
    params.norm_eps, params.norm_offset = norm_eps, norm_offset
    params.block_keys, params.pdl = block_keys, int(pdl)
    library.load().launch("decode_layer", params)
    return out


@decode_layers.register_kernel("cpu")
def _(x: Tensor, *rest: Any) -> Tensor:
    layers = _layers(*rest[:_PARTS])
    page_table, lengths, cos, sin, _table, _failed, _workspace, norm_eps, norm_offset, *_ = rest[_PARTS:]
    decode_layer_params.check_step(x, layers[0], page_table, lengths, cos, sin, norm_eps)
    return decode_layer_twin.decode_layers(x, layers, page_table, lengths, cos, sin, norm_eps, norm_offset)


@decode_layers.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x)


def _layers(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    data: list[Tensor],
    scales: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    multipliers: list[float],
    qkv_rows: int,
    wide: int,
    type: str,
    group: int,
    has_zero: bool,
) -> list[DecodeLayer]:
    """The parts put together again: as many layers as ``k_caches`` has caches."""
    hidden, (_, kv_heads, _, size) = norms[0].shape[0], k_caches[0].shape
    shapes = ((qkv_rows, hidden), (hidden, qkv_rows - 2 * kv_heads * size), (2 * wide, hidden), (hidden, wide))
    kind = cast(WeightType, type)
    found = []
    for i, k_cache in enumerate(k_caches):

        def weight(product: int, layer: int = i) -> PackedWeight:
            at, (n, k) = 4 * layer + product, shapes[product]
            scale = scales[at] if scales else None
            return PackedWeight(kind, n, k, data[at], scale, group, has_zero, multiplier=multipliers[at])

        norm, mlp_norm, bias = norms[2 * i], norms[2 * i + 1], biases[i] if biases else None
        found.append(
            DecodeLayer(weight(0), weight(1), weight(2), weight(3), norm, mlp_norm, k_cache, v_caches[i], bias)
        )
    return found
