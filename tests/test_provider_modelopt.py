"""ModelOpt's recipes in our format: what the tensors compute against ModelOpt's own model, export and quantizers."""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support_artifacts import CORPUS, Said, convert_to, quantize_to, raises, save_folder, source_of, text_model
from tests.support_models import tiny_model
from trtllm_cli.artifacts.schema import ActivationScheme
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.weights import CheckpointWeights, InputQuantizer
from trtllm_cli.ops import quantized
from trtllm_cli.ops.segment import Segment
from trtllm_cli.quantize.calibration import load_calibration
from trtllm_cli.quantize.providers import landing, modelopt
from trtllm_cli.quantize.providers.published_model import transformers_model
from trtllm_cli.runtime.tokenizer import Tokenizer
from trtllm_cli.runtime.torch_executor import TorchExecutor

TORCH_TYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
METHODS = ("smoothquant", "awq", "fp8")
TOKENS = np.random.default_rng(0).integers(0, 97, (6, 24))
#: short, because an activation on the border of two codes may fall to either side and then changes all that follows
COMPARED = np.random.default_rng(1).integers(0, 97, (40, 3))


@pytest.fixture(scope="module")
def mtq() -> Any:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'trtllm-cli[modelopt]'")
    return pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt does not load here")


def checkpoint_of(model: Any, directory: Path, dtype: str = "float32") -> Artifact:
    source = source_of(save_folder(model, directory / "published"), directory / "source")
    return convert_to(source.path, directory / "checkpoint", dtype=dtype)


def provide(checkpoint: Artifact, method: Any, group_size: int = 32, report: Any = None) -> modelopt.Provided:
    return modelopt.run(
        checkpoint, method, TOKENS, group_size=group_size, device="cpu", report=report if report is not None else Said()
    )


class ProvidedWeights:
    """What the torch executor asks for, from a checkpoint with a provider's tensors in place."""

    kv_cache = None

    def __init__(self, checkpoint: Artifact, provided: modelopt.Provided) -> None:
        store = TensorStore(checkpoint.path)
        self._dense = {name: store.tensor(name).float() for name in store}
        self._dense.update({name: tensor.float() for name, tensor in provided.replaced.items()})
        self._inputs: dict[str, InputQuantizer] = {}
        for module in provided.modules:
            self._dense[f"{module}.weight"] = dequantized(provided, module)
            tensors, record = provided.module(module)
            if record.activation is not None:
                self._inputs[module] = InputQuantizer(record.activation, tensors["input_scale"])

    def dense(self, name: str) -> torch.Tensor:
        return self._dense[name]

    def has(self, name: str) -> bool:
        return name in self._dense

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        return self._inputs.get(module)

    def kv_scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the cache is not quantized")


def dequantized(provided: modelopt.Provided, module: str) -> torch.Tensor:
    tensors, record = provided.module(module)
    if record.scheme.type == "int4":
        return quantized.dequantize_int4(tensors["weight"], tensors["weight_scale"], None)
    return quantized.dequantize_8bit(tensors["weight"], tensors["weight_scale"])


def last_logits(checkpoint: Artifact, provided: modelopt.Provided) -> torch.Tensor:
    return last_logits_of(checkpoint, ProvidedWeights(checkpoint, provided))


def last_logits_of(checkpoint: Artifact, weights: Any) -> torch.Tensor:
    """[rows, vocab] after each row of ``COMPARED``, by our decoder."""
    executor = TorchExecutor(checkpoint.checkpoint.spec, weights, COMPARED.shape[1], 1, torch.float32, 1)
    rows = [executor.forward([Segment(0, 0, row.astype(np.int32))])[0] for row in COMPARED]
    return torch.from_numpy(np.stack(rows))


