"""A decoder layer in five operators on a CPU: their twins and torch's layer against the layer in float64."""

from __future__ import annotations

import pytest
import torch

from scripts.kernel_bench import decode_layer
from tests.support_decode_layer import SMALL, cached, made_layer, reference
from tests.support_gpu import assert_close

KINDS = ("dense", "int8", "int4 g128")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [1, 64, 130])
def test_the_chain_is_the_layer(kind: str, context: int) -> None:
    layer = made_layer(kind, SMALL, context, torch.bfloat16, device="cpu")
    x = torch.randn(1, SMALL.hidden).bfloat16()
    wanted, k, v = reference(x, layer)
    assert_close(decode_layer.twin(x.double(), layer) - x, wanted - x, 1e-2)  # the cache rounds, nothing else does
    found = decode_layer.five_launches(x, layer)
    assert_close(found.double() - x, wanted - x, 1.5e-2)
    for one, exact in zip(cached(layer), (k, v)):
        assert_close(one, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_layer_beside_it_is_the_same(kind: str) -> None:
    layer = made_layer(kind, SMALL, 130, torch.bfloat16, device="cpu")
    x = torch.randn(1, SMALL.hidden).bfloat16()
    wanted, _, _ = reference(x, layer)
    peer = decode_layer.torch_layer(layer, torch.bfloat16)
    assert_close(decode_layer.torch_step(x, peer).double() - x, wanted - x, 1.5e-2)


def test_bytes_are_those_of_the_packed_weights() -> None:
    for kind in KINDS:
        layer = made_layer(kind, SMALL, 128, torch.bfloat16, device="cpu")
        weights = (layer.qkv, layer.o, layer.up, layer.down)
        held = sum(w.nbytes for w in weights) + layer.k_cache.nbytes + layer.v_cache.nbytes
        assert decode_layer._layer_bytes(kind, SMALL, 128) == held
