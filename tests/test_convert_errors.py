"""What ``convert`` refuses: it names the thing, leaves nothing behind, and the corrected command then works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support_artifacts import convert_to, raises, save_folder, snapshot, source_of
from tests.support_models import tiny_model
from trtllm_cli.artifacts.tensors import INDEX


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A published folder to copy and damage."""
    return save_folder(tiny_model("llama-gqa"), tmp_path_factory.mktemp("whole") / "published")


@pytest.fixture
def folder(whole, tmp_path):
    directory = tmp_path / "published"
    directory.mkdir()
    for file in whole.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def attempt(folder: Path, home: Path, **options):
    return convert_to(source_of(folder, home / "source").path, home / "out", **options)


def config(folder: Path, **changes) -> None:
    data = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def tensors(folder: Path, **changes) -> None:
    file = folder / "model.safetensors"
    data = load_file(file)
    for key, change in changes.items():
        name = key.replace("__", ".")
        if change is None:
            del data[name]
        else:
            data[name] = change(data[name].clone()) if callable(change) else change
    save_file(data, file)


def poke(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.reshape(-1)[-1] = value
        return tensor

    return change


NORM, DOWN = "model__norm__weight", "model__layers__1__mlp__down_proj__weight"
DOTTED = "model.layers.1.mlp.down_proj.weight"

TENSOR_ERRORS = {
    "missing": ({NORM: None}, {}, "TENSORS_WRONG", 3, ["model.norm.weight is missing"]),
    "shape": (
        {DOWN: torch.zeros(48, 81)},
        {},
        "TENSORS_WRONG",
        3,
        [f"{DOTTED} is [48, 81], expected [48, 80]"],
    ),
    "transposed": ({DOWN: lambda t: t.T.contiguous()}, {}, "TENSORS_WRONG", 3, [f"{DOTTED} is [80, 48]"]),
    "extra": (
        {"model__layers__3__mlp__down_proj__weight": torch.zeros(48, 80)},
        {},
        "TENSORS_WRONG",
        3,
        ["model.layers.3.mlp.down_proj.weight is not part of a llama"],
    ),
    "bias": (
        {"model__layers__0__self_attn__q_proj__bias": torch.zeros(48)},
        {},
        "TENSORS_WRONG",
        3,
        ["model.layers.0.self_attn.q_proj.bias is not part"],
    ),
    "several": ({NORM: None, DOWN: None}, {}, "TENSORS_WRONG", 3, ["model.norm.weight is missing", DOTTED]),
    "nan": ({DOWN: poke(float("nan"))}, {}, "TENSOR_NOT_FINITE", 3, [DOTTED, "1 NaN", "3840"]),
    "infinite": ({NORM: poke(float("-inf"))}, {}, "TENSOR_NOT_FINITE", 3, ["model.norm.weight"]),
    "overflow": ({DOWN: poke(-70000.0)}, {"dtype": "float16"}, "TENSOR_OVERFLOW", 3, [DOTTED, "7e+04", "float16"]),
    "integers": ({DOWN: lambda t: t.to(torch.int8)}, {}, "TENSOR_TYPE", 3, [DOTTED, "int8"]),
    "fp8": ({DOWN: lambda t: t.to(torch.float8_e4m3fn)}, {}, "TENSOR_TYPE", 3, [DOTTED, "float8"]),
}


@pytest.mark.parametrize("case", TENSOR_ERRORS)
def test_a_wrong_tensor_is_named(folder, tmp_path, case):
    changes, options, code, exit_code, needles = TENSOR_ERRORS[case]
    tensors(folder, **changes)
    before = {path.name for path in tmp_path.iterdir()}
    with raises(code, exit_code, *needles):
        attempt(folder, tmp_path, **options)
    assert {path.name for path in tmp_path.iterdir()} == before | {"source"}


def test_many_wrong_tensors_are_counted(folder, tmp_path):
    config(folder, num_hidden_layers=9)
    with raises("TENSORS_WRONG", 3, "model.layers.3.input_layernorm.weight is missing", "44 more"):
        attempt(folder, tmp_path)


def test_the_hinted_dtype_then_works(folder, tmp_path):
    tensors(folder, **{DOWN: poke(70000.0)})
    with raises("TENSOR_OVERFLOW", 3) as caught:
        attempt(folder, tmp_path, dtype="float16", max_shard_mib=1)
    assert "--dtype bfloat16" in caught.value.hint
    made = convert_to(tmp_path / "source", tmp_path / "out", dtype="bfloat16")
    assert made.checkpoint.dtype == "bfloat16"


def test_an_existing_result_survives_a_failed_replacement(whole, folder, tmp_path):
    convert_to(source_of(whole, tmp_path / "good").path, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    tensors(folder, **{NORM: poke(float("nan"))})
    with raises("TENSOR_NOT_FINITE", 3):
        attempt(folder, tmp_path, force=True)
    assert snapshot(tmp_path / "out") == before


CONFIG_ERRORS = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "ARCHITECTURE_UNSUPPORTED", 4, ["GPT2LMHeadModel"]),
    "no architecture": (
        {"architectures": ...},
        "ARCHITECTURE_UNSUPPORTED",
        4,
        ["model_type 'llama'"],
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "aqlm", "bits": 4}},
        "QUANTIZATION_UNSUPPORTED",
        4,
        ["aqlm", "gptq, awq, compressed-tensors and modelopt"],
    ),
    "incomplete": ({"hidden_size": ...}, "CONFIG_INCOMPLETE", 3, ["hidden_size"]),
    "activation": ({"hidden_act": "relu"}, "MODEL_FEATURE_UNSUPPORTED", 4, ["relu"]),
    "count": ({"num_hidden_layers": 2.5}, "CONFIG_INVALID", 3, ["num_hidden_layers"]),
    "rope": ({"rope_parameters": 5}, "CONFIG_INVALID", 3, ["rope_parameters"]),
    "architectures text": ({"architectures": 5}, "ARCHITECTURE_UNSUPPORTED", 4, ["5"]),
    "fewer layers": ({"num_hidden_layers": 2}, "TENSORS_WRONG", 3, ["model.layers.2"]),
    "larger vocabulary": ({"vocab_size": 98}, "TENSORS_WRONG", 3, ["[97, 48], expected [98, 48]"]),
    "head size": ({"head_dim": 10}, "TENSORS_WRONG", 3, ["q_proj.weight"]),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_a_wrong_config_is_named(folder, tmp_path, case):
    changes, code, exit_code, needles = CONFIG_ERRORS[case]
    config(folder, **changes)
    with raises(code, exit_code, *needles):
        attempt(folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"published", "source"}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder, tmp_path, content):
    (folder / "config.json").write_bytes(content)
    with raises("CONFIG_INVALID", 3, "config.json"):
        attempt(folder, tmp_path)