def differences(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """||a - b|| / ||b|| of each row."""
    return (got - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["llama-gqa", "llama-mha-bias", "qwen2-full", "mistral-window"])
def test_modules_compute_what_modelopts_fake_quantized_model_computes(mtq, tmp_path, case, method):
    model = tiny_model(case)
    checkpoint = checkpoint_of(model, tmp_path)
    provided = provide(checkpoint, method, group_size=-1)
    with torch.no_grad():
        expected = provided.model(torch.from_numpy(COMPARED)).logits[:, -1].float()
        unquantized = model(torch.from_numpy(COMPARED)).logits[:, -1]
    apart = differences(last_logits(checkpoint, provided), expected)
    cost = differences(expected, unquantized)
    assert float(apart.median()) < 5e-6
    assert float(apart.max()) < float(cost.median())
    assert float(cost.min()) > 1e-3


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_norms_in_bfloat16_cost_no_accuracy_because_the_weights_take_up_what_they_cannot_hold(mtq, tmp_path, method):
    checkpoint = checkpoint_of(tiny_model("llama-gqa"), tmp_path, "bfloat16")
    provided = provide(checkpoint, method, group_size=-1)
    assert {tensor.dtype for tensor in provided.replaced.values()} == {torch.bfloat16}
    with torch.no_grad():
        expected = provided.model(torch.from_numpy(COMPARED)).logits[:, -1].float()
    assert float(differences(last_logits(checkpoint, provided), expected).median()) < 5e-6


def test_awq_equals_modelopts_own_export_where_that_folds_scales_too(mtq, tmp_path):
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    model = text_model()
    model.config.architectures = ["LlamaForCausalLM"]
    checkpoint = checkpoint_of(model, tmp_path)
    provided = provide(checkpoint, "awq")
    recipe = copy.deepcopy(mtq.INT4_AWQ_CFG)
    recipe["quant_cfg"].append(
        {
            "quantizer_name": "*layers*weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}},
        }
    )
    mtq.quantize(model, recipe, lambda model: model.model(input_ids=torch.from_numpy(TOKENS)))
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for layer in range(2):
        p, q = f"layers.{layer}", f"model.layers.{layer}"
        for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            norm = provided.replaced[f"{p}.{ours}.weight"]
            torch.testing.assert_close(norm, exported[f"{q}.{theirs}.weight"], rtol=1e-5, atol=0)
        for ours, theirs in (
            ("attn.q", "self_attn.q_proj"),
            ("attn.k", "self_attn.k_proj"),
            ("mlp.gate", "mlp.gate_proj"),
        ):
            packed = exported[f"{q}.{theirs}.weight"]  # uint8 [N/2, K], two's complement, row 0 in the low nibble
            nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).int()
            codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
            tensors, _ = provided.module(f"{p}.{ours}")
            values = quantized.unpack_int4(tensors["weight"]).int() - 8
            assert float((values == codes).float().mean()) > 0.999
            scales = exported[f"{q}.{theirs}.weight_scale"]
            torch.testing.assert_close(tensors["weight_scale"], scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_codes_stand_for_what_modelopts_weight_quantizer_gives(mtq, tmp_path, method):
    checkpoint = checkpoint_of(text_model(), tmp_path)
    provided = provide(checkpoint, method)
    layer = provided.model.model.layers[1]
    for module, linear in (("layers.1.attn.q", layer.self_attn.q_proj), ("layers.1.mlp.down", layer.mlp.down_proj)):
        with torch.no_grad():
            expected = linear.weight_quantizer(linear.weight)
        torch.testing.assert_close(dequantized(provided, module), expected, rtol=1e-6, atol=1e-7)
        _, record = provided.module(module)
        weight = linear.weight.detach()
        error = (expected - weight).double().norm() / weight.double().norm()
        assert record.relative_error == pytest.approx(float(error), rel=1e-4)
        assert record.max_error == pytest.approx(float((expected - weight).abs().max()), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_record_says_recipe_scheme_and_the_error_of_each_output(mtq, tmp_path, method):
    checkpoint = checkpoint_of(text_model(), tmp_path)
    provided = provide(checkpoint, method)
    assert provided.modules == tuple(name for name in checkpoint.checkpoint.spec.linears() if name != "lm_head")
    caught: dict[str, Any] = {}
    down = provided.model.model.layers[0].mlp.down_proj
    handle = down.register_forward_hook(lambda module, inputs, output: caught.update(x=inputs[0], y=output))
    with torch.no_grad():
        provided.model(torch.from_numpy(TOKENS))
    handle.remove()
    x = caught["x"].double()
    if down.input_quantizer.pre_quant_scale is not None:
        x = x * down.input_quantizer.pre_quant_scale.double()
    exact = x @ down.weight.detach().double().T
    _, record = provided.module("layers.0.mlp.down")
    assert record.output_error == pytest.approx(float((exact - caught["y"]).norm() / exact.norm()), rel=1e-3)
    assert record.parameters == {"recipe": modelopt.RECIPES[method], "output_error_rows": len(TOKENS)}
    kind = {"smoothquant": "int8", "awq": "int4", "fp8": "fp8"}[method]
    assert (record.method, record.scheme.type) == (method, kind)
    expected = None if method == "awq" else ActivationScheme.model_validate({"type": kind, "granularity": "tensor"})
    assert record.activation == expected


def test_a_group_size_that_does_not_divide_a_layer_is_replaced_and_noted(mtq, tmp_path):
    checkpoint = checkpoint_of(text_model(hidden_size=192), tmp_path)
    provided = provide(checkpoint, "awq", group_size=128)
    tensors, record = provided.module("layers.0.attn.q")
    assert (record.scheme.group_size, tensors["weight_scale"].shape) == (64, (192, 3))
    assert record.note is not None and "128 does not divide 192" in record.note
    tensors, record = provided.module("layers.0.mlp.down")
    assert (record.scheme.group_size, record.note, tensors["weight_scale"].shape) == (128, None, (192, 2))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_tensors(mtq, tmp_path, method):
    checkpoint = checkpoint_of(tiny_model("llama-gqa"), tmp_path)
    first, second = provide(checkpoint, method, group_size=-1), provide(checkpoint, method, group_size=-1)
    for module in first.modules:
        one, other = first.module(module)[0], second.module(module)[0]
        assert one.keys() == other.keys()
        for suffix in one:
            assert torch.equal(one[suffix].view(torch.uint8), other[suffix].view(torch.uint8)), (module, suffix)
    assert all(torch.equal(first.replaced[name], second.replaced[name]) for name in first.replaced)


def test_standard_output_stays_free_and_progress_is_told(mtq, tmp_path, capsys):
    checkpoint = checkpoint_of(tiny_model("llama-gqa"), tmp_path)
    said = Said()
    provide(checkpoint, "smoothquant", report=said)
    assert capsys.readouterr().out == ""
    assert any("INT8_SMOOTHQUANT_CFG on 6 windows of 24 tokens" in line for line in said.lines)
    assert any(line.startswith("ModelOpt: Smoothed 21 modules") for line in said.lines)


def test_the_checkpoint_becomes_the_published_model_again(mtq, tmp_path):
    model = tiny_model("qwen3-gqa")
    again = transformers_model(checkpoint_of(model, tmp_path))
    with torch.no_grad():
        tokens = torch.from_numpy(TOKENS)
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["smoothquant", "fp8"])
def test_an_input_that_was_always_zero_is_named(mtq, tmp_path, method):
    model = tiny_model("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    provided = provide(checkpoint_of(model, tmp_path), method)
    with raises("INPUT_ZERO", 3, "layers.1.mlp.down"):
        provided.module("layers.1.mlp.down")


@pytest.mark.parametrize("method", METHODS)
def test_an_activation_beyond_the_range_of_floats_is_named(mtq, tmp_path, method):
    model = tiny_model("llama-gqa")
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1e20)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e20)
    with raises("TENSOR_NOT_FINITE", 3, "input of layers.1.mlp.down"):
        provide(checkpoint_of(model, tmp_path), method, group_size=-1)


