"""Context attention against its float64 twin, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support_gpu import assert_close, needs_gpu
from trtllm_cli.errors import UnsupportedError

pytestmark = [pytest.mark.gpu, needs_gpu]
HEAD_SIZES = (64, 80, 96, 128, 256)


def module() -> Any:
    from trtllm_cli.ops.cuda import fmha

    return fmha


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0).int()


@dataclass
class Problem:
    """Packed inputs, of which q, k and v are slices of one projection where the lengths allow."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_lengths: Sequence[int]
    kv_lengths: Sequence[int]
    options: dict[str, Any]

    def wanted(self) -> tuple[Tensor, Tensor]:
        from trtllm_cli.ops.cuda import fmha_twin

        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        return fmha_twin.fmha(q, k, v, starts(self.q_lengths), starts(self.kv_lengths), **self.options)

    def found(self, kernel: int = 0, half_sums: bool = False) -> tuple[Tensor, Tensor]:
        return module().fmha(
            self.q,
            self.k,
            self.v,
            starts(self.q_lengths),
            starts(self.kv_lengths),
            max(self.q_lengths),
            return_lse=True,
            kernel=kernel,
            half_sums=half_sums,
            **self.options,
        )


def problem(
    q_lengths: Sequence[int],
    kv_lengths: Sequence[int] | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    alibi: bool = False,
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    torch.manual_seed(seed)
    if kv_lengths is None or list(kv_lengths) == list(q_lengths):
        kv_lengths = q_lengths
        fused = torch.randn(sum(q_lengths), heads + 2 * kv_heads, size, device="cuda").to(dtype)
        q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    else:
        q = torch.randn(sum(q_lengths), heads, size, device="cuda").to(dtype)
        k, v = torch.randn(2, sum(kv_lengths), kv_heads, size, device="cuda").to(dtype)
    if spread != 1.0:
        q = (q.float() * spread).to(dtype)
    if alibi:
        options["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, heads, device="cuda")
    return Problem(q, k, v, q_lengths, kv_lengths, {"scale": size**-0.5, "causal": True, **options})


def check(p: Problem, kernel: int = 0, tolerance: float | None = None) -> None:
    out, lse = p.found(kernel)
    wanted, wanted_lse = p.wanted()
    assert_close(out, wanted, tolerance)
    seen = wanted_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()), "other queries see nothing"
    assert bool((lse[~seen] == -torch.inf).all())
    if bool(seen.any()):
        assert float((lse[seen].double() - wanted_lse[seen]).abs().max()) < 2e-3 * (
            1 + float(wanted_lse[seen].abs().max())
        )


@dataclass
class Paged:
    """A problem whose keys and values lie in shuffled pages; all else in the pools is NaN."""

    base: Problem
    page_size: int

    def __post_init__(self) -> None:
        counts = [-(-n // self.page_size) for n in self.base.kv_lengths]
        total = sum(counts) + 3
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
        kv_heads, size = self.base.k.shape[1:]
        shape = (total, 2, kv_heads, self.page_size, size)
        pool = torch.full(shape, float("nan"), device="cuda", dtype=self.base.q.dtype)
        self.k_cache, self.v_cache = pool[:, 0], pool[:, 1]
        self.table = torch.full((len(counts), max(counts) + 2), -1, dtype=torch.int32, device="cuda")
        used = row = 0
        for b, (count, length) in enumerate(zip(counts, self.base.kv_lengths, strict=True)):
            for i in range(count):
                page = int(order[used])
                used += 1
                self.table[b, i] = page
                n = min(self.page_size, length - i * self.page_size)
                at = row + i * self.page_size
                self.k_cache[page, :, :n] = self.base.k[at : at + n].transpose(0, 1)
                self.v_cache[page, :, :n] = self.base.v[at : at + n].transpose(0, 1)
            row += length
        self.lengths = torch.tensor(self.base.kv_lengths, dtype=torch.int32, device="cuda")

    def check(self, kernel: int = 0, half_sums: bool = False, tolerance: float | None = None) -> None:
        b = self.base
        out, lse = module().fmha_paged(
            b.q,
            self.k_cache,
            self.v_cache,
            self.table,
            self.lengths,
            starts(b.q_lengths),
            max(b.q_lengths),
            return_lse=True,
            half_sums=half_sums,
            kernel=kernel,
            **b.options,
        )
        wanted, wanted_lse = b.wanted()
        assert_close(out, wanted, tolerance)
        seen = wanted_lse.isfinite()
        assert torch.equal(seen, lse.isfinite())


KERNELS = [1, 2]
KERNEL_NAMES = {1: "portable", 2: "hopper"}
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=KERNEL_NAMES.__getitem__)


def skip_unless_available(kernel: int) -> None:
    if kernel == 2 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's kernel needs compute capability 9.0")


@kernels
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_packed_sequences_of_any_length(size: int, dtype: torch.dtype, causal: bool, kernel: int) -> None:
    skip_unless_available(kernel)
    check(problem([1, 200, 64, 0, 515, 128], size=size, dtype=dtype, causal=causal), kernel)


@kernels
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (6, 2), (5, 5)])
def test_heads_share_keys(size: int, heads: int, kv_heads: int, kernel: int) -> None:
    skip_unless_available(kernel)
    check(problem([300, 129], size=size, heads=heads, kv_heads=kv_heads), kernel)


