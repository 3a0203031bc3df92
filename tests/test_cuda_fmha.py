"""The twin of context attention against torch's own attention with explicit masks, and the operators on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import fmha, fmha_twin


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, slopes: Tensor | None) -> Tensor:
    """One sequence through torch's attention, the mask written element by element. [S, heads, D] -> the same."""
    queries, keys = q.shape[0], k.shape[0]
    bias = torch.zeros(q.shape[1], queries, keys, dtype=q.dtype)
    for i in range(queries):
        p = i + keys - queries
        for j in range(keys):
            hidden = (causal and j > p) or (window > 0 and j <= p - window)
            if hidden:
                bias[:, i, j] = -torch.inf
            elif slopes is not None:
                bias[:, i, j] = slopes * (j - p)
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=bias[None], scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    queries=st.integers(1, 12),
    earlier=st.integers(0, 12),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 5]),
    alibi=st.booleans(),
)
def test_the_twin_is_torchs_attention(
    queries: int, earlier: int, kv_heads: int, group: int, causal: bool, window: int, alibi: bool
) -> None:
    torch.manual_seed(queries * 100 + earlier)
    heads, keys = kv_heads * group, queries + earlier
    q = torch.randn(queries, heads, 16, dtype=torch.float64)
    k, v = torch.randn(2, keys, kv_heads, 16, dtype=torch.float64)
    slopes = torch.rand(heads, dtype=torch.float64) if alibi else None
    window = window if causal else 0
    found, _ = fmha_twin.fmha(
        q, k, v, starts([queries]), starts([keys]), scale=0.3, causal=causal, window=window, alibi_slopes=slopes
    )
    torch.testing.assert_close(found, oracle(q, k, v, 0.3, causal, window, slopes), rtol=1e-9, atol=1e-12)


def test_a_soft_cap_is_gemmas() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 32, dtype=torch.float64)

    class Layer:
        num_key_value_groups = 1
        training = False
        head_dim = 32

    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    wanted, _ = eager_attention_forward(Layer(), q, k, v, mask, scaling=0.2, softcap=1.5)  # type: ignore[arg-type]
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    found, _ = fmha_twin.fmha(*packed, starts([9]), starts([9]), scale=0.2, causal=True, soft_cap=1.5)
    # Gemma's softmax is in float32 whatever the type
    torch.testing.assert_close(found, wanted[0], rtol=1e-5, atol=1e-6)


def test_packed_sequences_do_not_see_each_other_and_the_log_sum_exp_is_theirs() -> None:
    torch.manual_seed(0)
    q_lengths, kv_lengths = [3, 0, 5, 4], [7, 2, 5, 0]
    q = torch.randn(12, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, 14, 2, 16, dtype=torch.float64)
    out, lse = fmha_twin.fmha(q, k, v, starts(q_lengths), starts(kv_lengths), scale=0.25, causal=False)
    torch.testing.assert_close(out[:3], oracle(q[:3], k[:7], v[:7], 0.25, False, 0, None))
    torch.testing.assert_close(out[3:8], oracle(q[3:8], k[9:], v[9:], 0.25, False, 0, None))
    assert bool((out[8:] == 0).all()), "queries without keys give zeros"
    assert bool((lse[:, 8:] == -torch.inf).all())
    scores = torch.einsum("shd,thd->hst", q[3:8], k[9:].repeat_interleave(2, 1)) * 0.25
    torch.testing.assert_close(lse[:, 3:8], scores.exp().sum(-1).log())


def test_queries_before_the_first_key_give_zeros() -> None:
    torch.manual_seed(0)
    q = torch.randn(5, 1, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 1, 16, dtype=torch.float64)
    out, lse = fmha_twin.fmha(q, k, v, starts([5]), starts([2]), scale=1.0, causal=True)
    assert bool((out[:3] == 0).all()) and bool((lse[:, :3] == -torch.inf).all())
    torch.testing.assert_close(out[3:], oracle(q[3:], k, v, 1.0, True, 0, None))


