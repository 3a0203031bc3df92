"""Generation attention against its float64 twin, on a GPU."""

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
    assert_same_bits,
    gpu_examples,
    guarded_allocations,
    needs_gpu,
)
from tests.support_mmha import FP8, Problem, problem, tables
from trtllm_cli.ops.cuda import library, mmha, mmha_params, mmha_twin

pytestmark = [pytest.mark.gpu, needs_gpu]
HEAD_SIZES = (64, 80, 96, 128, 256)
CACHES = [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.int8), (torch.float16, FP8)]
caches = pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES, ids=["fp16", "bf16", "int8", "fp8"])


def check(p: Problem, tolerance: float | None = None, **extra: Any) -> Tensor:
    """The operator's result, checked: nothing outside written, everything inside written, and right."""
    workspace = p.workspace(p.q.shape[2])
    with guarded_allocations():
        found = mmha.mmha(p.q, *p.cache, workspace, **p.options, **p.scales, **extra)
    assert_close(found, p.wanted(), tolerance)
    assert int(workspace.count_nonzero()) == 0, "parts were left behind"
    return found


@caches
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_sequences_of_any_length(
    size: int, page_size: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    lengths = [1, 700, 0, 64, 63, 65, 2, 129, 16]
    check(problem(lengths, size=size, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype))


@caches
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 1), (12, 1), (16, 2), (40, 1), (10, 2)])
def test_groups_share_keys(
    size: int, heads: int, kv_heads: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    check(
        problem(
            [300, 129], size=size, heads=heads, kv_heads=kv_heads, dtype=dtype, cache_dtype=cache_dtype, page_size=32
        )
    )


@caches
@pytest.mark.parametrize("size", [80, 128])
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
@pytest.mark.parametrize("tokens", [1, 5])
def test_windows_caps_and_slopes(
    size: int, extras: dict[str, Any], tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    check(problem([700, 33, 3], size=size, tokens=tokens, dtype=dtype, cache_dtype=cache_dtype, **extras))


@pytest.mark.parametrize("tokens", [2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (12, 1)])
def test_several_new_tokens_see_their_own_past(tokens: int, heads: int, kv_heads: int) -> None:
    check(problem([500, tokens, 1, 0, 77], heads=heads, kv_heads=kv_heads, tokens=tokens))


@caches
def test_a_window_leaves_older_pages_unread(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Their entries of the page table may be stale."""
    p = problem([1000, 500], dtype=dtype, cache_dtype=cache_dtype, window=100)
    wanted = p.wanted()
    p.page_table[0, : 900 // 64] = 2**30
    p.page_table[1, : 400 // 64] = 2**30
    assert_close(p.found(), wanted)


@caches
@pytest.mark.parametrize("blocks", [1, 7, 100, 700])
@pytest.mark.parametrize("stages", [2, 3])
def test_any_split_gives_the_same_sum(
    blocks: int, stages: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    p = problem([3000, 5, 0, 900], dtype=dtype, cache_dtype=cache_dtype)
    workspace = mmha.new_workspace("cuda", 8, 2, 128, blocks=blocks)
    found = mmha.mmha(p.q, *p.cache, workspace, **p.options, **p.scales, blocks=blocks, stages=stages)
    assert_close(found, p.wanted())


@caches
@pytest.mark.parametrize("spread", [1e-3, 100.0, 1e4])
def test_huge_and_tiny_scores(spread: float, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    check(problem([260, 1000], dtype=dtype, cache_dtype=cache_dtype, spread=spread), tolerance=1e-2)


@pytest.mark.parametrize("batch", [33, 200])
def test_many_sequences(batch: int) -> None:
    check(problem([(37 * b) % 150 for b in range(batch)], heads=4, kv_heads=1, size=64, page_size=16))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads"),
    [(1, 900, 8, 8), (3, 1500, 4, 2), (64, 700, 8, 2), (50, 100, 32, 8), (200, 65, 12, 1)],
    ids=str,
)
def test_sequences_of_one_length(batch: int, length: int, heads: int, kv_heads: int) -> None:
    """Cuts between blocks then lie at ends of pairs: several blocks a pair, several pairs a block."""
    check(problem([length] * batch, heads=heads, kv_heads=kv_heads, size=64, page_size=16))


@caches
def test_one_pair_for_all_blocks(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    check(problem([20000], heads=8, kv_heads=1, dtype=dtype, cache_dtype=cache_dtype))
    check(problem([20000, 1], heads=3, kv_heads=1, dtype=dtype, cache_dtype=cache_dtype))


def test_long_sequences() -> None:
    check(problem([40000, 1, 9000]))
    check(problem([30000], cache_dtype=torch.int8))


@caches
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("pdl", [0, 1, 2])
def test_repeats_are_bit_identical_and_graphs_replay(
    size: int, pdl: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    p = problem([2000, 333, 0, 20], size=size, dtype=dtype, cache_dtype=cache_dtype)
    workspace = p.workspace(8)

    def call(q: Tensor, lengths: Tensor) -> Tensor:
        return mmha.mmha(q, *p.cache[:3], lengths, workspace, **p.options, **p.scales, pdl=pdl)

    assert_repeats(lambda: call(p.q, p.lengths), times=4)
    shorter = (p.lengths * 2) // 3
    assert_replays(call, [p.q, p.lengths], [p.q.flip(0), shorter])


@caches
def test_strides_and_neighbours(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """q a slice of a fused row, both caches in one buffer, a page table wider than its rows."""
    p = problem([200, 70], dtype=dtype, cache_dtype=cache_dtype, spare=3)
    both = torch.stack([p.k_cache.view(torch.uint8), p.v_cache.view(torch.uint8)], 1).view(p.k_cache.dtype)
    row = torch.randn(2, 12 * 128, device="cuda").to(dtype)
    q = row[:, : 8 * 128].view(2, 1, 8, 128)
    found = Problem(q, both[:, 0], both[:, 1], p.page_table, among_poison(p.lengths), p.options, p.scales)
    check(found)


def fused(
    lengths: list[int],
    *,
    norm: bool = False,
    rotary: int | None = None,
    interleaved: bool = False,
    positions: bool = False,
    heads: int = 8,
    size: int = 128,
    pdl: int = 0,
    **options: Any,
) -> None:
    """The fused launch against the twin: the cache byte by byte where nothing is summed before it, then the output."""
    p = problem(lengths, fused=True, heads=heads, size=size, **options)
    rotary = size if rotary is None else rotary
    turn: dict[str, Any] = {"interleaved": interleaved}
    if rotary:
        turn["cos"], turn["sin"] = tables(max(lengths) + 12, rotary)
    if positions:
        turn["positions"] = p.lengths + 10
    if norm:
        turn["q_norm"], turn["k_norm"] = torch.rand(2, size, device="cuda").to(p.q.dtype)
        turn |= {"norm_eps": 1e-5, "norm_offset": 0.5}
    before = [x.clone() for x in (p.k_cache, p.v_cache)]
    wanted_caches = [x.clone() for x in before]
    turn_twin = {"cos": None, "sin": None} | turn
    mmha_twin.append(p.q, *wanted_caches, p.page_table, p.lengths, **turn_twin, **p.scales)
    workspace = p.workspace(heads)
    with guarded_allocations():
        found = mmha.mmha_append(p.q, *p.cache, workspace, **p.options, **turn, **p.scales, pdl=pdl)
    for new, wanted, old in zip((p.k_cache, p.v_cache), wanted_caches, before, strict=True):
        if norm:
            # sums of squares differ in the last bit: a few values may round the other way
            different = new.view(torch.uint8) != wanted.view(torch.uint8)
            assert float(different.sum()) <= 0.02 * float((new.view(torch.uint8) != old.view(torch.uint8)).sum())
        else:
            assert_same_bits(new, wanted, "the cache and the twin's")
    # the twin's query in float64, over what the kernel wrote
    q = mmha_twin.append(
        p.q.double(), *[x.clone() for x in wanted_caches], p.page_table, p.lengths, **turn_twin, **p.scales
    )
    assert_close(found, mmha_twin.mmha(q, *p.cache, **p.options, **p.scales)[:, 0])


@caches
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_a_fused_row_is_rotated_cached_and_attended(
    size: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    fused([1, 700, 0, 64, 65, 17], size=size, dtype=dtype, cache_dtype=cache_dtype)


@caches
@pytest.mark.parametrize(
    "how",
    [
        {"norm": True},
        {"rotary": 0},
        {"rotary": 32, "positions": True},
        {"interleaved": True, "rotary": 96},
        {"norm": True, "window": 70, "soft_cap": 10.0, "pdl": 2},
        {"heads": 40, "kv_heads": 2, "alibi": True},
        {"heads": 6, "kv_heads": 6, "page_size": 16},
        {"size": 256, "norm": True, "rotary": 128, "pdl": 1},
    ],
    ids=str,
)
def test_fused_variants(how: dict[str, Any], dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    fused([300, 1, 33, 128], dtype=dtype, cache_dtype=cache_dtype, **how)


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8])
@pytest.mark.parametrize("scale", [2.0**-6, 0.0371, 1e-20, 3e-38, 1e20])
def test_new_rows_are_rounded_as_a_division_rounds_them(scale: float, cache_dtype: torch.dtype) -> None:
    """Quotients near the grid and its middles, on them, and beyond the grid; scales down to where they lose digits."""
    p = problem([7] * 64, heads=8, kv_heads=8, size=256, fused=True, cache_dtype=cache_dtype)
    quotients = torch.randint(-300, 301, p.q.shape, device="cuda") / 2 + torch.randn(p.q.shape, device="cuda") / 64
    quotients[:, ::7] *= 1e-3
    quotients[:, ::11] = quotients[:, ::11].round() / 2
    p.q.copy_(quotients.mul(scale).clamp(-3e38, 3e38))
    p.scales["k_scale"].fill_(scale)
    p.scales["v_scale"].fill_(scale * 1.37)
    wanted = [x.clone() for x in p.cache[:2]]
    mmha_twin.append(p.q, *wanted, p.page_table, p.lengths, cos=None, sin=None, **p.scales)
    mmha.mmha_append(p.q, *p.cache, p.workspace(8), **p.options, **p.scales)
    for found, exact in zip(p.cache[:2], wanted, strict=True):
        assert_same_bits(found, exact, "the cache and the twin's")


@gpu_examples
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=6),
    size=st.sampled_from(HEAD_SIZES),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 11),
    tokens=st.integers(1, 4),
    types=st.sampled_from([*CACHES, (torch.float16, torch.int8), (torch.bfloat16, FP8)]),
    window=st.sampled_from([0, 0, 1, 50, 129]),
    soft_cap=st.sampled_from([0.0, 0.0, 3.0]),
    alibi=st.booleans(),
    page_size=st.sampled_from([16, 32, 64, 128]),
    spare=st.integers(0, 40),
    blocks=st.sampled_from([0, 0, 3, 50]),
)
def test_any_problem(
    lengths: list[int],
    size: int,
    kv_heads: int,
    group: int,
    tokens: int,
    types: tuple[torch.dtype, torch.dtype | None],
    window: int,
    soft_cap: float,
    alibi: bool,
    page_size: int,
    spare: int,
    blocks: int,
) -> None:
    p = problem(
        lengths,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=size,
        page_size=page_size,
        dtype=types[0],
        cache_dtype=types[1],
        tokens=tokens,
        alibi=alibi,
        window=window,
        soft_cap=soft_cap,
        spare=spare,
    )
    check(p, blocks=blocks)


def test_only_the_output_is_written() -> None:
    p = problem([70, 0, 130], heads=8, size=96)
    out = Guarded((3, 1, 8, 96), p.q.dtype, strides=(8 * 200, 8 * 200, 200, 1))
    workspace = p.workspace(8)
    params = mmha_params.common(p.q, p.k_cache, p.v_cache, out.tensor, p.page_table, p.lengths, workspace)
    params.q_length, params.heads, params.scale = 1, 8, p.options["scale"]
    params.q_batch_stride, params.q_token_stride, params.q_head_stride = p.q.stride()[:3]
    library.load().launch("mmha", params)
    assert_close(out.check(), p.wanted())


def test_empty_batches() -> None:
    p = problem([5])
    empty = Problem(p.q[:0], p.k_cache, p.v_cache, p.page_table[:0], p.lengths[:0], p.options)
    assert empty.found().shape == (0, 1, 8, 128)
    p.lengths.zero_()
    assert int(p.found().count_nonzero()) == 0
    pages = problem([0, 0])  # a page table without columns, and then a pool without pages
    for pool in (pages.k_cache, pages.k_cache[:0]):
        found = Problem(pages.q, pool, pool, pages.page_table, pages.lengths, pages.options).found()
        assert found.shape == (2, 1, 8, 128) and int(found.count_nonzero()) == 0


def test_refusals_say_what_and_what_instead() -> None:
    p = problem([100])
    assert_refused(lambda: problem([100], size=72).found(), "head sizes", "72")
    assert_refused(lambda: problem([100], tokens=9).found(), "9", "fmha")
    assert_refused(lambda: problem([100], scale=0.0).found(), "scale above 0")
    assert_refused(lambda: p.found(stages=9), "stages")
    assert_refused(lambda: mmha.mmha(p.q, *p.cache, p.workspace(8)[:64], **p.options), "workspace", "64")
    odd = torch.zeros(4 * 2 * 64 * 128 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(4, 2, 64, 128)
    assert_refused(
        lambda: mmha.mmha(p.q, odd, odd, p.page_table, p.lengths, p.workspace(8), **p.options), "aligned to 16 bytes"
    )


def test_older_gpus_are_refused_with_a_sentence() -> None:
    params = mmha_params.MmhaParams(
        dtype=library.FLOAT16, cache_dtype=library.INT8, head_size=128, page_size=64, heads=8
    )
    params.kv_heads, params.q_length, params.scale = 8, 1, 1.0
    assert library.load().supports("mmha", params, 80) is None
    assert "8.0" in (library.load().supports("mmha", params, 75) or "")
    params.cache_dtype = library.BFLOAT16
    assert "bfloat16" in (library.load().supports("mmha", params, 90) or "")