@kernels
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize(
    "extras",
    [
        {"window": 1},
        {"window": 100},
        {"window": 257},
        {"soft_cap": 5.0},
        {"alibi": True},
        {"window": 300, "soft_cap": 2.0, "alibi": True},
    ],
    ids=str,
)
def test_windows_caps_and_slopes(size: int, extras: dict[str, Any], kernel: int) -> None:
    skip_unless_available(kernel)
    check(problem([700, 33], size=size, **extras), kernel)


@kernels
@pytest.mark.parametrize("causal", [True, False])
def test_queries_are_the_last_positions(causal: bool, kernel: int) -> None:
    """Fewer queries than keys, more of them (some see nothing when causal), and no keys at all."""
    skip_unless_available(kernel)
    check(problem([5, 200, 300, 70, 9], [600, 333, 150, 0, 9], causal=causal), kernel)
    check(problem([5, 200, 300, 70, 9], [600, 333, 150, 0, 9], window=64), kernel)
    out, _ = problem([5, 70], [0, 0], causal=causal).found(kernel)
    assert bool((out == 0).all())


@kernels
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_chunks_over_a_paged_cache(size: int, page_size: int, kernel: int) -> None:
    """Nothing of a page past a sequence's length is used, nor any page past its last."""
    skip_unless_available(kernel)
    Paged(problem([7, 150, 64, 1], [400, 150, 130, 1], size=size), page_size).check(kernel)
    Paged(problem([200, 31], [401, 900], size=size, window=130), page_size).check(kernel)


@kernels
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("heads", [2, 4, 6, 8, 16], ids="{} heads".format)
def test_few_queries_after_many_keys(size: int, heads: int, kernel: int) -> None:
    """Where heads that share keys may share a tile: each row keeps its own head, position and slope."""
    skip_unless_available(kernel)
    few = problem([16, 3, 1, 0, 37], [1000, 700, 130, 70, 37], size=size, heads=2 * heads, kv_heads=2, alibi=True)
    check(few, kernel)
    Paged(problem([16, 1], [333, 64], size=size, heads=heads, kv_heads=1, window=70), 64).check(kernel)


@kernels
def test_what_lies_after_a_sequence_never_reaches_it(kernel: int) -> None:
    skip_unless_available(kernel)
    p = problem([100, 77], [190, 77])
    wanted = p.found(kernel)[0][:100].clone()
    for x in (p.k, p.v):
        x[190:] = float("nan")
    assert torch.equal(p.found(kernel)[0][:100], wanted)


@kernels
@pytest.mark.parametrize("size", [64, 128])
def test_huge_scores_and_first_rows_stay_finite(size: int, kernel: int) -> None:
    skip_unless_available(kernel)
    check(problem([260], size=size, spread=100.0), kernel, tolerance=1.5e-2)


@kernels
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_only_the_output_is_written(size: int, kernel: int) -> None:
    """Every element of out is, and nothing before, between or after its rows."""
    skip_unless_available(kernel)
    fmha = module()
    p = problem([70, 130, 3], size=size)
    guard = 4
    total, heads = p.q.shape[0], p.q.shape[1]
    buffer = torch.full((total + 2 * guard, heads + 2, size), float("nan"), device="cuda", dtype=p.q.dtype)
    lse = torch.full((heads + 2, total), float("nan"), device="cuda")
    out = buffer[guard:-guard, 1:-1]
    q_starts = starts(p.q_lengths)
    params = fmha._params(p.q, p.k, p.v, out, lse[1:-1], q_starts, 130, p.options["scale"], True, 0, 0.0, None)
    params.kv_starts, params.kv_tokens, params.kv_heads = q_starts.data_ptr(), total, p.k.shape[1]
    params.k_token_stride, params.k_head_stride = p.k.stride()[:2]
    params.v_token_stride, params.v_head_stride = p.v.stride()[:2]
    params.kernel = kernel
    fmha._launch(params, p.q)
    wanted, wanted_lse = p.wanted()
    assert_close(out, wanted)
    assert float((lse[1:-1] - wanted_lse).abs().max()) < 1e-2
    out.fill_(float("nan"))
    lse[1:-1] = float("nan")
    assert bool(buffer.isnan().all()), "elements outside of the output were written"
    assert bool(lse.isnan().all())


