"""Weight-only products for few tokens on a GPU, against the twin in float64."""

from __future__ import annotations

from typing import Any

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
    gpu_examples,
    guarded_allocations,
    needs_gpu,
    with_row_gap,
)
from tests.support_weight_only import KINDS, made_weight
from trtllm_cli.ops.cuda.weight_only_packing import pack_8bit_weight, pack_int4_weight
from trtllm_cli.ops.quantized import pack_int4

pytestmark = [pytest.mark.gpu, needs_gpu]
DTYPES = [torch.bfloat16, torch.float16]


def agrees(x: Tensor, weight: Any, **options: Any) -> Tensor:
    """The operator's result, checked: nothing outside written, everything inside written, and right."""
    from trtllm_cli.ops.cuda import weight_only, weight_only_twin

    with guarded_allocations():
        found = weight_only.linear(x, weight, **options)
    # the kernel rounds the normalised activations to x's type: so does the reference, with float64 sums
    wide: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()
    }
    wide = {name: value for name, value in wide.items() if name not in ("pdl", "tactic")}
    norm = wide.pop("norm_weight", None)
    eps, offset = wide.pop("norm_eps", 1e-5), wide.pop("norm_offset", 0.0)
    left = x.double()
    if norm is not None:
        left = left * torch.rsqrt(left.square().mean(-1, keepdim=True) + eps) * (offset + norm)
        left = left.to(x.dtype).double()
    assert_close(found, weight_only_twin.weight_only_linear(left, weight, **wide))
    return found


def agrees_token_by_token(x: Tensor, weight: Any, **options: Any) -> Tensor:
    """As `agrees`, where tokens differ so much in size that the largest would hide the others."""
    from trtllm_cli.ops.cuda import weight_only, weight_only_twin

    found = weight_only.linear(x, weight, **options)
    wanted = weight_only_twin.weight_only_linear(x.double(), weight, **options)
    for token in range(len(x)):
        # scaled to numbers whose squares float32 holds
        by = float(wanted[token].abs().max())
        assert_close((found[token].double() / by).to(x.dtype), wanted[token] / by)
    return found


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(m, k, generator=made, device="cuda") + 0.25).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (520, 128), (24, 11008)])
def test_products_agree_with_the_twin(dtype: torch.dtype, kind: str, n: int, k: int) -> None:
    weight = made_weight(kind, n, k, dtype)
    for m in (1, 3, 8):
        agrees(activations(m, weight.k, dtype), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_inputs_are_split_over_a_cluster(kind: str) -> None:
    weight = made_weight(kind, 4096, 14336, torch.bfloat16)
    for m in (1, 5, 8):
        agrees(activations(m, weight.k, torch.bfloat16), weight)


@pytest.mark.parametrize("tactic", range(1, 11))
@pytest.mark.parametrize("kind", ["int4 g128", "int4 g32 zero", "int8", "dense"])
def test_every_tactic_agrees(kind: str, tactic: int) -> None:
    for n, k in ((1536, 576), (4096, 4096), (96, 2048)):
        weight = made_weight(kind, n, k, torch.bfloat16)
        for m in (1, 4):
            agrees(activations(m, weight.k, torch.bfloat16), weight, tactic=tactic)


@gpu_examples
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 700),
    k=st.integers(1, 900),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    gap=st.integers(0, 9),
    fused=st.tuples(
        st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["none", "silu", "gelu", "gelu_tanh"])
    ),
    seed=st.integers(0, 99),
)
def test_any_shape_with_anything_fused(
    m: int,
    n: int,
    k: int,
    kind: str,
    dtype: torch.dtype,
    gap: int,
    fused: tuple[bool, bool, bool, str],
    seed: int,
) -> None:
    bias, residual, norm, gate = fused
    if gate != "none":
        n = (n + 15) // 16 * 16
    weight = made_weight(kind, n, k, dtype, seed)
    width = n if gate == "none" else n // 2
    options: dict[str, Any] = {"gate": gate}
    if bias:
        options["bias"] = among_poison(activations(1, n, dtype, seed + 1)[0])
    if residual:
        options["residual"] = with_row_gap(activations(m, width, dtype, seed + 2), gap)
    if norm:
        options["norm_weight"] = among_poison(activations(1, weight.k, dtype, seed + 3)[0])
        options["norm_offset"] = 1.0
    agrees(with_row_gap(activations(m, weight.k, dtype, seed), gap), weight, **options)


