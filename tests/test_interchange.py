"""Quantized checkpoints of others, imported: every integer and scale keeps its value, in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support_artifacts import convert_to, source_of, text_model
from tests.support_interchange import our_logits, stored, tokens
from tests.support_published import Published, Random, awq_tensors, gptq_tensors, pack_last, packed_tensors
from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme, WeightScheme
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.weights import dequantized
from trtllm_cli.ops.quantized import unpack_int4


def imported(published: Published, home: Path, quantization, beside=None, **options) -> Artifact:
    folder = published.write(home / "published", quantization, beside)
    made = convert_to(source_of(folder, home / "source").path, home / "out", **options)
    return open_artifact(made.path, "checkpoint", full=True)


def check_dense(made: Artifact, published: Published) -> None:
    """What the checkpoint stands for is, to float32 rounding, what the publisher's integers stand for."""
    store = TensorStore(made.path)
    record = made.checkpoint.quantization
    assert record is not None
    assert {layer.module for layer in record.layers} == set(published.dense)
    for layer in record.layers:
        assert layer.relative_error is None
        ours = dequantized(store, layer).double().numpy()
        theirs = published.dense[layer.module]
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=2e-7, atol=0)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("form", "symmetric", "group"),
    [("gptq", True, 32), ("gptq", False, 32), ("gptq_v2", False, 16), ("gptq_v2", True, -1), ("gptq_v2", False, -1)],
)
def test_gptq_keeps_every_integer_and_scale(form, symmetric, group, act_order, scale, tmp_path):
    published, random = Published(), Random(1)
    minus = 1 if form == "gptq" else 0
    integers = {}
    for module, (n, k) in published.linears().items():
        index = None
        if act_order and group != -1:
            index = random.rng.permutation(np.arange(k) // group)
        made = random.int4(n, k, group, symmetric, lowest_zero=minus, index=index)
        made["scales"] = torch.from_numpy(made["scales"]).to(scale).float().numpy()
        made["dense"] = (made["values"] - made["zeros"][:, made["index"]]) * made["scales"].astype(np.float64)[
            :, made["index"]
        ]
        tensors = gptq_tensors(made, minus)
        tensors["scales"] = tensors["scales"].to(scale)
        published.replace(module, tensors, made["dense"])
        integers[module] = made
    config = {**GPTQ, "checkpoint_format": form, "sym": symmetric, "group_size": group, "desc_act": act_order}
    made = imported(published, tmp_path, config)
    check_dense(made, published)
    tensors = stored(made)
    kept = torch.float16 if scale == torch.float16 else torch.float32
    for module, expected in integers.items():
        assert np.array_equal(unpack_int4(tensors[f"{module}.weight"]).numpy(), expected["values"])
        assert tensors[f"{module}.weight_scale"].dtype == kept
        assert np.array_equal(tensors[f"{module}.weight_scale"].float().numpy(), expected["scales"])
        if not symmetric:
            assert np.array_equal(tensors[f"{module}.weight_zero"].numpy(), expected["zeros"])
        if act_order and group != -1:
            assert np.array_equal(tensors[f"{module}.weight_group"].numpy(), expected["index"])
    record = made.checkpoint.quantization
    assert (record.method, record.provider) == ("gptq", "imported:gptq")
    assert record.layers[0].scheme == WeightScheme(
        type="int4",
        granularity="group",
        group_size=group,
        symmetric=symmetric,
        scale_dtype=str(kept).removeprefix("torch."),
        group_index=act_order and group != -1,
    )
    assert np.isfinite(our_logits(made, tokens(9, 96))).all()


def test_gptq_without_a_group_index_and_with_biases_of_zeros(tmp_path):
    published, random = Published(), Random(2)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, True)
        tensors = {**gptq_tensors(made, 1, with_index=False), "bias": torch.zeros(n, dtype=torch.float16)}
        published.replace(module, tensors, made["dense"])
    made = imported(published, tmp_path, GPTQ)
    check_dense(made, published)
    assert not any(name.endswith("bias") for name in TensorStore(made.path))