def test_a_paged_cache_is_the_packed_keys_in_pages() -> None:
    torch.manual_seed(0)
    lengths = [20, 33, 0, 16]
    k, v = torch.randn(2, sum(lengths), 2, 64).half()
    q = torch.randn(9, 4, 64).half()
    table = torch.tensor([[5, 0, -1], [2, 7, 1], [-1, -1, -1], [4, -1, -1]], dtype=torch.int32)
    caches = []
    for x in (k, v):
        cache = torch.full((8, 2, 16, 64), float("nan")).half()
        row = 0
        for b, length in enumerate(lengths):
            for j in range(length):
                cache[table[b, j // 16], :, j % 16] = x[row + j]
            row += length
        caches.append(cache)
    q_starts = starts([3, 4, 1, 1])
    paged, lse = torch.ops.trtllm_cli.fmha_paged(
        q, *caches, table, torch.tensor(lengths, dtype=torch.int32), q_starts, 4, 0.125, return_lse=True
    )
    packed, packed_lse = torch.ops.trtllm_cli.fmha(q, k, v, q_starts, starts(lengths), 4, 0.125, return_lse=True)
    assert torch.equal(paged, packed) and torch.equal(lse, packed_lse)


def test_shapes_are_known_without_running() -> None:
    with FakeTensorMode():
        q, k = torch.empty(10, 8, 64, dtype=torch.half), torch.empty(12, 2, 64, dtype=torch.half)
        at = torch.empty(3, dtype=torch.int32)
        out, lse = torch.ops.trtllm_cli.fmha(q, k, k, at, at, 10, 0.1, return_lse=True)
        assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (8, 10) and lse.dtype == torch.float32
        _, none = torch.ops.trtllm_cli.fmha(q, k, k, at, at, 10, 0.1)
        assert none.shape == (0,)


def test_the_output_is_contiguous_whatever_the_query_is() -> None:
    fused = torch.randn(6, 4 * 64).half()
    q, k, v = (x.unflatten(1, (-1, 64)) for x in fused.split([128, 64, 64], 1))
    out, _ = torch.ops.trtllm_cli.fmha(q, k, v, starts([6]), starts([6]), 6, 0.125)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(4, 64)}, "q \\(4, 64\\)"),
        ({"k": torch.zeros(4, 2, 64)}, "float32"),
        ({"v": torch.zeros(4, 2, 32).half()}, "v \\(4, 2, 32\\)"),
        ({"k": torch.zeros(4, 3, 64).half(), "v": torch.zeros(4, 3, 64).half()}, "4 query heads over 3 kv heads"),
        ({"q_starts": torch.tensor([0, 4])}, "q_starts"),
        ({"kv_starts": torch.tensor([0, 2, 4], dtype=torch.int32)}, "kv_starts"),
        ({"alibi_slopes": torch.ones(3)}, "slopes"),
        ({"window": 3, "causal": False}, "window"),
        ({"q": torch.zeros(4, 4, 128).half()[..., ::2]}, "strided"),
        (
            {n: torch.zeros(4, h, 64).bfloat16() for n, h in (("q", 4), ("k", 2), ("v", 2))} | {"half_sums": True},
            "sums",
        ),
    ],
)
def test_refusals_name_what_is_wrong(change: dict[str, object], words: str) -> None:
    arguments = {
        "q": torch.zeros(4, 4, 64).half(),
        "k": torch.zeros(4, 2, 64).half(),
        "v": torch.zeros(4, 2, 64).half(),
        "q_starts": starts([4]),
        "kv_starts": starts([4]),
        "max_q_length": 4,
        "scale": 0.1,
    }
    with pytest.raises(UnsupportedError, match=words) as refused:
        torch.ops.trtllm_cli.fmha(**{**arguments, **change})
    assert refused.value.code == "KERNEL_REFUSED" and refused.value.hint


def test_the_mirror_has_the_size_of_the_c_struct() -> None:
    """11 pointers, 14 int64, 14 fields of 32 bits: no hole the C compiler would fill otherwise."""
    import ctypes

    assert ctypes.sizeof(fmha.FmhaParams) == 11 * 8 + 14 * 8 + 14 * 4
