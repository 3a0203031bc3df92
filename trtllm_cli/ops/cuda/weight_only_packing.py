"""The packed layout of weight-only products, written from and read back to the checkpoint's layout.

``kernels/include/trtllm_kernels/weight_only.h`` describes it; in short: tiles of 16 rows x 128 (int4) or 64 (int8, fp8)
inputs with their scales, in which a lane of a matrix instruction finds what it multiplies in 16 contiguous bytes.
Packing is pure torch, runs on any device, and is done once, when an engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.quantized import unpack_int4

WeightType = Literal["int4", "int8", "fp8", "dense"]
ROW_PADDING = 64
STRIPE = 16
WEIGHT_BYTES = 1024
DEPTH = {"int4": 128, "int8": 64, "fp8": 64}
_ROTATION = 3
#: rows packed at a time: bounds temporaries, which are many times the result, for huge vocabularies
_BLOCK = 4096


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [n, k] as the kernels read it. For ``dense`` weights ``data`` is the matrix itself, contiguous.

    ``data`` uint8 [Np / 16, Kp / T, tile bytes]; ``scale`` float32 [Np] (8 bits only: int4 tiles carry theirs, and
    zeros where ``has_zero``, else the zero is 8); ``group`` inputs share an int4 scale; ``order`` int32 [k]:
    packed input i is input order[i] of the model; ``multiplier``: a power of two all weights are still to be multiplied
    by.
    """

    type: WeightType
    n: int
    k: int
    data: Tensor
    scale: Tensor | None = None
    group: int = 0
    has_zero: bool = False
    order: Tensor | None = None
    multiplier: float = 1.0

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return replace(
            self,
            data=self.data.to(device),
            scale=None if self.scale is None else self.scale.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads of it."""
        return sum(t.nbytes for t in (self.data, self.scale, self.order) if t is not None)


def pack_int4_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None = None, group: Tensor | None = None
) -> PackedWeight:
    """From uint8 [N, K/2] (low nibble first), scale [N, G], zero uint8 [N, G] and, with act-order, group int32 [K].

    Raises UnsupportedError KERNEL_REFUSED for group sizes other than 32, 64 and multiples of 128, and for groups of
    unequal size.
    """
    n, k = packed.shape[0], 2 * packed.shape[1]
    size, rest = divmod(k, scale.shape[1])
    if rest or (size not in (32, 64) and size % 128):
        raise _refused(
            f"int4 weights with {scale.shape[1]} groups over {k} inputs are not supported",
            "use groups of 32, 64 or 128",
        )
    order = None if group is None else _order(group, size)
    multiplier = _multiplier(scale)
    repeat = max(1, size // 128)
    padded = _up(n, ROW_PADDING)
    blocks = []
    for start in range(0, padded, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n))
        height = min(_BLOCK, padded - start)
        values = unpack_int4(packed[rows])
        if order is not None:
            values = values[:, order.long()]
        parts = [_int4_words(_lay_out(values, "int4", height))]
        scales = (scale[rows].float() / multiplier).half().repeat_interleave(repeat, dim=1)
        parts.append(_lay_out_groups(scales, height, k, size))
        if zero is not None:
            parts.append(_lay_out_groups(zero[rows].repeat_interleave(repeat, dim=1), height, k, size))
        blocks.append(torch.cat(parts, dim=2))
    return PackedWeight(
        "int4",
        n,
        k,
        torch.cat(blocks),
        group=min(size, 128),
        has_zero=zero is not None,
        order=order,
        multiplier=multiplier,
    )


def pack_8bit_weight(weight: Tensor, scale: Tensor) -> PackedWeight:
    """From int8 or float8_e4m3fn [N, K] and scale [N] or [1]."""
    n, k = weight.shape
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise _refused(f"8-bit weights cannot be {weight.dtype}", "use int8 or float8_e4m3fn")
    kind: WeightType = "int8" if weight.dtype == torch.int8 else "fp8"
    flip = 0x80 if kind == "int8" else 0  # int8 is stored 128 higher
    tiles = _lay_out(weight.view(torch.uint8) ^ flip, kind, _up(n, ROW_PADDING), padding=flip)
    rows = torch.zeros(_up(n, ROW_PADDING), dtype=torch.float32, device=weight.device)
    rows[:n] = scale.float()
    return PackedWeight(kind, n, k, tiles.reshape(*tiles.shape[:2], WEIGHT_BYTES), scale=rows)


def dense_weight(weight: Tensor) -> PackedWeight:
    """float16 or bfloat16 [N, K], as it is."""
    return PackedWeight("dense", weight.shape[0], weight.shape[1], weight.contiguous())


def unpack_weight(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the packed bytes stand for, [n, k] in the model's order of inputs, in ``dtype`` (float32, float64)."""
    if weight.type == "dense":
        return weight.data.to(dtype)
    stripes, along = weight.data.shape[:2]
    codes = weight.data[:, :, :WEIGHT_BYTES].contiguous()
    if weight.type == "int4":
        words = codes.view(torch.int32).long() & 0xFFFFFFFF
        words = (words >> _ROTATION | words << (32 - _ROTATION)) & 0xFFFFFFFF
        nibbles = torch.stack([words >> (4 * i) & 0xF for i in range(8)], dim=-1)
        values = _restore(nibbles.reshape(stripes, along, 2, 32, 4, 8), "int4").to(dtype)
        end = WEIGHT_BYTES + 4096 // weight.group
        scale = weight.data[:, :, WEIGHT_BYTES:end].contiguous().view(torch.float16)
        zeros = _restore_groups(weight.data[:, :, end:], weight.group).to(dtype) if weight.has_zero else 8.0
        full = (values - zeros) * _restore_groups(scale, weight.group).to(dtype)
    else:
        restored = _restore(codes.view(stripes, along, 2, 32, 4, 4), weight.type)
        if weight.type == "int8":
            values = (restored ^ 0x80).view(torch.int8).to(dtype)
        else:
            values = restored.view(torch.float8_e4m3fn).to(dtype)
        assert weight.scale is not None
        full = values * weight.scale.to(dtype)[:, None]
    full = full[: weight.n, : weight.k] * weight.multiplier
    if weight.order is None:
        return full
    natural = torch.empty_like(full)
    natural[:, weight.order.long()] = full
    return natural


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gated product: [width, ...] twice -> [2 width, ...], alternating in blocks of 8.

    For weights, scales, zeros and biases in the checkpoint's layout. ``width`` must be a multiple of 8.
    """
    width = gate.shape[0]
    if width % 8 or gate.shape != up.shape:
        raise _refused(
            f"gate and up of shapes {tuple(gate.shape)} and {tuple(up.shape)} cannot be interleaved",
            "use equal shapes with a multiple of 8 rows",
        )
    blocks = [t.reshape(width // 8, 1, 8, *t.shape[1:]) for t in (gate, up)]
    return torch.cat(blocks, dim=1).reshape(2 * width, *gate.shape[1:])


# A tile is [step, half of the step, c, e] with k = 16 step + 8 half + 2 c + e. A lane has a chunk, a row's values for
# one c. int4 words hold two steps: nibble i + 4 e with i = 2 (step % 2) + half; 8-bit words one: byte half + 2 e.
def _lay_out(values: Tensor, kind: str, height: int, padding: int = 0) -> Tensor:
    """uint8 [N, K] -> [height / 16, Kp / T, 2, 32, 4 words, 8 nibbles or 4 bytes], one element a value."""
    n, k = values.shape
    depth = DEPTH[kind]
    full = torch.full((height, _up(k, depth)), padding, dtype=torch.uint8, device=values.device)
    full[:n, :k] = values
    if kind == "int4":
        # stripe, half, row, tile, word, step of word, half of step, c, e
        # -> stripe, tile, half, row, c, word, e, step of word, half of step
        split = full.view(-1, 2, 8, full.shape[1] // depth, 4, 2, 2, 4, 2)
        laid = split.permute(0, 3, 1, 2, 7, 4, 8, 5, 6)
        return laid.reshape(*laid.shape[:2], 2, 32, 4, 8)
    split = full.view(-1, 2, 8, full.shape[1] // depth, 4, 2, 4, 2)
    laid = split.permute(0, 3, 1, 2, 6, 4, 7, 5)
    return laid.reshape(*laid.shape[:2], 2, 32, 4, 4)


def _restore(tiles: Tensor, kind: str) -> Tensor:
    """The inverse of `_lay_out`, with padding: [Np, Kp]."""
    stripes, along = tiles.shape[:2]
    if kind == "int4":
        laid = tiles.reshape(stripes, along, 2, 8, 4, 4, 2, 2, 2).permute(0, 2, 3, 1, 5, 7, 8, 4, 6)
    else:
        laid = tiles.reshape(stripes, along, 2, 8, 4, 4, 2, 2).permute(0, 2, 3, 1, 5, 7, 4, 6)
    return laid.reshape(stripes * STRIPE, along * DEPTH[kind]).contiguous()


def _int4_words(tiles: Tensor) -> Tensor:
    """Nibbles [S, T, 2, 32, 4, 8] -> rotated words as uint8 [S, T, 1024], little endian."""
    words = torch.zeros(tiles.shape[:-1], dtype=torch.int64, device=tiles.device)
    for i in range(8):
        words |= tiles[..., i].long() << (4 * i)
    words = words << _ROTATION | words >> (32 - _ROTATION)
    parts = torch.stack([(words >> (8 * i)) & 0xFF for i in range(4)], dim=-1).to(torch.uint8)
    return parts.reshape(*tiles.shape[:2], WEIGHT_BYTES)


def _lay_out_groups(values: Tensor, height: int, k: int, size: int) -> Tensor:
    """[N, G] -> the bytes of [height / 16, Kp / 128, 8, 128 / size, 2], zeros in the padding."""
    n, groups = values.shape
    per_tile = 128 // min(size, 128)
    along = _up(k, 128) // 128
    full = torch.zeros((height, along * per_tile), dtype=values.dtype, device=values.device)
    full[:n, :groups] = values
    laid = full.view(-1, 2, 8, along, per_tile).permute(0, 3, 2, 4, 1).reshape(height // STRIPE, along, -1)
    return laid.contiguous().view(torch.uint8)


def _restore_groups(laid: Tensor, group: int) -> Tensor:
    """[Np / 16, Kp / 128, 8 * 128 / group * 2] -> [Np, Kp], each group's value at each of its inputs."""
    stripes, along, _ = laid.shape
    split = laid.reshape(stripes, along, 8, 128 // group, 2)
    rows = split.permute(0, 4, 2, 1, 3).reshape(stripes * STRIPE, along * (128 // group))
    return rows.repeat_interleave(group, dim=1)


def _order(group: Tensor, size: int) -> Tensor | None:
    """The inputs sorted by group; None where they are."""
    sequence = torch.arange(len(group), device=group.device)
    order = torch.argsort(group.long(), stable=True)
    if not torch.equal(group.long()[order], sequence // size):
        raise _refused("int4 groups of unequal size are not supported", f"give each group {size} inputs")
    return None if torch.equal(order, sequence) else order.int()


def _multiplier(scale: Tensor) -> float:
    """1, or the power of two that brings the largest scale near 1 where float16 would lose it."""
    largest = float(scale.float().abs().max()) if scale.numel() else 0.0
    if largest == 0.0 or 2.0**-10 <= largest <= 2.0**12:
        return 1.0
    return float(2.0 ** torch.tensor(largest).log2().round().item())


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _refused(sentence: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", sentence, remedy)