def test_gptq_of_some_modules_with_groups_of_their_own(tmp_path):
    published, random = Published(), Random(3)
    groups = {}
    for module, (n, k) in published.linears().items():
        if "layers.0.attn" in module:
            continue  # left unquantized by a rule
        groups[module] = 64 if "down" in module else 32
        made = random.int4(n, k, groups[module], True)
        published.replace(module, gptq_tensors(made, 1), made["dense"])
    rules = {r"-:model\.layers\.0\.self_attn": {}, r"+:.*down_proj$": {"group_size": 64}}
    made = imported(published, tmp_path, {**GPTQ, "dynamic": rules})
    check_dense(made, published)
    assert {layer.module: layer.scheme.group_size for layer in made.checkpoint.quantization.layers} == groups


def test_gptq_described_in_a_file_of_its_own(tmp_path):
    published, random = Published(), Random(4)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, True)
        published.replace(module, gptq_tensors(made, 1), made["dense"])
    settings = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    made = imported(published, tmp_path, None, {"quantize_config.json": settings})
    check_dense(made, published)


@pytest.mark.parametrize(("symmetric", "group"), [(False, 32), (False, -1), (True, 64)])
def test_awq_keeps_every_integer_and_scale(symmetric, group, tmp_path):
    published, random = Published(), Random(5)
    integers = {}
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, group, symmetric)
        published.replace(module, awq_tensors(made), made["dense"])
        integers[module] = made
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", "zero_point": not symmetric}
    made = imported(published, tmp_path, config)
    check_dense(made, published)
    tensors = stored(made)
    for module, expected in integers.items():
        assert np.array_equal(unpack_int4(tensors[f"{module}.weight"]).numpy(), expected["values"])
        assert np.array_equal(tensors[f"{module}.weight_scale"].numpy(), expected["scales"])
        assert tensors[f"{module}.weight_scale"].dtype == torch.float16
        if not symmetric:
            assert np.array_equal(tensors[f"{module}.weight_zero"].numpy(), expected["zeros"])
    assert made.checkpoint.quantization.provider == "imported:awq"


def compressed(weights: dict, inputs: dict | None = None, form: str = "pack-quantized", **more) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    base = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**base, "ignore": ["lm_head"], "quantization_status": "compressed", **more}


@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (False, 32), (True, -1), (False, -1)])
@pytest.mark.parametrize("stored_as", ["packed", "old zero points", "whole bytes"])
def test_compressed_tensors_int4_keeps_every_integer_and_scale(symmetric, group, stored_as, tmp_path):
    published, random = Published(), Random(6)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, group, symmetric)
        tensors = packed_tensors(made, symmetric)
        if stored_as != "packed" and not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(made["zeros"] - 8).to(torch.int8)
        if stored_as == "whole bytes":
            del tensors["weight_packed"], tensors["weight_shape"]
            tensors["weight"] = torch.from_numpy(made["values"] - 8).to(torch.int8)
        published.replace(module, tensors, made["dense"])
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **strategy}
    form = "naive-quantized" if stored_as == "whole bytes" else "pack-quantized"
    made = imported(published, tmp_path, compressed(weights, form=form))
    check_dense(made, published)
    assert made.checkpoint.quantization.layers[0].scheme.group_size == group


def test_compressed_tensors_with_act_order_groups(tmp_path):
    published, random = Published(), Random(7)
    for module, (n, k) in published.linears().items():
        index = random.rng.permutation(np.arange(k) // 32)
        made = random.int4(n, k, 32, True, index=index)
        tensors = {**packed_tensors(made, True), "weight_g_idx": torch.from_numpy(index.astype(np.int32))}
        published.replace(module, tensors, made["dense"])
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}
    made = imported(published, tmp_path, compressed(weights))
    check_dense(made, published)
    assert all(layer.scheme.group_index for layer in made.checkpoint.quantization.layers)


