"""The pointwise kernels on a GPU, against their twins in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support_gpu import (
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
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
#: whole vectors, odd, one warp, one block, and too long for registers
widths = st.sampled_from([1, 7, 8, 64, 576, 577, 1000, 1024, 1536, 4096, 4100, 8192, 14336, 24584, 33000])
tokens = st.sampled_from([1, 2, 3, 17, 300])
types = st.sampled_from(["int8", "fp8"])


def random(*shape: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Normal, on the GPU, among poison; rows ``gap`` elements further apart than they are long."""
    x = torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)
    return with_row_gap(x, gap) if gap else among_poison(x)


def below_saturation(wide: Tensor) -> Tensor:
    """A static scale that leaves -128, the poison of int8, to buffers nobody wrote."""
    return (wide.abs().max() / 120).clamp(min=1e-3).float()[None]


def assert_quantized(found: Any, wide: Tensor, type: str, scale: Tensor | None = None) -> None:
    """8-bit values at most one step off where float32 lies beside float64, and hardly ever; scales to rounding."""
    from trtllm_cli.ops.cuda import pointwise_twin

    wanted = pointwise_twin.store(wide, wide.dtype, type, scale, None)
    if scale is None:
        assert torch.allclose(found.scales, wanted.scales, rtol=2e-5)
    # neighbouring int8 differ by 1; neighbouring E4M3 by 1 in their bits, in sign and magnitude
    a, b = (one.view(torch.int8).int() for one in (found.out, wanted.out))
    if type == "fp8":
        a, b = (torch.where(one < 0, -(one + 128), one) for one in (a, b))
    off = (a - b).abs()
    assert off.max() <= 1
    assert off.float().mean() < 0.01