def test_damage_after_the_download_is_noticed(folder, tmp_path):
    source = source_of(folder, tmp_path / "source")
    weights = source.path / "files" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)
    with raises("ARTIFACT_DAMAGED", 3, "model.safetensors was altered"):
        convert_to(source.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_download_is_noticed_by_its_format(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with raises("TENSOR_FILE_DAMAGED", 3, "model.safetensors"):
        attempt(folder, tmp_path)


def shards(folder: Path) -> dict[str, str]:
    """Split the folder's weights into two shards; the weight map."""
    data = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(data) // 2
    weight_map = {}
    for number, part in enumerate([list(data)[:half], list(data)[half:]], 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: data[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_a_promised_tensor_without_a_shard_is_named(folder, tmp_path):
    weight_map = shards(folder)
    ghost = {**weight_map, "model.ghost.weight": "model-00001-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": ghost}))
    with raises("TENSOR_MISSING", 3, "model.ghost.weight"):
        attempt(folder, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "", '{"version": "1.0"}', '{"model": {"type": "??"}}', "[]"])
def test_a_damaged_tokenizer_is_named(folder, tmp_path, content):
    (folder / "tokenizer.json").write_text(content)
    with raises("TOKENIZER_DAMAGED", 3, "tokenizer.json"):
        attempt(folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(folder, text_folder, tmp_path):
    (folder / "tokenizer.json").write_bytes((text_folder / "tokenizer.json").read_bytes())
    with raises("TOKENIZER_MISMATCH", 3, "300", "97"):
        attempt(folder, tmp_path)