def eight_bit(rng: np.random.Generator, n: int, k: int, kind: str, per_tensor: bool, scale: torch.dtype):
    """(weight, scale, what they stand for in float64)."""
    weight = torch.from_numpy(rng.integers(-128, 128, (n, k)).astype(np.int8))
    if kind == "float":
        weight = torch.from_numpy(rng.normal(0, 100, (n, k)).clip(-448, 448)).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng.random((1,) if per_tensor else (n, 1)) / 500).to(scale)
    wide = scales.double().numpy().reshape(1, 1) if per_tensor else scales.double().numpy()
    return weight, scales, weight.float().double().numpy() * wide


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "form", "per_tensor", "inputs"),
    [
        ("int", "int-quantized", False, "token"),
        ("int", "int-quantized", True, "tensor"),
        ("int", "naive-quantized", False, None),
        ("float", "float-quantized", False, "token"),
        ("float", "float-quantized", True, "tensor"),
        ("float", "naive-quantized", True, None),
    ],
)
def test_compressed_tensors_of_eight_bits(kind, form, per_tensor, inputs, scale, tmp_path):
    published, rng = Published(), np.random.default_rng(8)
    expected = {}
    for module, (n, k) in published.linears().items():
        weight, scales, dense = eight_bit(rng, n, k, kind, per_tensor, scale)
        tensors = {"weight": weight, "weight_scale": scales}
        if inputs == "tensor":
            tensors["input_scale"] = torch.tensor([0.03]).to(scale)
        published.replace(module, tensors, dense)
        expected[module] = tensors
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor" if per_tensor else "channel"}
    activation = None
    if inputs is not None:
        activation = {"num_bits": 8, "type": kind, "strategy": inputs, "dynamic": inputs == "token", "symmetric": True}
    made = imported(published, tmp_path, compressed(weights, activation, form))
    check_dense(made, published)
    tensors = stored(made)
    name = "int8" if kind == "int" else "fp8"
    for module, given in expected.items():
        assert torch.equal(tensors[f"{module}.weight"].view(torch.uint8), given["weight"].view(torch.uint8))
        assert torch.equal(tensors[f"{module}.weight_scale"], given["weight_scale"].float().reshape(-1))
        if inputs == "tensor":
            assert torch.equal(tensors[f"{module}.input_scale"], given["input_scale"].float())
    layer = made.checkpoint.quantization.layers[0]
    assert layer.activation == (None if inputs is None else ActivationScheme(type=name, granularity=inputs))
    assert np.isfinite(our_logits(made, tokens(9, 96))).all()


def test_compressed_tensors_int8_packed_four_a_word(tmp_path):
    published, rng = Published(), np.random.default_rng(9)
    for module, (n, k) in published.linears().items():
        weight, scales, dense = eight_bit(rng, n, k, "int", False, torch.float16)
        raised = (weight.numpy().astype(np.int64) + 128).reshape(n, k // 4, 4)
        words = (raised << np.arange(0, 32, 8)).sum(-1)
        packed = torch.from_numpy(words.astype(np.uint32).view(np.int32))
        published.replace(module, {"weight_packed": packed, "weight_scale": scales}, dense)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    check_dense(imported(published, tmp_path, compressed(weights)), published)


def test_compressed_tensors_schemes_are_chosen_by_name_pattern_and_class(tmp_path):
    """Names and patterns win over classes, ignored modules stay floats, whatever order the groups stand in."""
    published, random = Published(), Random(10)
    kinds = {}
    for module, (n, k) in published.linears().items():
        if module == "layers.0.attn.o":
            continue
        group = 32 if "mlp" in module else 64 if module == "layers.1.attn.q" else -1
        made = random.int4(n, k, group, True)
        published.replace(module, packed_tensors(made, True), made["dense"])
        kinds[module] = group

    def weights(group: int) -> dict:
        strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        return {"weights": {"num_bits": 4, "type": "int", "symmetric": True, **strategy}}

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "everything": {"targets": ["Linear"], **weights(-1)},
            "mlp": {"targets": [r"re:.*\.mlp\..*"], **weights(32)},
            "one": {"targets": ["model.layers.1.self_attn.q_proj"], **weights(64)},
        },
        "ignore": ["lm_head", r"re:model\.layers\.0\.self_attn\.o_proj"],
    }
    made = imported(published, tmp_path, config)
    check_dense(made, published)
    assert {layer.module: layer.scheme.group_size for layer in made.checkpoint.quantization.layers} == kinds


