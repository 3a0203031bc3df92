"""Weights as inputs of a plan, and attention in fp8: what is computed, what it compiles to, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from safetensors.torch import load_file
from typer.testing import CliRunner

from scripts.llama_shapes import SHAPES, make_checkpoint
from tests.support_artifacts import Said, raises
from tests.support_tensorrt import FAMILIES, Network, hugging_face, random_weights, write_checkpoint
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensorrt import kernels_by_module, tensorrt_tactics
from trtllm_cli.build.tensorrt.build import LAYERS, PLAN, WEIGHTS
from trtllm_cli.build.tensorrt.evaluator import Evaluator
from trtllm_cli.build.tensorrt.log import PlanFacts
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import cache_names, new_definition
from trtllm_cli.build.tensorrt.ops import FP8_SOFTMAX_SCALE, Choices, TrtOps
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
from trtllm_cli.cli.main import app
from trtllm_cli.models.decoder import attention_spec
from trtllm_cli.ops.api import KvCache

CONTEXT = 32


def build(checkpoint, output, report=None, **given):
    config = configure(TensorRTOptions, [("command line", {"concurrency": 2, **given})], "build --backend tensorrt")
    return build_tensorrt_engine(checkpoint, output, config, report=report)


# ---- weights as inputs -----------------------------------------------------------------------------------------------


def with_inputs(spec, weights, dtype="float32") -> tuple[Network, dict[str, torch.Tensor]]:
    """A network whose weights are inputs, and what to give them."""
    network = Network(spec, weights, dtype, CONTEXT, 1, choices=Choices(weights_as_inputs=True))
    return network, {name: torch.from_numpy(np.array(weights(name).bits)) for name in spec.tensor_shapes()}


@pytest.mark.parametrize("case", ["llama-mha-bias", "llama-mqa-tied", "qwen2-window", "qwen3-gqa"])
def test_a_network_computes_with_the_weights_it_is_given(case):
    model, spec, weights = hugging_face(case)
    network, given = with_inputs(spec, weights)
    text = np.random.default_rng(0).integers(0, 97, (1, 12))
    with torch.no_grad():
        expected = model(torch.from_numpy(text)).logits[0, -1].numpy()
    assert np.abs(network.step(text, [0], [11], given)[0] - expected).max() < 1e-4
    # the numbers are not in the network: other weights give other logits
    changed = {**given, "layers.1.mlp.up.weight": given["layers.1.mlp.up.weight"] * 2}
    assert np.abs(network.step(text, [0], [11], changed)[0] - expected).max() > 1e-3


def test_every_weight_is_an_input_of_its_name_and_shape_and_no_constant():
    spec = FAMILIES["qwen3"]
    network, given = with_inputs(spec, random_weights(spec), "float16")
    made = network.layers.network
    inputs = {made.get_input(i).name: tuple(made.get_input(i).shape) for i in range(made.num_inputs)}
    caches = {name for layer in range(spec.num_layers) for name in cache_names(layer)}
    assert set(inputs) - caches - {"token_ids", "starts", "rows", "seen"} == set(given)
    assert {name: inputs[name] for name in given} == spec.tensor_shapes()
    assert max(bits.size for bits in network.layers.constants.values()) <= CONTEXT * spec.head_dim


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_with_a_small_plan_and_a_file_of_weights(tmp_path, family):
    spec = FAMILIES[family].model_copy(update={"vocab_size": 65536})
    checkpoint = write_checkpoint(tmp_path / "in", spec)
    whole = build(checkpoint, tmp_path / "whole", dtype="bfloat16")
    small = build(checkpoint, tmp_path / "small", dtype="bfloat16", weights_as_inputs=True)
    weights = load_file(small.file(WEIGHTS))
    tactics = tensorrt_tactics(small.engine)
    assert tactics.weight_file == WEIGHTS
    assert list(tactics.weight_inputs) == list(spec.tensor_shapes())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()} == {
        name: (torch.bfloat16, shape) for name, shape in spec.tensor_shapes().items()
    }
    source = random_weights(spec)
    for name in spec.tensor_shapes():  # made in this order
        assert torch.equal(weights[name], torch.from_numpy(source(name).bits).bfloat16())
    size = sum(tensor.nbytes for tensor in weights.values())
    # what is left is kernels, most of a plan as small as this one
    assert small.file(PLAN).stat().st_size < whole.file(PLAN).stat().st_size - 0.9 * size
    assert size <= small.engine.limits.weight_bytes < size + (1 << 16)
    io = {it.name: it for it in PlanFacts.model_validate_json(small.file(LAYERS).read_bytes()).io}
    assert all((io[name].dtype, io[name].dimensions) == ("BFloat16", spec.tensor_shapes()[name]) for name in weights)
    for profile in tactics.profiles:
        assert profile.products == {"bfloat16": 15}
        assert profile.fallbacks == {}
        assert sum(profile.attention.values()) == 2
    assert tensorrt_tactics(whole.engine).weight_file is None
    assert WEIGHTS not in {entry.path for entry in whole.manifest.files}


def test_a_missing_weight_is_named_although_the_plan_does_not_hold_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"], leave_out="layers.1.mlp.up.weight")
    with raises("TENSOR_MISSING", 3, "layers.1.mlp.up.weight"):
        build(checkpoint, tmp_path / "out", weights_as_inputs=True)
    assert not (tmp_path / "out").exists()


def test_quantized_weights_are_no_inputs(tmp_path):
    spec = SHAPES["smollm2-135m"].model_copy(update={"num_layers": 1, "windows": (None,), "vocab_size": 256})
    checkpoint = make_checkpoint(tmp_path / "in", spec, "int4")
    with raises("TENSORRT_INPUTS_QUANTIZED", 4, "only as constants") as caught:
        build(checkpoint, tmp_path / "out", weights_as_inputs=True)
    assert "leave out --weights-as-inputs" in caught.value.hint
    assert not (tmp_path / "out").exists()


# ---- attention in fp8 ------------------------------------------------------------------------------------------------


def test_fp8_attention_is_near_and_not_the_same():
    _, spec, weights = hugging_face("llama-gqa")
    text = np.random.default_rng(0).integers(0, 97, (1, 14))
    exact = Network(spec, weights, "float32", CONTEXT, 1)
    narrow = Network(spec, weights, "float32", CONTEXT, 1, choices=Choices(fp8_attention=True))
    a, b = (network.step(text[:, :12], [0], [11]) for network in (narrow, exact))
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1
    # the caches keep what was computed, not what attention rounds it to
    assert torch.equal(narrow.caches["layers.0.k_cache"], exact.caches["layers.0.k_cache"])
    for step in (12, 13):
        a, b = (network.step(text[:, step : step + 1], [step], [0]) for network in (narrow, exact))
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


def test_fp8_attention_is_what_its_definition_says():
    """One head of one layer, beside the formula written out in torch."""
    spec = FAMILIES["llama"]
    made = new_definition(load()).layers
    api = made.trt.api
    ops = TrtOps(made, spec, random_weights(spec), "float32", CONTEXT, choices=Choices(fp8_attention=True))
    q = made.input("q", api.float32, (1, 4, 3, 32))
    k, v = (made.input(f"layers.0.{name}_cache", api.float32, (1, 2, CONTEXT, 32)) for name in "kv")
    positions = made.input("positions", api.int32, (1, 3))
    made.output(ops.attend(q, KvCache(k, v), positions, attention_spec(spec, 0)), "out")
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) * 3 for shape in ((1, 4, 3, 32), *[(1, 2, CONTEXT, 32)] * 2)]
    given = dict(zip(("q", "layers.0.k_cache", "layers.0.v_cache"), values, strict=True))
    at = torch.tensor([[4, 5, 6]], dtype=torch.int32)
    found = Evaluator(made).run({**given, "positions": at})["out"]

    def fp8(x):
        return x.to(torch.float8_e4m3fn).float()

    keys, vals = (fp8(x).repeat_interleave(2, dim=1) for x in values[1:])
    scores = fp8(values[0] * 32**-0.5) @ keys.mT
    scores = scores.masked_fill(torch.arange(CONTEXT) > at[0][:, None], float("-inf"))
    shares = fp8(scores.softmax(-1) / FP8_SOFTMAX_SCALE) * FP8_SOFTMAX_SCALE
    assert torch.allclose(found, shares @ vals, atol=1e-5)
    assert not torch.allclose(found, scores.softmax(-1) @ vals, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_attention_is_fused_in_every_profile(tmp_path, family, dtype):
    said = Said()
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES[family])
    engine = build(checkpoint, tmp_path / "out", said, dtype=dtype, fp8_attention=True)
    context, *generation = tensorrt_tactics(engine.engine).profiles
    assert context.attention == {"_gemm_mha_v2 fp8": 2}
    assert [profile.attention for profile in generation] == [{"_gemv_mha_v1 fp8": 2}] * 2
    assert all(profile.fallbacks == {} for profile in (context, *generation))
    assert engine.manifest.config["target"].value == ["sm89", "sm120"]
    assert tensorrt_tactics(engine.engine).fp8_attention
    assert any("attention 2/2 fused (_gemm_mha_v2 fp8)" in line for line in said.lines)
    assert kernels_by_module(open_artifact(tmp_path / "out").engine)["layers.1.attn"] == ("fused, fp8",) * 3


@pytest.mark.parametrize(
    ("given", "code", "needle", "hint"),
    [
        ({"dtype": "float32"}, "TENSORRT_FP8_ATTENTION", "no fused attention", "--dtype bfloat16"),
        ({"target": "sm80"}, "TARGET_LACKS_DTYPE", "target sm80 has no fp8 arithmetic", "--target sm89"),
    ],
)
def test_fp8_attention_is_refused_where_it_cannot_be(tmp_path, given, code, needle, hint):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"])
    with raises(code, 4, needle) as caught:
        build(checkpoint, tmp_path / "out", fp8_attention=True, **given)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_every_module_in_every_profile(tmp_path):
    spec = SHAPES["smollm2-135m"].model_copy(update={"num_layers": 1, "windows": (None,), "vocab_size": 512})
    checkpoint = make_checkpoint(tmp_path / "in", spec, "int8")
    build(checkpoint, tmp_path / "out", generation_batches="1,2", context=256)
    lines = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--layers"]).stdout.splitlines()
    assert any(line.startswith("generation-1: batch 1, tokens 1, ") and "fell back" in line for line in lines)
    columns = ["module", "context", "generation-1", "generation-2"]
    at = next(i for i, line in enumerate(lines) if line.split() == columns)
    table = {line.split()[0]: line for line in lines[at + 1 :]}
    assert list(table) == [
        *(f"layers.0.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn", "attn.o")),
        *(f"layers.0.mlp.{name}" for name in ("gate", "up", "down")),
        "embed",
    ]
    assert table["layers.0.attn"].split()[1:] == ["fused"] * 3
    assert "bfloat16 instead of int8 weights" in table["layers.0.mlp.up"]
    assert table["embed"].split()[1:] == ["bfloat16"] * 3
