"""The 8-bit product's twin and operator without a GPU: against float64 and the definition of quantized tensors."""

from __future__ import annotations

import pytest
import torch

from tests.support_gpu import assert_close, assert_refused, assert_same_bits
from trtllm_cli.ops import quantized
from trtllm_cli.ops.cuda import w8a8, w8a8_twin

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("type", ["int8", "fp8"])
@pytest.mark.parametrize("static", [False, True])
def test_the_product_is_that_of_what_the_quantized_tensors_stand_for(type: quantized.Type8, static: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 320), torch.randn(24, 320)
    a, a_scale = quantized.quantize_activation(x, type, torch.tensor([0.03]) if static else None)
    w, w_scale = quantized.quantize_activation(weight, type, None)
    dtype = torch.int8 if type == "int8" else FP8
    a8, w8 = a.to(dtype), w.to(dtype)
    wanted = (a.double() * a_scale.double()) @ quantized.dequantize_8bit(w8, w_scale[:, 0]).double().T
    exact = w8a8_twin.w8a8_linear(a8, w8, a_scale.reshape(-1), w_scale[:, 0], out_dtype=torch.float64)
    # dequantize_8bit rounds to float32
    assert_close(exact, wanted, tolerance=1e-6)
    assert_close(w8a8.w8a8_linear(a8, w8, a_scale.reshape(-1), w_scale[:, 0]), wanted)
    assert_close(w8a8.w8a8_linear(a8, w8, a_scale.reshape(-1), w_scale[:, 0], out_dtype=torch.float16), wanted)


def test_int8_sums_are_those_of_integers() -> None:
    torch.manual_seed(0)
    a, w = (torch.randint(-128, 128, (rows, 2048), dtype=torch.int8) for rows in (5, 33))
    sums = torch._int_mm(torch.cat([a] * 4), w.T.contiguous())[:5]
    one = torch.ones(1)
    assert torch.equal(w8a8_twin.w8a8_linear(a, w, one, one, out_dtype=torch.float64), sums.double())
    scaled = sums.float() * torch.arange(1, 6)[:, None].float() * torch.linspace(0.1, 1, 33)
    found = w8a8.w8a8_linear(a, w, torch.arange(1, 6).float(), torch.linspace(0.1, 1, 33))
    assert_same_bits(found, scaled.bfloat16(), "twin and integer sums")


def test_bias_and_residual_are_added_after_the_scales() -> None:
    a = torch.full((2, 16), 1, dtype=torch.int8)
    w = torch.full((3, 16), 2, dtype=torch.int8)
    bias = torch.tensor([1.0, 2.0, 3.0]).half()
    residual = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]).half()
    found = w8a8.w8a8_linear(a, w, torch.tensor([0.5, 1.0]), torch.tensor([0.25]), bias, residual, torch.float16)
    assert found.tolist() == [[15.0, 26.0, 37.0], [49.0, 60.0, 71.0]]


def test_the_operator_passes_torchs_checks() -> None:
    a, w = torch.ones(2, 32, dtype=torch.int8), torch.ones(3, 32, dtype=torch.int8)
    arguments = (a, w, torch.ones(2), torch.ones(3), torch.ones(3).half(), torch.ones(2, 3).half(), torch.float16)
    torch.library.opcheck(w8a8.w8a8_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals_name_what_is_wrong() -> None:
    a, w, one = torch.ones(2, 32, dtype=torch.int8), torch.ones(3, 32, dtype=torch.int8), torch.ones(1)
    assert_refused(lambda: w8a8.w8a8_linear(a, w.to(FP8), one, one), "torch.int8 and torch.float8_e4m3fn")
    assert_refused(lambda: w8a8.w8a8_linear(a.float(), w.float(), one, one), "torch.float32")
    assert_refused(lambda: w8a8.w8a8_linear(a, w[:, :16], one, one), "(2, 32) and (3, 16)")
    assert_refused(lambda: w8a8.w8a8_linear(a[:, :24], w[:, :24], one, one), "multiple of 16, not 24", "pad")
    assert_refused(lambda: w8a8.w8a8_linear(a, w, torch.ones(3), one), "a_scale", "(3,)")
    assert_refused(lambda: w8a8.w8a8_linear(a, w, one, one.half()), "w_scale", "torch.float16")
    assert_refused(lambda: w8a8.w8a8_linear(a, w, one, one, torch.ones(3)), "bias", "torch.float32")
    assert_refused(lambda: w8a8.w8a8_linear(a, w, one, one, None, torch.ones(3, 2).bfloat16()), "residual", "(3, 2)")
    assert_refused(lambda: w8a8.w8a8_linear(a, w, one, one, out_dtype=torch.float32), "torch.float32")
    assert_refused(lambda: w8a8.w8a8_linear(a.T.contiguous().T, w, one, one), "contiguous")