def test_a_norm_that_cannot_hold_its_scale_is_named(mtq, tmp_path):
    model = tiny_model("llama-gqa")
    model.model.layers[1].input_layernorm.weight.data.mul_(3e-8)
    with raises("SCALE_RANGE", 4, "layers.1.attn_norm.weight") as caught:
        provide(checkpoint_of(model, tmp_path, "float16"), "awq", group_size=-1)
    assert "float32" in caught.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_items_make_the_tensors_they_declare(mtq, tmp_path, method):
    checkpoint = checkpoint_of(tiny_model("llama-mha-bias"), tmp_path, "bfloat16")
    store = TensorStore(checkpoint.path)
    made = landing.items(store, provide(checkpoint, method, group_size=-1), {})
    names = [name for item in made for name in item.tensors]
    assert len(set(names)) == len(names) and set(store) <= set(names)
    for item in made:
        tensors, _ = item.make()
        for name, (code, shape) in item.tensors.items():
            assert (TORCH_TYPES[code], shape) == (tensors[name].dtype, tuple(tensors[name].shape)), name


@pytest.mark.parametrize("method", METHODS)
def test_the_stage_writes_a_checkpoint_that_computes_what_the_provider_made(mtq, tmp_path, method):
    folder = save_folder(text_model(), tmp_path / "published", tokenizer=True)
    checkpoint = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "checkpoint", dtype="float32")
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 8, encoding="utf-8")
    chosen = {"method": method, "provider": "modelopt", "calib": str(text), "calib_rows": 4, "calib_length": 32}
    grouped = {"group_size": 32} if method == "awq" else {}
    made = quantize_to(checkpoint.path, tmp_path / "quantized", head=False, **chosen, **grouped)
    record = made.checkpoint.quantization
    assert record is not None and (record.provider, record.method) == ("modelopt", method)
    assert record.calibration is not None and (record.calibration.rows, record.calibration.length) == (4, 32)
    assert made.manifest.versions["nvidia-modelopt"] == metadata.version("nvidia-modelopt")
    info = checkpoint.checkpoint.tokenizer
    assert info is not None
    tokens = load_calibration(
        str(text), Tokenizer(checkpoint.path, info), rows=4, length=32, seed=None, offline=True, vocab_size=320
    ).tokens
    provided = modelopt.run(checkpoint, method, tokens, group_size=32, device="cpu", report=Said())
    weights = CheckpointWeights(made, torch.float32)
    with torch.no_grad():
        expected = provided.model(torch.from_numpy(COMPARED)).logits[:, -1].float()
    got = last_logits_of(checkpoint, weights)
    assert float(differences(got, expected).median()) < 5e-6


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with raises("PACKAGE_MISSING", 4, "nvidia-modelopt") as caught:
        modelopt.version()
    assert caught.value.hint == "pip install 'trtllm-cli[modelopt]'"


@pytest.mark.parametrize("found, accepted", [("0.46.1", False), ("0.47.0", True), ("0.100.0rc1", True), ("1.0", True)])
def test_only_releases_with_recipes_of_the_known_form_are_used(monkeypatch, found, accepted):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    if accepted:
        assert modelopt.version() == found
    else:
        with raises("PACKAGE_TOO_OLD", 4, found, "0.47"):
            modelopt.version()
