"""The mathematics of the TensorRT network: run by the reference evaluator, compared with Hugging Face in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_models import CASES
from tests.support_tensorrt import FAMILIES, Network, hugging_face, random_weights
from trtllm_cli.build.tensorrt.network import cache_names, updated

TOLERANCE = 1e-4
CONTEXT = 32


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, count)


def reference(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_cached_steps_match_hugging_face(case):
    """A ragged batch: prompts of 13 and 9 tokens, padded, then three single tokens each from the caches."""
    model, spec, weights = hugging_face(case)
    texts = [tokens(16, 1), tokens(12, 2)]
    lengths = [13, 9]
    expected = [reference(model, text) for text in texts]
    network = Network(spec, weights, "float32", CONTEXT, batch=2)
    prompt = np.zeros((2, 13), np.int32)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        prompt[row, :length] = text[:length]
    logits = network.step(prompt, [0, 0], [length - 1 for length in lengths])
    for row, length in enumerate(lengths):
        assert np.abs(expected[row][length - 1]).max() > 0.1
        assert np.abs(logits[row] - expected[row][length - 1]).max() < TOLERANCE
    for step in range(3):
        starts = [length + step for length in lengths]
        logits = network.step([[text[start]] for text, start in zip(texts, starts, strict=True)], starts, [0, 0])
        for row, start in enumerate(starts):
            assert np.abs(logits[row] - expected[row][start]).max() < TOLERANCE


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    model, spec, weights = hugging_face("mistral-window")
    text = tokens(20, 3)
    network = Network(spec, weights, "float32", CONTEXT, batch=1)
    network.step(text[None, :8], [0], [7])
    logits = network.step(text[None, 8:], [8], [11])
    assert np.abs(logits[0] - reference(model, text)[-1]).max() < TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_networks_agree_with_float32(family, dtype, tolerance):
    spec = FAMILIES[family]
    text = np.arange(24)[None]
    narrow, wide = (Network(spec, random_weights(spec), kind, CONTEXT, 1) for kind in (dtype, "float32"))
    a, b = narrow.step(text, [0], [23]), wide.step(text, [0], [23])
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < tolerance
    assert narrow.layers.network.get_input(4).dtype == narrow.layers.dtype(dtype)


def test_inputs_outputs_and_caches_in_place():
    spec = FAMILIES["llama"]
    made = Network(spec, random_weights(spec), "float16", CONTEXT, 1)
    network, api = made.layers.network, made.layers.trt.api
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    caches = [name for layer in range(spec.num_layers) for name in cache_names(layer)]
    assert list(inputs) == ["token_ids", "starts", "rows", "seen", *caches]
    assert tuple(inputs["token_ids"].shape) == (-1, -1)
    assert all(tuple(inputs[name].shape) == (-1, 2, CONTEXT, 32) for name in caches)
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    assert outputs == ["logits", *map(updated, caches)]
    written = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if api.ILayer.type.__get__(layer) == api.LayerType.KV_CACHE_UPDATE:
            written[layer.get_input(0).name] = layer.get_output(0).name
    assert written == {name: updated(name) for name in caches}


def test_layers_carry_canonical_module_names():
    spec = FAMILIES["qwen3"]
    network = Network(spec, random_weights(spec), "float16", CONTEXT, 1).layers.network
    names = [network.get_layer(index).name for index in range(network.num_layers)]
    assert len(set(names)) == len(names)
    assert set(spec.linears()) <= set(names)
    assert {"layers.0.attn.q_norm", "layers.0.attn.q_norm/rotary", "layers.1.mlp.gate/silu", "norm"} <= set(names)
    assert not any("Unnamed" in name for name in names)


def test_the_evaluator_notices_a_wrong_mask():
    """The oracle can fail: with the window forgotten, logits differ."""
    model, spec, weights = hugging_face("mistral-window")
    text = tokens(20, 3)
    forgotten = spec.model_copy(update={"windows": (None,) * spec.num_layers})
    logits = Network(forgotten, weights, "float32", CONTEXT, 1).step(text[None], [0], [19])
    assert np.abs(logits[0] - reference(model, text)[-1]).max() > 10 * TOLERANCE
