"""Four-bit values in the 32-bit words of published checkpoints, and in the bytes of ours.

A word holds eight values. GPTQ and compressed-tensors put value 0 in its lowest four bits, so the bytes of a
(little-endian) word are already pairs as :func:`trtllm_cli.ops.quantized.pack_int4` makes them, and repacking only
moves bytes. AWQ's "gemm" layout interleaves even and odd columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.ops.quantized import pack_int4, unpack_int4

#: column that stands in the i-th four bits of an AWQ word
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_to_bytes(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 4 C], lowest byte first."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def bytes_to_words(packed: Tensor) -> Tensor:
    """uint8 [R, B] -> int32 [R, ceil(B / 4)], lowest byte first, zeros at the end."""
    missing = -packed.shape[1] % 4
    if missing:
        packed = torch.nn.functional.pad(packed, (0, missing))
    # flat first: a single row or column may have strides that a view of other width refuses
    return packed.reshape(-1).view(torch.int32).view(packed.shape[0], -1)


def rows_to_packed(words: Tensor) -> Tensor:
    """Words along the inputs, int32 [K/8, N] -> uint8 [N, K/2]."""
    rows, columns = words.shape
    return words.reshape(-1).view(torch.uint8).view(rows, columns, 4).permute(1, 0, 2).reshape(columns, rows * 4)


def packed_to_rows(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> words along the inputs, int32 [K/8, N]. K must be a multiple of 8."""
    outputs, size = packed.shape
    return packed.view(outputs, size // 4, 4).permute(1, 0, 2).reshape(-1).view(torch.int32).view(size // 4, outputs)


def unpack_columns(words: Tensor) -> Tensor:
    """Words along the columns, int32 [R, C/8] -> values uint8 [R, C], 0..15."""
    return unpack_int4(words_to_bytes(words))


def pack_columns(values: Tensor) -> Tensor:
    """Values uint8 [R, C], 0..15 -> words along the columns, int32 [R, ceil(C/8)], zeros at the end."""
    missing = -values.shape[1] % 8
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return bytes_to_words(pack_int4(values))


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ "gemm" words along the columns, int32 [R, C/8] -> values uint8 [R, C], 0..15."""
    stored = unpack_columns(words).view(words.shape[0], -1, 8)
    places = [AWQ_ORDER.index(column) for column in range(8)]
    return stored[:, :, places].reshape(words.shape[0], -1)
