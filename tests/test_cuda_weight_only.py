"""The weight-only product without a GPU: the packed layout, the twin against independent definitions, the operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support_gpu import assert_refused
from tests.support_weight_only import KINDS, made_weight
from trtllm_cli.ops.cuda import weight_only
from trtllm_cli.ops.cuda.weight_only_packing import (
    dense_weight,
    interleave_gate_up,
    pack_8bit_weight,
    pack_int4_weight,
    unpack_weight,
)
from trtllm_cli.ops.quantized import dequantize_8bit, dequantize_int4, pack_int4

SHAPES = [(64, 128), (72, 576), (130, 1536), (16, 96), (1, 64)]


def int4(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return codes, (torch.rand(n, k // group) * 0.01 + 1e-3).half(), torch.randint(0, 16, (n, k // group)).byte()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("with_zero", [False, True])
def test_int4_comes_back_as_the_checkpoint_defines_it(shape: tuple[int, int], group: int, with_zero: bool) -> None:
    n, k = shape[0], -(-shape[1] // group) * group
    codes, scale, zero = int4(n, k, group)
    zeros = zero if with_zero else None
    packed = pack_int4_weight(pack_int4(codes), scale, zeros)
    assert torch.equal(unpack_weight(packed), dequantize_int4(pack_int4(codes), scale, zeros))


@pytest.mark.parametrize("shape", SHAPES)
def test_8_bits_come_back_as_the_checkpoint_defines_them(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    scale = torch.rand(shape[0])
    for codes in (torch.randint(-128, 128, shape, dtype=torch.int8), torch.randn(shape).to(torch.float8_e4m3fn)):
        assert torch.equal(unpack_weight(pack_8bit_weight(codes, scale)), dequantize_8bit(codes, scale))
        assert torch.equal(unpack_weight(pack_8bit_weight(codes, scale[:1])), dequantize_8bit(codes, scale[:1]))


def test_act_order_is_kept() -> None:
    codes, scale, zero = int4(40, 512, 64)
    group = torch.randperm(512).int() // 64
    packed = pack_int4_weight(pack_int4(codes), scale, zero, group)
    assert packed.order is not None
    wanted = dequantize_int4(pack_int4(codes), scale, zero, group)
    assert torch.equal(unpack_weight(packed), wanted)
    x = torch.randn(3, 512)
    assert torch.allclose(weight_only.linear(x, packed), x @ wanted.T, atol=1e-4)


def test_groups_in_sequence_need_no_order() -> None:
    codes, scale, zero = int4(40, 512, 64)
    assert pack_int4_weight(pack_int4(codes), scale, zero, torch.arange(512).int() // 64).order is None


def test_the_header_says_where_each_value_lies() -> None:
    """Every value of a tile by the formulas of weight_only.h, written out once more."""
    codes, scale, zero = int4(80, 384, 32)
    packed = pack_int4_weight(pack_int4(codes), scale, zero).data
    eight = torch.randint(-128, 128, (80, 384), dtype=torch.int8)
    packed8 = pack_8bit_weight(eight, torch.ones(80)).data
    assert packed.shape == (8, 3, 1024 + 4 * 48) and packed8.shape == (8, 6, 1024)
    torch.manual_seed(1)
    for row, k in zip(torch.randint(80, (300,)).tolist(), torch.randint(384, (300,)).tolist()):
        stripe, half, g = row // 16, row % 16 // 8, row % 8
        tile, step, high, c, e = k // 128, k % 128 // 16, k % 16 // 8, k % 8 // 2, k % 2
        at = 512 * half + 16 * (4 * g + c) + 4 * (step // 2)
        word = int.from_bytes(bytes(packed[stripe, tile, at : at + 4].tolist()), "little")
        turned = (word >> 4 * (2 * (step % 2) + high) | word << 32 - 4 * (2 * (step % 2) + high)) & 0xFFFFFFFF
        assert (turned & 0x00780078) >> (3 + 16 * e) & 15 == codes[row, k]
        group = k % 128 // 32
        held = packed[stripe, tile, 1024:][4 * (4 * g + group) + 2 * half :][:2].view(torch.float16)
        assert held == scale[row, k // 32]
        assert packed[stripe, tile, 1024 + 128 + 2 * (4 * g + group) + half] == zero[row, k // 32]
        at = 512 * half + 16 * (4 * g + c) + 4 * (step % 4) + high + 2 * e
        assert int(packed8[stripe, k // 64, at]) == int(eight[row, k]) + 128


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_norm_product_gate_and_residual(kind: str) -> None:
    torch.manual_seed(0)
    weight = made_weight(kind, 96, 256, torch.float16, device="cpu")
    dense = unpack_weight(weight, torch.float64)
    x, norm = torch.randn(5, 256, dtype=torch.float64), torch.randn(256, dtype=torch.float64)
    bias, residual = torch.randn(96, dtype=torch.float64), torch.randn(5, 48, dtype=torch.float64)
    y = F.linear(F.rms_norm(x, (256,), norm, eps=1e-5), dense, bias).view(5, 6, 2, 8)
    wanted = F.silu(y[:, :, 0].reshape(5, 48)) * y[:, :, 1].reshape(5, 48) + residual
    found = weight_only.linear(x, weight, bias, residual, norm_weight=norm, gate="silu")
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)
    plain = weight_only.linear(x, weight, norm_weight=norm - 1, norm_offset=1.0)
    assert torch.allclose(plain, F.rms_norm(x, (256,), norm, eps=1e-5) @ dense.T)


def test_gate_and_up_alternate_in_blocks_of_eight() -> None:
    gate, up = torch.randn(24, 64), torch.randn(24, 64)
    both = interleave_gate_up(gate, up)
    assert torch.equal(both[16:24], gate[8:16]) and torch.equal(both[24:32], up[8:16])
    x = torch.randn(2, 64)
    found = weight_only.linear(x, dense_weight(both), gate="gelu")
    assert torch.allclose(found, F.gelu(x @ gate.T) * (x @ up.T), atol=1e-4)
    assert_refused(lambda: interleave_gate_up(gate[:20], up[:20]), "(20, 64)", "multiple of 8")


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_scales_beyond_float16_keep_their_precision(factor: float) -> None:
    codes, scale, _ = int4(32, 256, 64)
    wide = scale.float() * factor
    packed = pack_int4_weight(pack_int4(codes), wide)
    wanted = dequantize_int4(pack_int4(codes), wide, None).double()
    error = (unpack_weight(packed, torch.float64) - wanted).norm() / wanted.norm()
    assert packed.multiplier != 1.0 and error < 1e-3


def test_shapes_without_a_gpu() -> None:
    weight = made_weight("int4 g64", 96, 256, torch.float16, device="cpu").to("meta")
    x = torch.empty(3, 256, dtype=torch.float16, device="meta")
    assert weight_only.linear(x, weight).shape == (3, 96)
    assert weight_only.linear(x, weight, gate="silu").shape == (3, 48)


def test_bad_input_is_refused() -> None:
    codes, scale, zero = int4(32, 256, 64)
    assert_refused(lambda: pack_int4_weight(pack_int4(codes), scale.repeat(1, 4)), "16 groups", "32, 64 or 128")
    uneven = torch.arange(256).int() // 64
    uneven[0] = 1
    assert_refused(lambda: pack_int4_weight(pack_int4(codes), scale, zero, uneven), "unequal", "64 inputs")
    assert_refused(lambda: pack_8bit_weight(codes, torch.ones(32)), "uint8", "int8")
    weight = pack_int4_weight(pack_int4(codes), scale)
    x = torch.randn(2, 256)
    assert_refused(lambda: weight_only.linear(x[:, :128], weight), "(2, 128)", "flatten")
    assert_refused(lambda: weight_only.linear(x, weight, gate="relu"), "relu", "silu")
    assert_refused(lambda: weight_only.linear(x, weight, bias=torch.zeros(31)), "bias", "(31,)")
    assert_refused(lambda: weight_only.linear(x.T.contiguous().T, weight), "contiguous")
    assert_refused(lambda: weight_only.linear(x[:1].expand(2, -1), weight), "overlap")
    assert_refused(lambda: weight_only.linear(x[:, :100], dense_weight(torch.randn(30, 100)), gate="silu"), "30 rows")
    cut = pack_int4_weight(pack_int4(codes), scale)
    short = type(cut)(**{**cut.__dict__, "data": cut.data[:2]})
    assert_refused(lambda: weight_only.linear(x, short), "data", "pack them")
