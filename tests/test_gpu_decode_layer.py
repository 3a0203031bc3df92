"""Decoder layers for one token on a GPU, in one launch and in five a layer, against the layers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scripts.kernel_bench import decode_layer as bench
from scripts.kernel_bench.decode_layer import LLAMA_8B, Shape, Stack
from tests.support_decode_layer import OTHER, SMALL, cached, made_stack, reference
from tests.support_gpu import (
    assert_close,
    assert_refused,
    assert_repeats,
    assert_replays,
    bits,
    gpu_examples,
    guarded_allocations,
    needs_gpu,
)
from tests.support_weight_only import KINDS

pytestmark = [pytest.mark.gpu, needs_gpu]
#: of what a layer adds to x: five roundings of intermediates to the type, the last of the sum with x; layers add up
TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
CALLS = [bench.one_launch, bench.five_launches]


def token(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, shape.hidden, generator=made, device="cuda").to(dtype)


def agrees(x: Tensor, stack: Stack, call: Any = bench.one_launch) -> Tensor:
    """The output, checked, with the keys and values that were written; and nothing else was."""
    before = [bits(pool).clone() for layer in stack.layers for pool in (layer.k_cache, layer.v_cache)]
    wanted, written = reference(x, stack)
    with guarded_allocations():
        found = call(x, stack)
    stack.ready.check()
    allowed = TOLERANCES[x.dtype] * len(stack.layers)
    assert_close(found.double() - x, wanted - x, allowed)
    for pair, exact in zip(cached(stack), written):
        for one, other in zip(pair, exact):
            assert_close(one, other, allowed)
    rows = len(before) * stack.shape.kv_heads * stack.shape.head_size * 2
    after = [bits(pool) for layer in stack.layers for pool in (layer.k_cache, layer.v_cache)]
    assert sum(int((one != other).sum()) for one, other in zip(before, after)) <= rows
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SMALL, OTHER])
def test_small_layers_agree(kind: str, dtype: torch.dtype, shape: Shape) -> None:
    for context in (1, 65, 700):
        agrees(token(shape, dtype), made_stack(kind, shape, context, dtype, layers=2, bias=context > 65))


@gpu_examples
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    size=st.sampled_from([64, 128]),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 8),
    hidden=st.integers(1, 20),
    wide=st.integers(1, 40),
    context=st.integers(1, 3000),
    page_size=st.sampled_from([16, 32, 64, 128]),
    block_keys=st.sampled_from([0, 16, 48, 1024]),
    layers=st.integers(1, 4),
    bias=st.booleans(),
)
def test_any_shape_agrees(
    kind: str,
    dtype: torch.dtype,
    size: int,
    kv_heads: int,
    group: int,
    hidden: int,
    wide: int,
    context: int,
    page_size: int,
    block_keys: int,
    layers: int,
    bias: bool,
) -> None:
    step = int(kind.split()[1][1:]) if kind.startswith("int4") else 16
    if kv_heads * group * size % step:
        group = 2  # a head is 64 or 128 wide, and groups of 128 must divide them all
    shape = Shape(hidden * step, kv_heads * group, kv_heads, size, wide * step)
    stack = made_stack(kind, shape, context, dtype, layers, page_size=page_size, bias=bias, block_keys=block_keys)
    agrees(token(shape, dtype), stack)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", bench.KINDS)
@pytest.mark.parametrize("context", bench.CONTEXTS)
def test_layers_of_an_8b_model_agree(kind: str, context: int, call: Any) -> None:
    agrees(token(LLAMA_8B, torch.bfloat16), made_stack(kind, LLAMA_8B, context, torch.bfloat16, layers=2), call)


@pytest.mark.parametrize("kind", bench.KINDS)
def test_five_launches_with_programmatic_launch_give_the_bits_of_those_without(kind: str) -> None:
    stack = made_stack(kind, SMALL, 300, torch.bfloat16, layers=4)
    x = token(SMALL, torch.bfloat16)
    wanted = bench.five_launches(x, stack, pdl=False)
    assert torch.equal(assert_repeats(lambda: bench.five_launches(x, stack), 5), wanted)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", bench.KINDS)
def test_runs_and_replays_give_the_same_bits(kind: str, call: Any) -> None:
    stack = made_stack(kind, SMALL, 300, torch.bfloat16, layers=4)
    x = token(SMALL, torch.bfloat16)
    assert_repeats(lambda: call(x, stack), 5)
    assert_replays(lambda y: call(y, stack), [x], [token(SMALL, torch.bfloat16, 1)])
    stack.ready.check()


def test_a_launch_that_overlaps_the_one_before_waits_for_its_output() -> None:
    stack = made_stack("int8", SMALL, 300, torch.bfloat16, layers=2)

    def twice(pdl: bool) -> Tensor:
        x = token(SMALL, torch.bfloat16)
        for _ in range(6):
            x = bench.one_launch(x, stack, pdl=pdl)
        return x

    assert torch.equal(assert_repeats(lambda: twice(True)), twice(False))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", bench.KINDS)
def test_tokens_one_after_another_attend_to_those_before(kind: str, call: Any) -> None:
    """Each step sees what the steps before wrote, over the end of a page."""
    stack = made_stack(kind, SMALL, 70, torch.bfloat16, layers=2)
    for step, length in enumerate(range(61, 71)):
        stack.lengths.fill_(length)
        agrees(token(SMALL, torch.bfloat16, step), stack, call)


def test_what_lies_behind_the_newest_key_is_not_used() -> None:
    stack = made_stack("int8", SMALL, 128, torch.bfloat16)
    stack.lengths.fill_(75)
    page = int(stack.page_table[0, 1])
    for pool in (stack.layers[0].k_cache, stack.layers[0].v_cache):
        pool[page, :, 10:] = torch.nan
    agrees(token(SMALL, torch.bfloat16), stack)


def test_the_output_may_be_the_input() -> None:
    from trtllm_cli.ops.cuda import decode_layer_params, library

    stack = made_stack("dense", SMALL, 33, torch.bfloat16, layers=2)
    x = token(SMALL, torch.bfloat16)
    wanted = bench.one_launch(x, stack)
    params = decode_layer_params.sizes(stack.layers[0], stack.cos, stack.page_table.shape[1])
    held = x.clone()
    tensors = {"x": held, "out": held, "table": stack.ready._table, "page_table": stack.page_table}
    tensors |= {"lengths": stack.lengths, "cos": stack.cos, "sin": stack.sin, "failed": stack.ready.failed}
    for name, tensor in tensors.items():
        setattr(params, name, tensor.data_ptr())
    params.layers, params.norm_eps = 2, bench.EPS
    params.workspace, params.workspace_bytes = stack.ready.workspace.data_ptr(), stack.ready.workspace.nbytes
    library.load().launch("decode_layer", params)
    assert torch.equal(held, wanted)


def test_what_the_launcher_refuses() -> None:
    x = token(SMALL, torch.bfloat16)
    stack = made_stack("dense", SMALL, 33, torch.bfloat16, page_size=8)
    assert_refused(lambda: bench.one_launch(x, stack), "pages", "8")
    wide = Shape(hidden=512, heads=9, kv_heads=1, head_size=64, wide=256)
    stack = made_stack("dense", wide, 33, torch.bfloat16)
    assert_refused(lambda: bench.one_launch(x, stack), "9 over 1", "mmha")