@pytest.mark.parametrize("kind", ["int4 g64 zero", "int8", "dense"])
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
def test_gate_norm_and_residual_of_a_layer(kind: str, gate: str) -> None:
    for m in (1, 4):
        x = activations(m, 1024, torch.bfloat16)
        norm = activations(1, 1024, torch.bfloat16, 5)[0]
        up = agrees(
            x, made_weight(kind, 5632, 1024, torch.bfloat16), norm_weight=norm, norm_eps=1e-6, gate=gate, pdl=True
        )
        agrees(up, made_weight(kind, 1024, 2816, torch.bfloat16), residual=x, pdl=True)


def test_the_residual_may_be_the_output() -> None:
    from trtllm_cli.ops.cuda import library, weight_only

    weight = made_weight("int4 g128", 640, 1024, torch.bfloat16)
    x, residual = activations(2, 1024, torch.bfloat16), activations(2, 640, torch.bfloat16, 1)
    wanted = weight_only.linear(x, weight, residual=residual)
    held = residual.clone()
    library.load().launch("weight_only_gemm", weight_only.parameters(x, weight, held, residual=held))
    assert torch.equal(held, wanted)


def test_a_chain_with_programmatic_launch_gives_the_bits_of_one_without() -> None:
    from trtllm_cli.ops.cuda import weight_only

    weights = [made_weight("int4 g128", 2048, 2048, torch.bfloat16, i) for i in range(6)]
    norm = activations(1, 2048, torch.bfloat16, 9)[0]

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for weight in weights:
            x = weight_only.linear(x, weight, residual=x, norm_weight=norm, pdl=pdl)
        return x

    x = activations(1, 2048, torch.bfloat16)
    wanted = chain(x, False)
    for _ in range(5):
        assert torch.equal(chain(x, True), wanted)
    assert_replays(lambda a: chain(a, True), [x], [activations(1, 2048, torch.bfloat16, 3)])


@pytest.mark.parametrize("kind", ["int4 g32", "int8", "dense"])
def test_runs_repeat_bit_by_bit(kind: str) -> None:
    from trtllm_cli.ops.cuda import weight_only

    weight = made_weight(kind, 1024, 14336, torch.float16)
    x = activations(8, 14336, torch.float16)
    assert_repeats(lambda: weight_only.linear(x, weight))


def test_act_order_is_gathered() -> None:
    weight = made_weight("int4 g64 zero", 512, 1024, torch.bfloat16, order=True)
    assert weight.order is not None
    norm = activations(1, 1024, torch.bfloat16, 2)[0]
    agrees(activations(3, 1024, torch.bfloat16), weight)
    agrees(activations(3, 1024, torch.bfloat16), weight, norm_weight=norm)


@pytest.mark.parametrize("factor", [1e-8, 1e5, 1e7])
def test_huge_and_tiny_scales(factor: float) -> None:
    weight = made_weight("int4 g128", 256, 512, torch.bfloat16, factor=factor)
    assert (weight.multiplier == 1.0) == (factor == 1e5)  # there the scales, about 1e3, are fine as float16
    agrees(activations(2, 512, torch.bfloat16), weight)


def test_large_activations_do_not_overflow_between() -> None:
    weight = made_weight("int4 g128", 256, 512, torch.float16)
    x = activations(2, 512, torch.float16) * 2048
    norm = torch.ones(512, device="cuda", dtype=torch.float16)
    agrees(x, weight, norm_weight=norm)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_any_magnitude_keep_their_precision(kind: str) -> None:
    # the kernels carry them as float16 numbers times a power of two of their own: each token has to be right by itself
    weight = made_weight(kind, 96, 1024, torch.bfloat16)
    made = torch.Generator("cuda").manual_seed(1)
    x = activations(8, 1024, torch.bfloat16)
    spread = torch.randint(-12, 13, x.shape, generator=made, device="cuda")  # among the inputs of a token
    tokens = torch.tensor([-100, -40, -14, 0, 3, 14, 40, 90], device="cuda")[:, None]
    x = torch.ldexp(x.float(), spread + tokens).bfloat16()
    x[3, :512] = 0  # where all are zero there is no largest
    agrees_token_by_token(x, weight)
    agrees_token_by_token(x[2:3], weight)