@gpu_examples
@given(tokens, widths, dtypes, st.sampled_from(["silu", "gelu", "gelu_tanh"]), st.sampled_from([0, 3, 8]), types)
def test_gated(n: int, width: int, dtype: torch.dtype, activation: Any, gap: int, type: Any) -> None:
    from trtllm_cli.ops.cuda import pointwise, pointwise_twin

    n = min(n, 2**20 // width + 1)
    torch.manual_seed(0)
    gate, up = random(n, width, dtype=dtype, gap=gap), random(n, width, dtype=dtype, gap=gap)
    wide = pointwise_twin.gated(gate.double(), up.double(), activation).out
    scale = below_saturation(wide)
    with guarded_allocations():
        plain = pointwise.gated(gate, up, activation)
        token = pointwise.gated(gate, up, activation, type)
        static = pointwise.gated(gate, up, activation, type, scale)
    assert_close(plain.out, wide)
    assert_quantized(token, wide, type)
    assert_quantized(static, wide, type, scale)


@pytest.mark.parametrize("type", ["int8", "fp8"])
@pytest.mark.parametrize("width", [4096, 7176, 14336, 16000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gated_of_many_tokens(dtype: torch.dtype, width: int, type: Any) -> None:
    """A block has several rows then, with a scale each; each row has its own size, so that none passes for another."""
    from trtllm_cli.ops.cuda import pointwise, pointwise_twin

    torch.manual_seed(0)
    sizes = torch.linspace(0.1, 4, 1400, device="cuda")[:, None]
    gate, up = (with_row_gap((torch.randn(1400, width, device="cuda") * sizes).to(dtype), 8) for _ in range(2))
    with guarded_allocations():
        found = pointwise.gated(gate, up, "silu", type)
    assert_quantized(found, pointwise_twin.gated(gate.double(), up.double(), "silu").out, type)


@gpu_examples
@given(
    tokens,
    widths,
    dtypes,
    st.sampled_from(["rms", "layer"]),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0, 3, 8]),
    types,
)
def test_norm(n: int, width: int, dtype: torch.dtype, kind: Any, add: bool, offset: float, gap: int, type: Any) -> None:
    from trtllm_cli.ops.cuda import norms, pointwise_twin

    n = min(n, 2**21 // width + 1)
    torch.manual_seed(0)
    x = random(n, width, dtype=dtype, gap=gap)
    residual = random(n, width, dtype=dtype, gap=gap) if add else None
    gamma = random(width, dtype=dtype)
    beta = random(width, dtype=dtype) if kind == "layer" else None
    options: Any = {"kind": kind, "eps": 1e-3, "gamma_offset": offset}
    h = x if residual is None else (x.float() + residual.float()).to(dtype)
    wide = pointwise_twin.norm(h.double(), gamma.double(), None if beta is None else beta.double(), **options).out
    scale = below_saturation(wide)
    with guarded_allocations():
        plain = norms.norm(x, gamma, beta, residual, **options)
        token = norms.norm(x, gamma, beta, residual, **options, quantize=type)
        static = norms.norm(x, gamma, beta, residual, **options, quantize=type, scale=scale)
    for one in (plain, token, static):
        if residual is not None:
            assert_same_bits(one.residual, h, "the kernel's sum and torch's")
    if width == 1 and kind == "layer" and dtype == torch.float32:
        return  # 0 / sqrt(eps) amplifies nothing, but gamma times rounding noise has no relative error to speak of
    assert_close(plain.out, wide)
    assert_quantized(token, wide, type)
    assert_quantized(static, wide, type, scale)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [200, 512, 2048, 4096, 4104, 8192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_norm_of_many_tokens(dtype: torch.dtype, width: int, kind: Any) -> None:
    """Kernels of their own: weights, nothing added, nothing quantized; and beside them a layer norm without a shift."""
    from trtllm_cli.ops.cuda import norms, pointwise_twin

    torch.manual_seed(0)
    x, (gamma, beta) = random(700, width, dtype=dtype), random(2, width, dtype=dtype)
    for shift in (beta, None) if kind == "layer" else (None,):
        wide = None if shift is None else shift.double()
        wanted = pointwise_twin.norm(x.double(), gamma.double(), wide, kind=kind, eps=1e-3).out
        with guarded_allocations():
            found = norms.norm(x, gamma, shift, kind=kind, eps=1e-3).out
        assert_close(found, wanted)


@gpu_examples
@given(tokens, widths, dtypes, types, st.sampled_from([1e-6, 1.0, 300.0]))
def test_quantize_gives_the_integers_of_the_definition(
    n: int, width: int, dtype: torch.dtype, type: Any, size: float
) -> None:
    from trtllm_cli.ops import quantized
    from trtllm_cli.ops.cuda import norms

    n = min(n, 2**20 // width + 1)
    torch.manual_seed(0)
    x = (torch.randn(n, width, device="cuda") * size).to(dtype)
    x[-1] = 0
    with guarded_allocations():
        token = norms.quantize(x, type)
    for scale, found in ((None, token), (torch.tensor([0.37], device="cuda"), None)):
        found = found or norms.quantize(x, type, scale)
        # on the CPU, where torch divides by a number; on a GPU it multiplies by its reciprocal
        wanted, scales = quantized.quantize_activation(x.cpu(), type, None if scale is None else scale.cpu())
        assert torch.equal(found.out.float().cpu(), wanted)
        if scale is None:
            assert torch.equal(found.scales.cpu(), scales[:, 0])


@gpu_examples
@given(st.sampled_from([1, 7, 64, 576, 577, 4096, 14336]), dtypes, st.booleans(), st.booleans(), st.booleans())
def test_embedding(width: int, dtype: torch.dtype, wide_ids: bool, eight: bool, gap: bool) -> None:
    from trtllm_cli.ops.cuda import pointwise, pointwise_twin

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (37,), device="cuda", dtype=torch.int64 if wide_ids else torch.int32)
    ids[3] = -1
    table = random(50, width, dtype=dtype, gap=8 if gap else 0)
    scales = None
    if eight:
        table = torch.randint(-127, 128, (50, width), device="cuda", dtype=torch.int8)
        scales = torch.rand(50, device="cuda")
    with guarded_allocations():
        found = pointwise.embedding(ids, table, scales, 1.5, dtype)
    wanted = pointwise_twin.embedding(
        ids, table if eight else table.double(), None if scales is None else scales.double(), 1.5, torch.float64
    )
    assert_close(found, wanted)
    ids[5] = 50
    assert pointwise.embedding(ids, table, scales, 1.5, dtype)[5].isnan().all()


@gpu_examples
@given(
    st.sampled_from([(64, 64), (80, 80), (96, 48), (128, 128), (256, 64), (72, 30), (30, 0), (512, 512)]),
    st.sampled_from([(4, 2), (7, 1), (32, 8), (3, 3)]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([None, torch.int8, FP8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 8]),
)
def test_rotary(
    sizes: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    eight: torch.dtype | None,
    interleaved: bool,
    normed: bool,
    gap: int,
) -> None:
    from trtllm_cli.ops.cuda import pointwise_twin, rotary

    torch.manual_seed(0)
    (size, dim), (query, kv), cache = sizes, heads, eight or dtype
    pages, page_size, lengths = 14, 8, (40, 17, 1)
    pairs = [(s, n) for s, length in enumerate(lengths) for n in range(length)]
    chosen = [pairs[i] for i in torch.randperm(len(pairs))[:29].tolist()]
    sequences, positions = torch.tensor(chosen, dtype=torch.int32, device="cuda").T.contiguous()
    positions[2], positions[3], sequences[4], sequences[5] = -1, 64, 3, -5
    page_table = torch.randperm(pages, device="cuda")[:12].int().view(3, 4)
    page_table = torch.cat([page_table, torch.full_like(page_table[:, :1], -1)], 1)
    angles = torch.rand(64, dim // 2, device="cuda") * 6
    options: Any = {"heads": query, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved, "eps": 1e-5}
    if normed:
        options |= {"q_norm": random(size, dtype=dtype), "k_norm": random(size, dtype=dtype), "norm_offset": 1.0}
    if eight:
        options |= {name: torch.rand(kv, device="cuda") * 0.03 + 0.01 for name in ("k_scale", "v_scale")}
    qkv = random(len(chosen), (query + 2 * kv) * size, dtype=dtype, gap=gap)
    # K and V of one page beside each other, so that pages are strided
    both = torch.randint(-9, 9, (pages, 2, kv, page_size, size), device="cuda").to(torch.float16).to(cache)
    found_pools, twin_pools = both.clone(), both.clone()
    with guarded_allocations():
        q, k = rotary.rotary(
            qkv, positions, sequences, page_table, found_pools[:, 0], found_pools[:, 1], **options, with_k=True
        )
    doubled = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    wanted_q, wanted_k = pointwise_twin.rotary(
        qkv.double(), positions, sequences, page_table, twin_pools[:, 0], twin_pools[:, 1], **doubled
    )
    assert_close(q, wanted_q)
    assert k is not None
    assert_close(k, wanted_k)
    if eight is None:
        assert_close(found_pools, twin_pools.double())
    else:
        a, b = found_pools.float(), twin_pools.float()
        step = 1 if eight == torch.int8 else b.abs() * 0.125 + 2**-9
        assert bool(((a - b).abs() <= step).all())
        assert (a != b).float().mean() < 0.01
    untouched = (twin_pools.view(torch.uint8) == both.view(torch.uint8)).view(pages, 2, kv, page_size, -1).all(-1)
    assert untouched.sum() >= pages * 2 * kv * page_size - 25 * 2 * kv
    same = (found_pools.view(torch.uint8) == both.view(torch.uint8)).view(pages, 2, kv, page_size, -1).all(-1)
    assert bool((same | ~untouched).all())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("eight", [None, torch.int8, FP8])
@pytest.mark.parametrize("heads", [(32, 8), (20, 5)])
def test_rotary_of_many_tokens(heads: tuple[int, int], eight: Any, interleaved: bool, normed: bool) -> None:
    """A thread has several heads of its token then, the last of which may not exist."""
    from trtllm_cli.ops.cuda import pointwise_twin, rotary

    torch.manual_seed(0)
    (query, kv), size, length, page_size = heads, 128, 1500, 16
    pages = -(-length // page_size)
    positions = torch.randperm(length, device="cuda").int()
    positions[7], positions[8] = -1, length + 100
    page_table = torch.randperm(pages, device="cuda").int()[None]
    angles = torch.rand(length, size // 2, device="cuda") * 6
    options: Any = {"heads": query, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved, "eps": 1e-5}
    if normed:
        options |= {name: random(size, dtype=torch.bfloat16) for name in ("q_norm", "k_norm")}
    if eight:
        options |= {name: torch.rand(kv, device="cuda") * 0.03 + 0.01 for name in ("k_scale", "v_scale")}
    qkv = random(length, (query + 2 * kv) * size, dtype=torch.bfloat16)
    found_pools = torch.ones(2, pages, kv, page_size, size, device="cuda").to(eight or torch.bfloat16)
    twin_pools = found_pools.clone()
    where = (torch.zeros_like(positions), page_table)
    with guarded_allocations():
        q, k = rotary.rotary(qkv, positions, *where, *found_pools, **options, with_k=True)
    doubled = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    wanted_q, wanted_k = pointwise_twin.rotary(qkv.double(), positions, *where, *twin_pools, **doubled)
    assert k is not None
    assert_close(q, wanted_q)
    assert_close(k, wanted_k)
    if eight is None:
        assert_close(found_pools, twin_pools.double())
    else:
        a, b = found_pools.float(), twin_pools.float()
        step = 1 if eight == torch.int8 else b.abs() * 0.125 + 2**-9
        assert bool(((a - b).abs() <= step).all())
        assert (a != b).float().mean() < 0.01


def test_q_may_be_rotated_in_place() -> None:
    from trtllm_cli.ops.cuda import library, rotary

    torch.manual_seed(0)
    qkv = random(5, 6 * 64, dtype=torch.bfloat16)
    positions = torch.arange(5, dtype=torch.int32, device="cuda")
    angles = torch.rand(8, 32, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    params = rotary.RotaryParams(
        qkv=qkv.data_ptr(),
        q_out=qkv.data_ptr(),
        positions=positions.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        tokens=5,
        qkv_stride=6 * 64,
        q_out_stride=6 * 64,
        heads=4,
        kv_heads=1,
        head_dim=64,
        rotary_dim=64,
        max_positions=8,
        dtype=library.BFLOAT16,
        cache_dtype=library.BFLOAT16,
    )
    before = qkv.clone()
    library.load().launch("rotary", params)
    from trtllm_cli.ops.cuda import pointwise_twin

    x = before.double().view(5, 6, 64)
    assert_close(qkv.view(5, 6, 64)[:, :4], pointwise_twin.rotate(x, cos[:5].double(), sin[:5].double(), False)[:, :4])
    assert_same_bits(qkv[:, 4 * 64 :], before[:, 4 * 64 :], "k and v, and what they were,")


def test_saturation_and_huge_values() -> None:
    from trtllm_cli.ops.cuda import norms

    x = torch.tensor([[3e38, -3e38, 1.0, 0.0]], device="cuda")
    scale = torch.ones(1, device="cuda")
    assert norms.quantize(x, "int8", scale).out.tolist() == [[127, -128, 1, 0]]
    assert norms.quantize(x, "fp8", scale).out.float().tolist() == [[448.0, -448.0, 1.0, 0.0]]
    assert norms.quantize(x, "int8").out.tolist() == [[127, -127, 0, 0]]


@pytest.mark.parametrize("pdl", [0, 1])
def test_kernels_repeat_and_replay(pdl: int) -> None:
    from trtllm_cli.ops.cuda import norms, pointwise

    torch.manual_seed(0)
    gamma = random(4096, dtype=torch.bfloat16)
    first, second = ([random(33, 4096, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2))

    def chain(x: Tensor, residual: Tensor) -> list[Tensor]:
        normed = norms.norm(x, gamma, None, residual, eps=1e-5, pdl=pdl)
        gate = pointwise.gated(normed.out, normed.residual, "silu", pdl=pdl)
        token = norms.quantize(gate.out, "fp8", pdl=pdl)
        return [normed.out, gate.out, token.out, token.scales]

    assert_repeats(lambda: chain(*first))
    assert_replays(chain, first, second)


def test_refusals_of_the_library() -> None:
    from trtllm_cli.ops.cuda import library, norms, pointwise, rotary

    kernels = library.load()
    for params, name in (
        (pointwise.GatedParams, "gated"),
        (norms.NormParams, "norm"),
        (rotary.RotaryParams, "rotary"),
        (pointwise.EmbeddingParams, "embedding"),
    ):
        import ctypes

        assert kernels.struct_size(f"trtllm_{name}_params") == ctypes.sizeof(params)
        assert "7.5" in (kernels.supports(name, params(), 75) or "")
    params = norms.NormParams(tokens=1, width=8, dtype=library.FLOAT16, out_dtype=library.INT8)
    assert_refused(lambda: kernels.launch("norm", params), "scale")
    params = norms.NormParams(tokens=1, width=8, dtype=library.INT8, out_dtype=library.INT8)
    assert_refused(lambda: kernels.launch("norm", params), "int8")
    params = norms.NormParams(tokens=1, width=8, dtype=library.FLOAT16, out_dtype=library.FLOAT16)
    assert_refused(lambda: kernels.launch("norm", params), "null pointer")
    rope = rotary.RotaryParams(head_dim=63, dtype=library.FLOAT16, cache_dtype=library.FLOAT16, max_positions=1)
    assert_refused(lambda: kernels.launch("rotary", rope), "63")
