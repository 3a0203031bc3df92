"""The 8-bit product on a GPU against its twin: bit by bit for int8, in float64 for float8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support_gpu import (
    Guarded,
    among_poison,
    assert_close,
    assert_refused,
    assert_repeats,
    assert_replays,
    assert_same_bits,
    gpu_examples,
    guarded_allocations,
    needs_gpu,
    with_row_gap,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
FP8 = torch.float8_e4m3fn


def inputs(
    dtype: torch.dtype, m: int, n: int, k: int, seed: int = 0, per_token: bool = True, per_channel: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, w and their scales; int8 over the whole range, -128 included."""
    made = torch.Generator("cuda").manual_seed(seed)
    if dtype == torch.int8:
        a, w = (torch.randint(-128, 128, (r, k), generator=made, device="cuda", dtype=dtype) for r in (m, n))
    else:
        a, w = (torch.randn(r, k, generator=made, device="cuda").to(dtype) for r in (m, n))
    a_scale = torch.rand(m if per_token else 1, generator=made, device="cuda") * 0.01 + 1e-4
    w_scale = torch.rand(n if per_channel else 1, generator=made, device="cuda") * 0.01 + 1e-4
    return a, w, a_scale, w_scale


def agrees(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tactic: int = 0,
    fast: bool = False,
) -> Tensor:
    """The operator's result, checked: nothing outside written, everything inside written, and right."""
    from trtllm_cli.ops.cuda import w8a8, w8a8_twin

    with guarded_allocations():
        found = w8a8.w8a8_linear(
            a, w, a_scale, w_scale, bias, residual, out_dtype, fast_accumulation=fast, tactic=tactic
        )
    if a.dtype == torch.int8:
        assert_same_bits(
            found, w8a8_twin.w8a8_linear(a, w, a_scale, w_scale, bias, residual, out_dtype), "kernel and twin"
        )
    else:
        assert_close(found, w8a8_twin.w8a8_linear(a, w, a_scale, w_scale, bias, residual, torch.float64))
    return found


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 128, 300, 1025])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1536, 576), (577, 1552), (4096, 4096), (64, 16)])
def test_the_chosen_kernel_agrees_with_the_twin(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    agrees(*inputs(dtype, m, n, k))


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("shape", [(5, 200, 1040), (150, 328, 2064)])
def test_every_tactic_agrees_with_the_twin(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from trtllm_cli.ops.cuda import w8a8

    numbers = w8a8.tactics()
    assert len(numbers) > 10
    for tactic in numbers:
        for fast in (False, True) if dtype == FP8 else (False,):
            agrees(*inputs(dtype, *shape), tactic=tactic, fast=fast)


@gpu_examples
@given(
    dtype=st.sampled_from([torch.int8, FP8]),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    m=st.integers(1, 400),
    n=st.integers(1, 700),
    sixteenths=st.integers(1, 90),
    scales=st.tuples(st.booleans(), st.booleans()),
    extras=st.tuples(st.booleans(), st.booleans()),
    gaps=st.tuples(*[st.sampled_from([0, 16, 48])] * 2),
    tactic=st.sampled_from([0, 0, 1, 2, 640084, 1281282]),
)
def test_any_shape_stride_scale_and_epilogue(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    m: int,
    n: int,
    sixteenths: int,
    scales: tuple[bool, bool],
    extras: tuple[bool, bool],
    gaps: tuple[int, int],
    tactic: int,
) -> None:
    a, w, a_scale, w_scale = inputs(dtype, m, n, 16 * sixteenths, m + n, *scales)
    bias = torch.randn(n, device="cuda").to(out_dtype) if extras[0] else None
    residual = with_row_gap(torch.randn(m, n, device="cuda").to(out_dtype), 3) if extras[1] else None
    agrees(
        with_row_gap(a, gaps[0]),
        with_row_gap(w, gaps[1]),
        among_poison(a_scale),
        among_poison(w_scale),
        None if bias is None else among_poison(bias),
        residual,
        out_dtype,
        tactic,
    )


@pytest.mark.parametrize("tactic", [0, 1, 2, 640082])
def test_int8_sums_do_not_lose_a_unit_at_the_largest_k(tactic: int) -> None:
    k = 131056
    a = torch.full((3, k), -128, device="cuda", dtype=torch.int8)
    w = torch.full((70, k), -128, device="cuda", dtype=torch.int8)
    w[:, -1] = 127
    one = torch.ones(1, device="cuda")
    # 131056 * 16384 is just below 2^31
    agrees(a, w, one * 2**-16, one, tactic=tactic)


@pytest.mark.parametrize("tactic", [0, 1, 2])
def test_huge_and_tiny_scales_keep_their_order_of_operations(tactic: int) -> None:
    a, w, a_scale, w_scale = inputs(torch.int8, 40, 96, 256)
    a_scale[0], w_scale[0] = 1e-30, 1e30
    a_scale[1], w_scale[1] = 1e30, 1e-30
    a_scale[2] = 3e38
    from trtllm_cli.ops.cuda import w8a8, w8a8_twin

    found = w8a8.w8a8_linear(a, w, a_scale, w_scale, tactic=tactic)
    assert_same_bits(found, w8a8_twin.w8a8_linear(a, w, a_scale, w_scale), "kernel and twin")


@pytest.mark.parametrize("tactic", [1, 2, 640641, 640082])
def test_float8_promotion_bounds_what_the_matrix_units_own_sums_lose(tactic: int) -> None:
    """Positive operands: what a short accumulator drops adds up instead of cancelling."""
    from trtllm_cli.ops.cuda import w8a8, w8a8_twin

    a, w, a_scale, w_scale = inputs(FP8, 320, 512, 16384)
    a, w = a.float().abs().to(FP8), w.float().abs().to(FP8)
    exact = w8a8_twin.w8a8_linear(a, w, a_scale, w_scale, out_dtype=torch.float64)
    # the rounded result taken off again in float32: the rounding of the output to float16 is not in the figure
    rounded = exact.half()

    def error(fast: bool) -> float:
        off = w8a8.w8a8_linear(
            a, w, a_scale, w_scale, None, -rounded, torch.float16, fast_accumulation=fast, tactic=tactic
        )
        return float((rounded.double() + off.double() - exact).norm() / exact.norm())

    # 128 products are four instructions, each of which drops a few units of the last of about 14 bits
    assert error(False) < 16 * 2**-14
    if tactic == 2:  # the only kernel that sums all of K in the matrix unit where it may
        assert error(False) < 0.5 * error(True)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("m", [1, 48, 700])
@pytest.mark.parametrize("pdl", [False, True])
def test_repeats_are_bit_identical_and_graphs_replay(dtype: torch.dtype, m: int, pdl: bool) -> None:
    from trtllm_cli.ops.cuda import w8a8

    first, second = inputs(dtype, m, 1536, 4096, 1), inputs(dtype, m, 1536, 4096, 2)

    def call(*x: Tensor) -> Tensor:
        return w8a8.w8a8_linear(*x, pdl=pdl)

    assert_repeats(lambda: call(*first))
    assert_replays(call, first, second)


@pytest.mark.parametrize("tactic", [0, 1, 2])
@pytest.mark.parametrize("n", [264, 265])
def test_rows_of_out_may_be_strided_and_out_may_be_the_residual(tactic: int, n: int) -> None:
    from trtllm_cli.ops.cuda import library, w8a8, w8a8_twin

    a, w, a_scale, w_scale = inputs(torch.int8, 130, n, 512)
    residual = torch.randn(130, n, device="cuda").bfloat16()
    out = Guarded((130, n), torch.bfloat16, strides=(280, 1))
    out.tensor.copy_(residual)
    params = w8a8.parameters(a, w, a_scale, w_scale, None, out.tensor, out.tensor, tactic=tactic)
    library.load().launch("w8a8", params)
    wanted = w8a8_twin.w8a8_linear(a, w, a_scale, w_scale, None, residual)
    assert_same_bits(out.check(), wanted, "kernel and twin")


def test_empty_products_are_empty() -> None:
    from trtllm_cli.ops.cuda import w8a8

    a, w, a_scale, w_scale = inputs(torch.int8, 0, 64, 64, per_token=False)
    assert w8a8.w8a8_linear(a, w, a_scale, w_scale).shape == (0, 64)


def test_refusals_name_what_is_wrong() -> None:
    from trtllm_cli.ops.cuda import w8a8

    a, w, a_scale, w_scale = inputs(torch.int8, 4, 64, 64)
    assert_refused(lambda: w8a8.w8a8_linear(a, w, a_scale, w_scale, tactic=12345), "tactic 12345")
    shifted = torch.zeros(4 * 64 + 1, device="cuda", dtype=torch.int8)[1:].view(4, 64)
    assert_refused(lambda: w8a8.w8a8_linear(shifted, w, a_scale, w_scale), "16 bytes")
    odd = torch.zeros(4, 72, device="cuda", dtype=torch.int8)[:, :64]
    assert_refused(lambda: w8a8.w8a8_linear(odd, w, a_scale, w_scale), "multiple of 16 elements apart", "72")
    long = torch.zeros(1, 131072, device="cuda", dtype=torch.int8)
    assert_refused(lambda: w8a8.w8a8_linear(long, long, a_scale[:1], w_scale[:1]), "131072", "int32")


def test_older_gpus_are_refused_float8_with_a_sentence() -> None:
    from trtllm_cli.ops.cuda import library, w8a8

    a, w, a_scale, w_scale = inputs(FP8, 4, 64, 64)
    out = torch.empty(4, 64, device="cuda", dtype=torch.bfloat16)
    params = w8a8.parameters(a, w, a_scale, w_scale, None, None, out)
    assert "8.9" in (library.load().supports("w8a8", params, 86) or "")
    assert library.load().supports("w8a8", params, 89) is None
    params.dtype = library.INT8
    assert library.load().supports("w8a8", params, 80) is None
    assert "8.0" in (library.load().supports("w8a8", params, 75) or "")
