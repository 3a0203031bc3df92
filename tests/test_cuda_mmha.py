"""The twin of generation attention against torch's attention and Hugging Face's rotary; the operators on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.support_gpu import assert_close, assert_refused
from tests.support_mmha import FP8, Problem, problem, tables
from trtllm_cli.ops.cuda import mmha, mmha_twin
from trtllm_cli.ops.quantized import kv_round_trip


def oracle(p: Problem, b: int) -> Tensor:
    """Sequence ``b`` through torch's attention, cache and mask written key by key: [T, heads, D]."""
    _, tokens, heads, _ = p.q.shape
    page_size, length = p.k_cache.shape[2], int(p.lengths[b])
    keys: list[Tensor] = []
    for cache, factors in ((p.k_cache, p.scales.get("k_scale")), (p.v_cache, p.scales.get("v_scale"))):
        rows = torch.stack([cache[int(p.page_table[b, j // page_size]), :, j % page_size] for j in range(length)], 1)
        keys.append(rows.double() if factors is None else rows.double() * factors.double()[:, None, None])
    bias = torch.zeros(heads, tokens, length, dtype=torch.float64)
    window, slopes = p.options.get("window", 0), p.options.get("alibi_slopes")
    for t in range(tokens):
        at = length - tokens + t
        for j in range(length):
            if j > at or (window and j <= at - window):
                bias[:, t, j] = -torch.inf
            elif slopes is not None:
                bias[:, t, j] = slopes.double() * (j - at)
    out = F.scaled_dot_product_attention(
        p.q[b].double().transpose(0, 1)[None],
        keys[0][None],
        keys[1][None],
        attn_mask=bias[None],
        scale=p.options["scale"],
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    tokens=st.integers(1, 3),
    window=st.sampled_from([0, 1, 9]),
    alibi=st.booleans(),
    cache_dtype=st.sampled_from([None, torch.int8, FP8]),
)
def test_the_twin_is_torchs_attention(
    lengths: list[int],
    kv_heads: int,
    group: int,
    tokens: int,
    window: int,
    alibi: bool,
    cache_dtype: torch.dtype | None,
) -> None:
    p = problem(
        lengths,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=64,
        page_size=16,
        tokens=tokens,
        window=window,
        alibi=alibi,
        cache_dtype=cache_dtype,
        device="cpu",
    )
    found = p.wanted()
    for b, length in enumerate(lengths):
        alone = max(0, tokens - length)  # tokens before the sequence's start, which see nothing
        assert int(found[b, :alone].count_nonzero()) == 0
        if length:
            assert_close(found[b, alone:], oracle(p, b)[alone:], 1e-12)


def test_a_soft_cap_bounds_the_scores() -> None:
    p = problem([3], heads=1, kv_heads=1, size=64, device="cpu", soft_cap=2.0, spread=30.0)
    k = p.k_cache[int(p.page_table[0, 0]), 0, :3].double()
    v = p.v_cache[int(p.page_table[0, 0]), 0, :3].double()
    scores = 2.0 * torch.tanh(k @ p.q[0, 0, 0].double() / 8.0 / 2.0)
    assert_close(p.wanted()[0, 0, 0], scores.softmax(0) @ v, 1e-12)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, FP8])
def test_appending_is_hugging_faces_norm_and_rotary_then_the_caches_rounding(
    norm: bool, cache_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    heads, kv_heads, size, lengths = 4, 2, 64, [5, 33, 0, 16]
    p = problem(
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        page_size=16,
        fused=True,
        cache_dtype=cache_dtype,
        device="cpu",
    )
    row = p.q.float()
    cos, sin = tables(40, size, "cpu")
    weights = torch.rand(2, size)
    options: dict[str, Any] = {"q_norm": weights[0], "k_norm": weights[1], "norm_eps": 1e-5} if norm else {}
    before = p.k_cache.clone()
    q = mmha_twin.append(row, *p.cache, cos, sin, **options, **p.scales)

    wide = row.view(4, heads + 2 * kv_heads, 1, size)
    parts = list(wide.split([heads, kv_heads, kv_heads], 1))
    if norm:
        for i in range(2):
            layer = Qwen3RMSNorm(size, 1e-5)
            layer.weight.data = weights[i]
            parts[i] = layer(parts[i])
    at = (p.lengths.long() - 1).clamp(min=0)
    both = [torch.cat([table[at], table[at]], -1)[:, None] for table in (cos, sin)]
    wanted_q, wanted_k = apply_rotary_pos_emb(parts[0], parts[1], *both)
    real = [b for b, length in enumerate(lengths) if length]
    assert_close(q[real, 0], wanted_q[real, :, 0].double(), 1e-6)
    for name, cache, wanted in (("k_scale", p.k_cache, wanted_k), ("v_scale", p.v_cache, parts[2])):
        for b in real:
            slot = lengths[b] - 1
            new = cache[int(p.page_table[b, slot // 16]), :, slot % 16].float()
            if cache_dtype is None:
                assert_close(new, wanted[b, :, 0].double(), 3e-3)
            else:
                kind = "int8" if cache_dtype == torch.int8 else "fp8"
                given = kv_round_trip(wanted[b : b + 1].detach(), kind, p.scales[name])[0, :, 0]
                assert_close(new * p.scales[name][:, None], given.double(), 1e-3)
    changed = (before.view(torch.uint8) != p.k_cache.view(torch.uint8)).any(-1).any(1).sum()
    assert int(changed) == len(real), "other positions were written"


def test_interleaved_rotation_turns_neighbours() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    cos, sin = tables(10, 8, "cpu")
    at = torch.tensor([3, 7])
    found = mmha_twin.rotate(x, at, cos, sin, interleaved=True)
    turned = torch.view_as_complex(x.view(2, 3, 4, 2)) * torch.complex(cos, sin)[at][:, None]
    assert_close(found, torch.view_as_real(turned).flatten(-2), 1e-6)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, FP8])
def test_the_operators_on_a_cpu_are_the_twin(cache_dtype: torch.dtype | None) -> None:
    p = problem([20, 0, 3], device="cpu", cache_dtype=cache_dtype)
    assert p.found().dtype == torch.bfloat16
    assert_close(p.found(), p.wanted(), 6e-3)
    row = problem([20, 0, 3], device="cpu", cache_dtype=cache_dtype, fused=True)
    cos, sin = tables(32, 128, "cpu")
    workspace = mmha.new_workspace("cpu", 8, 2, 128)
    out = mmha.mmha_append(row.q, *row.cache, workspace, **row.options, cos=cos, sin=sin, **row.scales)
    assert out.shape == (3, 8, 128)
    assert int(out[1].count_nonzero()) == 0


def test_no_pages_give_zeros() -> None:
    p = problem([0, 0], device="cpu")
    found = Problem(p.q, p.k_cache[:0], p.v_cache[:0], p.page_table, p.lengths, p.options).found()
    assert found.shape == (2, 1, 8, 128)
    assert int(found.count_nonzero()) == 0


def test_shapes_without_data() -> None:
    p = problem([20, 3], device="cpu")
    with FakeTensorMode() as mode:
        q, k, v, table, lengths = (mode.from_tensor(x) for x in (p.q, *p.cache))
        workspace = torch.empty(16, dtype=torch.uint8)
        assert mmha.mmha(q, k, v, table, lengths, workspace, 0.1).shape == (2, 1, 8, 128)
        row = torch.empty(2, 12 * 128, dtype=torch.bfloat16)
        assert mmha.mmha_append(row, k, v, table, lengths, workspace, 0.1).shape == (2, 8, 128)


def test_refusals_name_what_is_wrong() -> None:
    p = problem([20, 3], device="cpu")
    row = torch.zeros(2, 12 * 128, dtype=torch.bfloat16)
    empty = mmha.new_workspace("cpu", 8, 2, 128)
    cos, sin = tables(32, 128, "cpu")
    scale = torch.ones(2)

    def call(**changed: Any) -> Any:
        names = ("q", "k_cache", "v_cache", "page_table", "lengths")
        given = dict(zip(names, (p.q, *p.cache), strict=True)) | {"workspace": empty, **p.options} | changed
        return lambda: mmha.mmha(**given)

    def fused(**changed: Any) -> Any:
        return lambda: mmha.mmha_append(row, *p.cache, empty, **({"scale": 0.1, "cos": cos, "sin": sin} | changed))

    assert_refused(call(q=p.q[0]), "q [batch, tokens, heads, D]")
    assert_refused(call(q=p.q[..., :64].contiguous()), "one head size")
    assert_refused(call(q=p.q[:, :, :7].contiguous()), "7 query heads over 2", "a multiple")
    assert_refused(call(q=p.q.half()), "float16", "int8")
    assert_refused(call(lengths=p.lengths.long()), "lengths", "int32")
    assert_refused(call(page_table=p.page_table[:1]), "page_table", "[2, max_pages]")
    assert_refused(call(k_cache=p.k_cache[:0], v_cache=p.v_cache[:0]), "1 columns", "without pages")
    assert_refused(call(k_scale=scale), "k_scale given")
    assert_refused(call(k_cache=p.k_cache.to(torch.int8), v_cache=p.v_cache.to(torch.int8)), "k_scale missing")
    assert_refused(call(k_cache=p.k_cache[:, :, :8]), "caches")
    assert_refused(call(alibi_slopes=torch.ones(3)), "alibi_slopes", "[8]")
    assert_refused(call(q=p.q.expand(2, 9, 8, 128)), "9 new tokens", "fmha")
    assert_refused(call(window=-1), "window of -1")
    assert_refused(fused(sin=None), "one of cos and sin")
    assert_refused(fused(cos=cos[:, :5], sin=sin[:, :5]), "multiple of 4")
    assert_refused(fused(positions=torch.zeros(3, dtype=torch.int32)), "positions", "[2]")
    assert_refused(fused(q_norm=torch.ones(128)), "q_norm", "bfloat16")
    assert_refused(lambda: mmha.mmha_append(row[:, :-1], *p.cache, empty, 0.1), "1535 elements")
