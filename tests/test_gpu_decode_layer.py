"""A decoder layer for one token as a chain of five launches on a GPU, against the layer in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scripts.kernel_bench import decode_layer
from scripts.kernel_bench.decode_layer import LLAMA_8B, Layer
from tests.support_decode_layer import SMALL, cached, made_layer, reference
from tests.support_gpu import assert_close, assert_repeats, assert_replays, needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]
KINDS = ("dense", "int8", "int4 g128")
#: of what a layer adds to x: five roundings of intermediates to the type, the last of the sum with x
TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def token(shape: decode_layer.Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, shape.hidden, generator=made, device="cuda").to(dtype)


def agrees(x: Tensor, layer: Layer) -> Tensor:
    """The chain's output, checked with the key and value that it wrote."""
    wanted, k, v = reference(x, layer)
    found = decode_layer.five_launches(x, layer)
    assert_close(found.double() - x, wanted - x, TOLERANCES[x.dtype])
    for one, exact in zip(cached(layer), (k, v)):
        assert_close(one, exact)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_small_layers_agree(kind: str, dtype: torch.dtype) -> None:
    for context in (1, 2, 64, 65, 700):
        agrees(token(SMALL, dtype), made_layer(kind, SMALL, context, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", decode_layer.CONTEXTS)
def test_the_layer_of_an_8b_model_agrees(kind: str, context: int) -> None:
    agrees(token(LLAMA_8B, torch.bfloat16), made_layer(kind, LLAMA_8B, context, torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_a_row_with_programmatic_launch_give_the_bits_of_those_without(kind: str) -> None:
    layers = [made_layer(kind, SMALL, 300, torch.bfloat16, i) for i in range(4)]

    def decode(x: Tensor, pdl: bool = True) -> Tensor:
        for layer in layers:
            x = decode_layer.five_launches(x, layer, pdl)
        return x

    x = token(SMALL, torch.bfloat16)
    wanted = decode(x, False)
    assert torch.equal(assert_repeats(lambda: decode(x), 5), wanted)
    assert_replays(decode, [x], [token(SMALL, torch.bfloat16, 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_after_another_attend_to_those_before(kind: str) -> None:
    """Each step sees what the steps before wrote, over the end of a page."""
    layer = made_layer(kind, SMALL, 70, torch.bfloat16)
    for step, length in enumerate(range(61, 71)):
        layer.lengths.fill_(length)
        agrees(token(SMALL, torch.bfloat16, step), layer)
