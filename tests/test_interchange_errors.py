"""Quantized checkpoints that cannot be imported: the thing at fault is named, and nothing is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_artifacts import convert_to, raises, source_of
from tests.support_interchange import small_spec
from tests.support_published import Published, Random, awq_tensors, gptq_tensors, packed_tensors

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LINEAR = "model.layers.1.self_attn.k_proj"


def compressed(weights=INT4, inputs=None, form="pack-quantized", more=None, group=None) -> dict:
    config_group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **(group or {})}
    base = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": config_group}}
    return {**base, "ignore": ["lm_head"], **(more or {})}


def gptq_folder(minus: int = 1, symmetric: bool = True) -> Published:
    published, random = Published(), Random(1)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, symmetric, lowest_zero=1)
        published.replace(module, gptq_tensors(made, minus), made["dense"])
    return published


def awq_folder() -> Published:
    published, random = Published(), Random(2)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, False)
        published.replace(module, awq_tensors(made), made["dense"])
    return published


def packed_folder() -> Published:
    published, random = Published(), Random(3)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, True)
        published.replace(module, packed_tensors(made, True), made["dense"])
    return published


def int8_folder(**more: torch.Tensor) -> Published:
    published, rng = Published(), np.random.default_rng(4)
    for module, (n, k) in published.linears().items():
        weight = torch.from_numpy(rng.integers(-128, 128, (n, k)).astype(np.int8))
        copies = {name: tensor.clone() for name, tensor in more.items()}
        published.replace(module, {"weight": weight, "weight_scale": torch.full((n, 1), 0.01), **copies}, np.ones(1))
    return published


REFUSED = {
    # layouts and widths without a place in a checkpoint of this tool
    "another method": ({"quant_method": "bitsandbytes"}, ["bitsandbytes", "gptq, awq"]),
    "gptq 8 bits": ({**GPTQ, "bits": 8}, ["GPTQ with 8 bits"]),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, ["GPTQ with 3 bits"]),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
    "gptq marlin, older": ({**GPTQ, "is_marlin_format": True}, ["'marlin'"]),
    "gptq bitblas": ({**GPTQ, "checkpoint_format": "bitblas"}, ["'bitblas'"]),
    "gptq in bytes": ({**GPTQ, "pack_dtype": "int8"}, ["'int8'"]),
    "gptq rule of 8 bits": ({**GPTQ, "dynamic": {"+:.*mlp": {"bits": 8}}}, ["dynamic +:.*mlp", "8 bits"]),
    "awq gemv": ({**AWQ, "version": "gemv"}, ["'gemv'", "'gemm'"]),
    "awq marlin": ({**AWQ, "version": "marlin"}, ["'marlin'"]),
    "awq 8 bits": ({**AWQ, "bits": 8}, ["AWQ with 8 bits"]),
    "int8 groups": (compressed({**INT8, "strategy": "group", "group_size": 32}), ["int8", "one scale per group"]),
    "int8 zero points": (compressed({**INT8, "symmetric": False}), ["int8", "zero points"]),
    "int3": (compressed({**INT4, "num_bits": 3}), ["3-bit int"]),
    "fp4": (compressed({**INT4, "type": "float"}, form="nvfp4-pack-quantized"), ["nvfp4-pack-quantized"]),
    "block fp8": (
        compressed({**FP8, "strategy": "block", "block_structure": [128, 128]}, form="float-quantized"),
        ["fp8", "one scale per block"],
    ),
    "asymmetric inputs": (compressed(INT8, {**TOKEN, "symmetric": False}, "int-quantized"), ["asymmetrically"]),
    "int8 inputs of int4": (compressed(INT4, TOKEN), ["8-bit int inputs of int4"]),
    "fp8 inputs of int8": (compressed(INT8, {**TOKEN, "type": "float"}, "int-quantized"), ["float inputs of int8"]),
    "tensor inputs at run time": (
        compressed(INT8, {**TOKEN, "strategy": "tensor"}, "int-quantized"),
        ["per tensor at run time"],
    ),
    "outputs": (compressed(group={"output_activations": TOKEN}), ["output_activations"]),
    "marlin-24": (compressed(form="marlin-24"), ["marlin-24"]),
    "sparse": (compressed(more={"sparsity_config": {"format": "sparse-bitmask"}}), ["sparse-bitmask"]),
    "transforms": (compressed(more={"transform_config": {"config_groups": {"u": {}}}}), ["transform_config"]),
    "not compressed": (compressed(more={"quantization_status": "frozen"}), ["frozen"]),
    "cache of 4 bits": (compressed(more={"kv_cache_scheme": {"num_bits": 4, "type": "float"}}), ["4-bit float"]),
    "cache at run time": (
        compressed(more={"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}),
        ["kv_cache_scheme", "run time"],
    ),
    "embedding of int4": (
        compressed(group={"targets": ["Linear", "Embedding"]}),
        ["model.embed_tokens", "embedding of int4"],
    ),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["NVFP4"]),
    "modelopt awq": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, ["W4A16_AWQ"]),
    "modelopt nvfp4 cache": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"},
        ["NVFP4 cache"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_here_is_refused_by_name(case, tmp_path):
    config, needles = REFUSED[case]
    source = source_of(Published().write(tmp_path / "published", config), tmp_path / "source").path
    with raises("QUANTIZATION_UNSUPPORTED", 4, *needles):
        convert_to(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"published", "source"}


INVALID = {
    "bits in words": ({**GPTQ, "bits": "four"}, ["bits", "'four'"]),
    "sym in words": ({**GPTQ, "sym": "yes"}, ["sym", "'yes'"]),
    "a broken rule": ({**GPTQ, "dynamic": {"+:(": {}}}, ["dynamic pattern"]),
    "a rule that is no object": ({**GPTQ, "dynamic": {"+:a": 8}}, ["dynamic +:a"]),
    "groups that are no object": ({"quant_method": "compressed-tensors", "config_groups": []}, ["config_groups"]),
    "targets that are no list": (compressed(group={"targets": "Linear"}), ["targets"]),
    "a broken pattern": (compressed(more={"ignore": ["re:("]}), ["'re:('"]),
    "a group of nothing": (compressed({**INT4, "group_size": 0}), ["group_size"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_config_that_makes_no_sense_names_its_key(case, tmp_path):
    config, needles = INVALID[case]
    source = source_of(Published().write(tmp_path / "published", config), tmp_path / "source").path
    with raises("QUANTIZATION_CONFIG_INVALID", 3, *needles):
        convert_to(source, tmp_path / "out")


def test_a_config_without_quantized_tensors_is_refused(tmp_path):
    source = source_of(Published().write(tmp_path / "published", GPTQ), tmp_path / "source").path
    with raises("QUANTIZATION_EMPTY", 3, "gptq"):
        convert_to(source, tmp_path / "out")


def poke(published: Published, suffix: str, change, module: str = LINEAR) -> Published:
    name = f"{module}.{suffix}"
    published.tensors[name] = change(published.tensors[name].clone())
    return published


def without(published: Published, suffix: str) -> Published:
    del published.tensors[f"{LINEAR}.{suffix}"]
    return published


def plus(published: Published, suffix: str, tensor: torch.Tensor) -> Published:
    published.tensors[f"{LINEAR}.{suffix}"] = tensor
    return published


def put(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.reshape(-1)[-1] = value
        return tensor

    return change


FIFTEEN = -1  # eight values of 15 in a word
INT8_CONFIG = compressed(INT8, form="int-quantized")
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
STATIC_CONFIG = compressed(INT8, STATIC, "int-quantized")
CACHED = compressed(INT8, form="int-quantized", more={"kv_cache_scheme": {"num_bits": 8, "type": "float"}})

WRONG = {
    # name: (published, config, code, needles)
    "gptq without scales": (
        lambda: without(gptq_folder(), "scales"),
        GPTQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.scales is missing"],
    ),
    "gptq transposed": (
        lambda: poke(gptq_folder(), "qweight", lambda t: t.T.contiguous()),
        GPTQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.qweight is [32, 8], expected [8, 32]"],
    ),
    "gptq of another group size": (
        gptq_folder,
        {**GPTQ, "group_size": 64},
        "TENSORS_WRONG",
        ["qzeros is [2, 8], expected [1, 8]"],
    ),
    "gptq of another type": (
        lambda: poke(gptq_folder(), "qweight", lambda t: t.long()),
        GPTQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.qweight has type I64, expected I32"],
    ),
    "gptq with an unknown tensor": (
        lambda: plus(gptq_folder(), "perm", torch.zeros(64)),
        GPTQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.perm is not part of a llama"],
    ),
    "gptq with a bias the model has not": (
        lambda: plus(gptq_folder(), "bias", torch.ones(32)),
        GPTQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.bias is not zero"],
    ),
    "gptq group out of range": (
        lambda: poke(gptq_folder(), "g_idx", put(2)),
        GPTQ,
        "TENSOR_RANGE",
        [f"{LINEAR}.g_idx", "group 2", "there are 2"],
    ),
    "gptq group below zero": (
        lambda: poke(gptq_folder(), "g_idx", put(-1)),
        GPTQ,
        "TENSOR_RANGE",
        [f"{LINEAR}.g_idx", "group -1"],
    ),
    "gptq zero point of 16": (
        lambda: poke(gptq_folder(symmetric=False), "qzeros", put(FIFTEEN)),
        {**GPTQ, "sym": False},
        "TENSOR_RANGE",
        [f"{LINEAR}.qzeros", "16"],
    ),
    "gptq symmetric with zero points": (
        lambda: poke(gptq_folder(), "qzeros", put(0)),
        GPTQ,
        "TENSOR_RANGE",
        [f"{LINEAR}.qzeros", "other than 8"],
    ),
    "gptq_v2 said to be gptq": (
        lambda: gptq_folder(minus=0),
        GPTQ,
        "TENSOR_RANGE",
        ["qzeros", "other than 8"],
    ),
    "gptq scale of infinity": (
        lambda: poke(gptq_folder(), "scales", put(float("inf"))),
        GPTQ,
        "TENSOR_NOT_FINITE",
        [f"{LINEAR}.scales"],
    ),
    "awq without zero points": (
        lambda: without(awq_folder(), "qzeros"),
        AWQ,
        "TENSORS_WRONG",
        [f"{LINEAR}.qzeros is missing"],
    ),
    "awq symmetric with zero points": (
        awq_folder,
        {**AWQ, "zero_point": False},
        "TENSOR_RANGE",
        ["qzeros", "other than 8"],
    ),
    "awq read as gptq": (awq_folder, GPTQ, "TENSORS_WRONG", ["qweight is [64, 8], expected [8, 64]"]),
    "compressed without scales": (
        lambda: without(packed_folder(), "weight_scale"),
        compressed(),
        "TENSORS_WRONG",
        [f"{LINEAR}.weight_scale is missing"],
    ),
    "compressed of another shape": (
        lambda: poke(packed_folder(), "weight_shape", put(65)),
        compressed(),
        "TENSOR_RANGE",
        [f"{LINEAR}.weight_shape", "[32, 65]", "[32, 64]"],
    ),
    "compressed without groups of act-order": (
        packed_folder,
        compressed({**INT4, "actorder": "group"}),
        "TENSORS_WRONG",
        ["weight_g_idx is missing"],
    ),
    "compressed symmetric with zero points": (
        lambda: plus(int8_folder(), "weight_zero_point", torch.ones(32, 1, dtype=torch.int8)),
        INT8_CONFIG,
        "TENSORS_WRONG",
        [f"{LINEAR}.weight_zero_point is not zero"],
    ),
    "compressed beyond four bits": (
        lambda: int8_folder(),
        compressed({**INT4, "strategy": "channel", "group_size": None}, form="naive-quantized"),
        "TENSOR_RANGE",
        ["model.layers.0.self_attn.q_proj.weight", "beyond four bits"],
    ),
    "compressed floats said to be integers": (
        lambda: poke(int8_folder(), "weight", lambda t: t.float()),
        INT8_CONFIG,
        "TENSORS_WRONG",
        [f"{LINEAR}.weight has type F32, expected I8"],
    ),
    "compressed without input scales": (
        int8_folder,
        STATIC_CONFIG,
        "TENSORS_WRONG",
        ["input_scale is missing"],
    ),
    "compressed input scale of zero": (
        lambda: int8_folder(input_scale=torch.zeros(1)),
        STATIC_CONFIG,
        "TENSOR_RANGE",
        ["input_scale", "above zero"],
    ),
    "cache without scales": (int8_folder, CACHED, "TENSORS_WRONG", ["model.layers.0.self_attn.k_scale is missing"]),
    "cache scale not a number": (
        lambda: cached(float("nan")),
        CACHED,
        "TENSOR_NOT_FINITE",
        ["model.layers.0.self_attn.k_scale"],
    ),
    "cache scale below zero": (lambda: cached(-1.0), CACHED, "TENSOR_RANGE", ["self_attn.k_scale", "-1"]),
}


def cached(value: float) -> Published:
    published = int8_folder()
    for layer in range(2):
        for which in ("k_scale", "v_scale"):
            published.tensors[f"model.layers.{layer}.self_attn.{which}"] = torch.tensor([value])
    return published


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_named(case, tmp_path):
    make, config, code, needles = WRONG[case]
    source = source_of(make().write(tmp_path / "published", config), tmp_path / "source").path
    with raises(code, 3, *needles):
        convert_to(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"published", "source"}


def test_an_fp8_weight_that_is_not_a_number_is_named(tmp_path):
    published = Published()
    for module, (n, k) in published.linears().items():
        weight = torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
        published.replace(module, {"weight": weight, "weight_scale": torch.full((n, 1), 0.01)}, np.ones(1))
    published.tensors[f"{LINEAR}.weight"].view(torch.uint8)[3, 5] = 0xFF
    config = compressed(FP8, form="naive-quantized")
    source = source_of(published.write(tmp_path / "published", config), tmp_path / "source").path
    with raises("TENSOR_NOT_FINITE", 3, f"{LINEAR}.weight"):
        convert_to(source, tmp_path / "out")


def test_a_width_that_fills_no_words_is_named(tmp_path):
    published = Published(small_spec(intermediate_size=100))
    down = published.modules["layers.0.mlp.down"]
    published.tensors[f"{down}.qweight"] = torch.zeros(12, 64, dtype=torch.int32)
    source = source_of(published.write(tmp_path / "published", GPTQ), tmp_path / "source").path
    with raises("QUANTIZATION_UNSUPPORTED", 4, down, "[64, 100]"):
        convert_to(source, tmp_path / "out")