@pytest.mark.parametrize(
    ("kind", "largest"),
    # int4 weights are multiplied by an offset above their value, which sums of float32 take back
    [
        (kind, size)
        for kind in ("int4", "int8", "fp8")
        for size in (1.0, 2.0**12, 2.0**24)
        if (kind, size) != ("int4", 2.0**24)
    ],
)
def test_a_large_activation_leaves_the_others_their_precision(kind: str, largest: float) -> None:
    # its weights are zero, so that only the small ones count
    n, k = 64, 768
    if kind == "int4":
        codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        codes[:, 64] = 8
        weight = pack_int4_weight(pack_int4(codes), torch.full((n, k // 128), 2.0**-6, device="cuda").half())
    else:
        values = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        values[:, 64] = 0
        stored = values if kind == "int8" else (values.float() / 4).to(torch.float8_e4m3fn)
        weight = pack_8bit_weight(stored, torch.full((n,), 2.0**-9, device="cuda"))
    x = activations(3, k, torch.bfloat16)
    x[:, 64] = largest
    agrees_token_by_token(x, weight)


@pytest.mark.parametrize("kind", ["int4 g128", "int8", "fp8", "dense"])
def test_a_token_that_is_not_finite_spoils_no_other(kind: str) -> None:
    from trtllm_cli.ops.cuda import weight_only

    weight = made_weight(kind, 80, 640, torch.bfloat16)
    x = activations(5, 640, torch.bfloat16)
    wanted = weight_only.linear(x, weight)
    x[1, 7], x[3, 600] = float("inf"), float("nan")
    found = weight_only.linear(x, weight)
    assert torch.equal(found[[0, 2, 4]], wanted[[0, 2, 4]])
    assert not bool(torch.isfinite(found[[1, 3]]).any())


@pytest.mark.parametrize("kind", ["int4 g32 zero", "int4 g128", "int8", "fp8", "dense"])
@pytest.mark.parametrize("k", [8192, 16384, 53248])
def test_long_inputs(kind: str, k: int) -> None:
    weight = made_weight(kind, 208, k, torch.bfloat16)
    norm = activations(1, k, torch.bfloat16, 3)[0]
    for m in (1, 2, 8):
        x = activations(m, k, torch.bfloat16)
        agrees(x, weight)
        agrees(x, weight, norm_weight=norm)


def test_an_output_between_canaries() -> None:
    from trtllm_cli.ops.cuda import library, weight_only

    weight = made_weight("int8", 200, 320, torch.float16)
    x = activations(5, 320, torch.float16)
    out = Guarded((5, 200), torch.float16, strides=(208, 1))
    library.load().launch("weight_only_gemm", weight_only.parameters(x, weight, out.tensor))
    out.check()
    assert torch.equal(out.tensor, weight_only.linear(x, weight))


def test_refusals() -> None:
    from trtllm_cli.ops.cuda import weight_only

    weight = made_weight("int4 g128", 64, 256, torch.bfloat16)
    x = activations(2, 256, torch.bfloat16)
    assert_refused(lambda: weight_only.linear(x.float(), weight), "float32")
    assert_refused(lambda: weight_only.linear(x[:, :128], weight), "[M, 256]")
    assert_refused(lambda: weight_only.linear(x, weight, gate="relu"), "relu")
    assert_refused(lambda: weight_only.linear(x, weight, bias=x[0]), "bias")
    assert_refused(lambda: weight_only.linear(x, weight, tactic=77), "77")
    dense = made_weight("dense", 64, 256, torch.bfloat16)
    assert_refused(lambda: weight_only.linear(activations(9, 256, torch.bfloat16), dense), "cuBLAS")
    assert weight_only.linear(x[:0], weight).shape == (0, 64)