@pytest.mark.parametrize(("kind", "strategy"), [("float", "tensor"), ("float", "attn_head"), ("int", "tensor")])
def test_a_quantized_cache_comes_along(kind, strategy, tmp_path):
    published, rng = Published(), np.random.default_rng(11)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    for module, (n, k) in published.linears().items():
        weight, scales, dense = eight_bit(rng, n, k, "int", False, torch.float32)
        published.replace(module, {"weight": weight, "weight_scale": scales}, dense)
    shape = (2, 1, 1) if strategy == "attn_head" else (1,)
    expected = {}
    for layer in range(2):
        for which in ("k_scale", "v_scale"):
            scale = torch.from_numpy(0.01 + rng.random(shape) / 50).to(torch.bfloat16)
            published.tensors[f"model.layers.{layer}.self_attn.{which}"] = scale
            expected[f"layers.{layer}.attn.{which}"] = scale.float().reshape(-1).expand(2)
    cache = {"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": False, "symmetric": True}
    made = imported(published, tmp_path, compressed(weights, form="naive-quantized", kv_cache_scheme=cache))
    tensors = stored(made)
    for name, scale in expected.items():
        assert torch.equal(tensors[name], scale)
    assert made.checkpoint.quantization.kv_cache == KvCacheScheme(
        type="fp8" if kind == "float" else "int8", granularity="head" if strategy == "attn_head" else "tensor"
    )
    assert np.isfinite(our_logits(made, tokens(9, 96))).all()


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_modelopt_fp8_keeps_weights_and_scales(where, algorithm, tmp_path):
    published, rng = Published(dtype=torch.bfloat16), np.random.default_rng(12)
    scalar = algorithm == "FP8"
    expected = {}
    for module, (n, k) in published.linears().items():
        weight, scales, dense = eight_bit(rng, n, k, "float", scalar, torch.float32)
        tensors = {"weight": weight, "weight_scale": scales.reshape(()) if scalar else scales.reshape(n)}
        if scalar:
            tensors["input_scale"] = torch.tensor(0.0123)
        published.replace(module, tensors, dense)
        expected[module] = weight
    for layer in range(2):
        published.tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = torch.tensor(0.25 + layer)
        published.tensors[f"model.layers.{layer}.self_attn.v_proj.v_scale"] = torch.tensor(0.5 + layer)
    producer = {"name": "modelopt", "version": "0.47.0"}
    if where == "config.json":
        cache = {"dynamic": False, "num_bits": 8, "type": "float"}
        given = {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_scheme": cache, "ignore": ["lm_head"]}
        made = imported(published, tmp_path, {**given, "producer": producer})
    else:
        given = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        made = imported(published, tmp_path, None, {where: {"producer": producer, "quantization": given}})
    check_dense(made, published)
    tensors = stored(made)
    for module, weight in expected.items():
        assert torch.equal(tensors[f"{module}.weight"].view(torch.uint8), weight.view(torch.uint8))
        if scalar:
            assert torch.equal(tensors[f"{module}.input_scale"], torch.tensor([0.0123]))
    assert torch.equal(tensors["layers.1.attn.v_scale"], torch.tensor([1.5, 1.5]))
    record = made.checkpoint.quantization
    assert (record.method, record.provider) == ("fp8", "imported:modelopt")
    assert record.layers[0].activation == ActivationScheme(type="fp8", granularity="tensor" if scalar else "token")


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
    ],
)
def test_what_the_package_itself_wrote_is_what_it_dequantizes_to(weights, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the package that wrote the format")
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = text_model(num_hidden_layers=1)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    generator = torch.Generator().manual_seed(3)
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    for module in modules.values():
        top = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1)
        module.weight_scale.data.copy_((0.3 + 0.1 * torch.rand(module.weight_scale.shape, generator=generator)) / top)
        if not weights["symmetric"]:
            module.weight_zero_point.data.random_(-8, 8, generator=generator)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "published")
    compressor.update_config(str(tmp_path / "published"))
    made = convert_to(source_of(tmp_path / "published", tmp_path / "source").path, tmp_path / "out")
    store, record = TensorStore(made.path), made.checkpoint.quantization
    assert len(record.layers) == len(modules) == 7
    names = {f"layers.0.{ours}": theirs for ours, theirs in zip(_OURS, _THEIRS)}
    for layer in record.layers:
        module = modules[f"model.layers.0.{names[layer.module]}"]
        format_class = BaseCompressor.get_value_from_registry(module.quantization_scheme.format.value)
        state = {name: tensor.data for name, tensor in module.named_parameters()}
        expected = format_class.decompress(state, module.quantization_scheme)["weight"]
        assert torch.equal(dequantized(store, layer), expected.float())


_OURS = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
_THEIRS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_words_are_packed_as_the_formats_describe_them():
    """The description used above against the layouts' own example: 0..7 in a word, and AWQ's even columns first."""
    values = np.arange(8)[None]
    assert pack_last(values).item() == 0x76543210
    assert pack_last(values, [0, 2, 4, 6, 1, 3, 5, 7]).item() == 0x75316420
