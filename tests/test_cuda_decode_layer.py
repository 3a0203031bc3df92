"""Decoder layers for one token on a CPU: twin, chain of operators and torch's layer against the layer in float64; the
operator's checks and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.kernel_bench import decode_layer as bench
from tests.support_decode_layer import TINY, cached, made_stack, reference
from tests.support_gpu import assert_close, assert_refused
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import decode_layer
from trtllm_cli.ops.cuda.decode_layer import DecodeLayers

KINDS = ("dense", "int8", "int4 g128")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [1, 130])
@pytest.mark.parametrize("call", [bench.one_launch, bench.five_launches])
def test_operators_are_the_layer(kind: str, context: int, call: Any) -> None:
    stack = made_stack(kind, TINY, context, torch.bfloat16, device="cpu", layers=2, bias=True)
    x = torch.randn(1, TINY.hidden).bfloat16()
    wanted, written = reference(x, stack)
    found = call(x, stack)
    assert_close(found.double() - x, wanted - x, 1.5e-2)
    for pair, exact in zip(cached(stack), written):
        for one, other in zip(pair, exact):
            assert_close(one, other, 1.5e-2)


@pytest.mark.parametrize("shape", [TINY, replace(TINY, kv_heads=4, head_size=128)])
def test_the_twin_rounds_nothing_but_the_cache(shape: bench.Shape) -> None:
    stack = made_stack("dense", shape, 70, torch.float16, device="cpu", layers=2)
    x = torch.randn(1, shape.hidden).double()
    wanted, _ = reference(x, stack)
    assert_close(bench.twin(x, stack) - x, wanted - x, 1e-3)


def test_torchs_layer_beside_it_is_the_same() -> None:
    for kind in KINDS:
        stack = made_stack(kind, TINY, 130, torch.bfloat16, device="cpu", layers=2)
        x = torch.randn(1, TINY.hidden).bfloat16()
        wanted, _ = reference(x, stack)
        assert_close(bench.torch_steps(x, bench.torch_layers(stack, x.dtype)).double() - x, wanted - x, 1.5e-2)


def test_bytes_are_those_of_the_packed_weights() -> None:
    for kind in KINDS:
        (layer,) = made_stack(kind, TINY, 128, torch.bfloat16, device="cpu").layers
        held = sum(w.nbytes for w in layer.weights) + layer.k_cache.nbytes + layer.v_cache.nbytes
        assert bench.layer_bytes(kind, TINY, 128) == held


def test_the_shape_function_and_the_schema() -> None:
    stack = made_stack("int8", TINY, 5, torch.bfloat16, device="cpu")
    caught: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_layer, "decode_layers", lambda *given: caught.append(given))
        bench.one_launch(torch.randn(1, TINY.hidden).bfloat16(), stack)
    torch.library.opcheck(
        torch.ops.trtllm_cli.decode_layers.default,
        caught[0],
        test_utils=("test_schema", "test_faketensor"),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, TINY.hidden, dtype=torch.bfloat16)
        assert torch.ops.trtllm_cli.decode_layers(x, *caught[0][1:]).shape == x.shape


def test_refusals_name_what_is_wrong() -> None:
    stack = made_stack("int4 g128", TINY, 70, torch.bfloat16, device="cpu", layers=2)
    first, second = stack.layers
    x = torch.randn(1, TINY.hidden).bfloat16()

    def layers(**change: Any) -> Any:
        return lambda: DecodeLayers((first, replace(second, **change)))

    def step(**change: Any) -> Any:
        given = {"page_table": stack.page_table[0], "lengths": stack.lengths, "cos": stack.cos, "sin": stack.sin}
        row: Tensor = change.pop("x", x)
        return lambda: stack.ready.step(row, **{**given, **change})

    assert_refused(lambda: DecodeLayers(()), "no layers")
    assert_refused(layers(o=second.down), "o [256, 384] in layer 1", "[256, 256]")
    assert_refused(layers(up=replace(second.up, group=64)), "up of int4 in layer 1", "weight_only.linear")
    assert_refused(layers(up=replace(second.up, data=second.up.data[:1])), "up of layer 1", "uint8")
    assert_refused(layers(mlp_norm=second.mlp_norm.float()), "mlp_norm of layer 1 torch.float32")
    assert_refused(layers(v_cache=second.v_cache[:1]), "v_cache", "layer 1", "alike")
    assert_refused(layers(qkv_bias=torch.zeros(TINY.projected).bfloat16()), "qkv_bias in some layers")
    assert_refused(lambda: DecodeLayers([replace(first, k_cache=first.k_cache.char())]), "int8", "mmha")
    narrow = replace(first, k_cache=first.k_cache[:, :1], v_cache=first.v_cache[:, :1])
    assert_refused(lambda: DecodeLayers([replace(narrow, qkv=replace(first.qkv, n=100))]), "100 rows")
    assert_refused(step(x=x[0]), "(256,)", "one token")
    assert_refused(step(x=x.half()), "float16")
    assert_refused(step(page_table=stack.page_table), "page_table", "one sequence")
    assert_refused(step(lengths=stack.lengths.long()), "lengths torch.int64")
    assert_refused(step(cos=stack.cos[:, :3]), "cos", "32")
    assert_refused(step(sin=stack.sin[:5]), "sin")


def test_a_step_that_gave_up_is_an_error() -> None:
    stack = made_stack("dense", TINY, 5, torch.bfloat16, device="cpu")
    stack.ready.check()
    stack.ready.failed.fill_(1)
    with pytest.raises(UnsupportedError) as caught:
        stack.ready.check()
    assert caught.value.code == "KERNEL_LOST" and caught.value.hint