@kernels
@pytest.mark.parametrize("size", [64, 128, 256])
def test_two_runs_are_bit_identical_and_a_graph_replays_them(size: int, kernel: int) -> None:
    skip_unless_available(kernel)
    p = problem([900, 333, 20], size=size, heads=8)
    first = p.found(kernel)
    q_starts = starts(p.q_lengths)

    def call() -> Any:
        return module().fmha(p.q, p.k, p.v, q_starts, q_starts, 900, return_lse=True, kernel=kernel, **p.options)

    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


#: of float16 sums within a tile; half of it is what a simulation of the roundings of 16 products each gives
NARROW = 1.5e-3


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}, {"soft_cap": 5.0, "alibi": True}])
def test_sums_in_float16_stay_near(size: int, options: dict[str, Any]) -> None:
    p = problem([600, 40], size=size, dtype=torch.float16, **options)
    narrow = p.found(kernel=1, half_sums=True)[0]
    assert_close(narrow, p.wanted()[0], tolerance=NARROW)
    assert not torch.equal(narrow, p.found(kernel=1)[0]), "the sums were as wide as ever"


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_sums_in_float16_of_large_scores(size: int) -> None:
    """Scores of some hundreds: what float16 rounds off them is a tenth in an exponent."""
    p = problem([300], size=size, dtype=torch.float16, spread=10.0)
    assert_close(p.found(kernel=1, half_sums=True)[0], p.wanted()[0], tolerance=5 * NARROW)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_sums_in_float16_over_a_paged_cache(size: int) -> None:
    Paged(problem([64, 7], [200, 61], size=size, dtype=torch.float16), 32).check(1, half_sums=True, tolerance=NARROW)


def test_whoever_allows_float16_sums_gets_them_only_where_they_are_faster() -> None:
    p = problem([600, 40], dtype=torch.float16)
    chosen = p.found(half_sums=True)[0]
    wide = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] in (80, 90, 100)
    assert torch.equal(chosen, p.found()[0]) == wide


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5),
    size=st.sampled_from(HEAD_SIZES),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 50, 129]),
    soft_cap=st.sampled_from([0.0, 0.0, 3.0]),
    alibi=st.booleans(),
    page_size=st.sampled_from([0, 16, 32, 64, 128]),
)
def test_any_problem(
    lengths: list[tuple[int, int]],
    size: int,
    kv_heads: int,
    group: int,
    dtype: torch.dtype,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi: bool,
    page_size: int,
) -> None:
    q_lengths, more = zip(*lengths, strict=True)
    if sum(q_lengths) == 0:
        return
    kv_lengths = [q + m for q, m in lengths] if page_size else more
    if sum(kv_lengths) == 0:
        return
    p = problem(
        q_lengths,
        kv_lengths,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=size,
        dtype=dtype,
        causal=causal,
        window=window if causal else 0,
        soft_cap=soft_cap,
        alibi=alibi,
    )
    if page_size:
        Paged(p, page_size).check()
    else:
        check(p)


def test_refusals_say_what_and_what_instead() -> None:
    p = problem([16])
    odd = torch.randn(16, 8, 72, device="cuda").bfloat16()
    one = starts([16])
    cases = [
        (lambda: module().fmha(odd, odd, odd, one, one, 16, 0.1), "head sizes"),
        (lambda: problem([16], scale=0.0).found(), "scale above 0"),
        (lambda: problem([16], causal=False, window=4).found(), "window"),
        (lambda: problem([16], soft_cap=-1.0).found(), "soft cap"),
        (lambda: p.found(half_sums=True), "float16 only for float16"),
        (lambda: problem([16], dtype=torch.float16).found(kernel=2, half_sums=True), "leave half_sums off"),
        (lambda: p.found(kernel=9), "kernel"),
    ]
    for call, words in cases:
        with pytest.raises(UnsupportedError, match=words) as refused:
            call()
        assert refused.value.code == "KERNEL_REFUSED"
    shifted = torch.randn(16 * 8 * 64 + 1, device="cuda").bfloat16()[1:].view(16, 8, 64)
    with pytest.raises(UnsupportedError, match="aligned to 16"):
        module().fmha(shifted, shifted, shifted, one, one, 16, 0.1)
    strided = torch.randn(16, 8 * 64 + 4, device="cuda").bfloat16()[:, : 8 * 64].unflatten(1, (8, 64))
    with pytest.raises(UnsupportedError, match="multiples of 8"):
        module().fmha(strided, strided, strided, one, one, 16, 0.1)
