"""Exported folders: transformers loads them with our logits, and ``convert`` takes every integer and scale back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support_artifacts import Said, convert_to, raises, snapshot
from tests.support_interchange import (
    FP8,
    FP8_TENSOR,
    INT8,
    INT8_TENSOR,
    STATIC8,
    STATIC_FP8,
    TOKEN8,
    TOKEN_FP8,
    checkpoint,
    everywhere,
    export_to,
    int4,
    our_logits,
    small_spec,
    stored,
    their_logits,
    tokens,
    transformers_model,
)
from tests.support_models import CASES, published_config, tiny_model
from trtllm_cli.artifacts.schema import KvCacheScheme
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.models.families import family_of
from trtllm_cli.models.weights import dequantized

IDS = tokens(24, 96)


def mixed(module: str):
    """int4 MLPs, W8A8 queries, float keys, fp8 for the rest, the head as int8."""
    if ".mlp" in module:
        return int4(32), None
    if ".attn.q" in module:
        return INT8, STATIC8
    if ".attn.k" in module or module == "embed":
        return None
    return (INT8, None) if module == "lm_head" else (FP8, None)


SCHEMES = {
    "int4 g32": everywhere(int4(32)),
    "int4 g32 float32 scales": everywhere(int4(32, scale="float32")),
    "int4 g64 asymmetric": everywhere(int4(64, False, scale="float32")),
    "int4 row": everywhere(int4(-1)),
    "int4 row asymmetric": everywhere(int4(-1, False, scale="float32")),
    "int8": everywhere(INT8),
    "int8 per tensor": everywhere(INT8_TENSOR),
    "int8 static inputs": everywhere(INT8, STATIC8),
    "fp8": everywhere(FP8),
    "fp8 per tensor": everywhere(FP8_TENSOR),
    "fp8 static inputs": everywhere(FP8_TENSOR, STATIC_FP8),
    "fp8 token inputs": everywhere(FP8, TOKEN_FP8),
    "mixed": mixed,
}
CACHES = {
    "fp8": KvCacheScheme(type="fp8", granularity="tensor"),
    "fp8 per head": KvCacheScheme(type="fp8", granularity="head"),
    "int8": KvCacheScheme(type="int8", granularity="tensor"),
}


def compressed_tensors_model(folder, asymmetric: bool = False):
    pytest.importorskip("compressed_tensors", reason="transformers loads this format with compressed-tensors")
    if not asymmetric:
        return transformers_model(folder)
    from transformers import CompressedTensorsConfig

    # compressed-tensors 0.20 cannot load packed zero points, its own included, into its compressed modules
    return transformers_model(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


def same_back(artifact, exported, home, dropped: tuple[str, ...] = ()) -> None:
    """Importing the export gives the checkpoint's tensors bit for bit, and its schemes; ``dropped`` came back dense."""
    back = convert_to(exported.path, home / "back")
    ours, theirs = stored(artifact), stored(open_artifact(back.path, "checkpoint", full=True))
    for module in dropped:
        layer = next(layer for layer in artifact.checkpoint.quantization.layers if layer.module == module)
        from trtllm_cli.artifacts.tensors import TensorStore

        dense = dequantized(TensorStore(artifact.path), layer)
        assert torch.equal(theirs.pop(f"{module}.weight").float(), dense)
        for name in [name for name in ours if name.startswith(f"{module}.")]:
            del ours[name]
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    record = artifact.checkpoint.quantization
    if record is None:
        assert back.checkpoint.quantization is None
        return
    kept = {layer.module: (layer.scheme, layer.activation) for layer in record.layers if layer.module not in dropped}
    again = {layer.module: (layer.scheme, layer.activation) for layer in back.checkpoint.quantization.layers}
    assert again == kept
    assert back.checkpoint.quantization.kv_cache == record.kv_cache
    assert back.checkpoint.spec == artifact.checkpoint.spec


@pytest.mark.parametrize("case", SCHEMES)
def test_compressed_tensors_comes_back_bit_for_bit(case, tmp_path):
    artifact = checkpoint(tmp_path / "in", SCHEMES[case])
    same_back(artifact, export_to(artifact.path, tmp_path / "out", "compressed-tensors"), tmp_path)


@pytest.mark.parametrize("case", SCHEMES)
def test_compressed_tensors_in_transformers_gives_our_logits(case, tmp_path):
    artifact = checkpoint(tmp_path / "in", SCHEMES[case])
    exported = export_to(artifact.path, tmp_path / "out", "compressed-tensors")
    model = compressed_tensors_model(exported.path / "files", "asymmetric" in case)
    ours, theirs = our_logits(artifact, IDS), their_logits(model, IDS)
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() < 2e-5


def test_int8_inputs_per_token_come_back_and_only_their_scale_differs_in_transformers(tmp_path):
    """The package emulates a token's scale as max|x| / 127.5; with 127, as kernels do, its modules give our logits."""
    artifact = checkpoint(tmp_path / "in", everywhere(INT8, TOKEN8))
    said = Said()
    exported = export_to(artifact.path, tmp_path / "out", "compressed-tensors", report=said)
    assert any("127.5" in line for line in said.lines)
    same_back(artifact, exported, tmp_path)
    model = compressed_tensors_model(exported.path / "files")
    their_logits(model, IDS[:2])  # the first call is what decompresses the weights

    def round_input(module, inputs):
        x = inputs[0]
        scale = x.abs().amax(-1, keepdim=True) / 127
        return ((x / scale).round().clamp(-128, 127) * scale,)

    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
            module.register_forward_pre_hook(round_input)
    assert np.abs(our_logits(artifact, IDS) - their_logits(model, IDS)).max() < 2e-5


@pytest.mark.parametrize("case", CACHES)
@pytest.mark.parametrize("weights", [True, False])
def test_a_quantized_cache_comes_back_and_gives_our_logits(case, weights, tmp_path):
    choose = everywhere(INT8) if weights else lambda module: None
    artifact = checkpoint(tmp_path / "in", choose, kv=CACHES[case])
    exported = export_to(artifact.path, tmp_path / "out", "compressed-tensors")
    same_back(artifact, exported, tmp_path)
    model = compressed_tensors_model(exported.path / "files")
    unquantized = our_logits(checkpoint(tmp_path / "plain", choose), IDS)
    ours, theirs = our_logits(artifact, IDS), their_logits(model, IDS)
    assert np.abs(ours - unquantized).max() > 1e-3
    assert np.abs(ours - theirs).max() < 2e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_embedding_is_written_dense_without_loss(tied, tmp_path):
    artifact = checkpoint(tmp_path / "in", lambda module: (INT8, None), small_spec(tie_embeddings=tied))
    said = Said()
    exported = export_to(artifact.path, tmp_path / "out", "compressed-tensors", report=said)
    assert any("embed" in line and "dequantized" in line for line in said.lines)
    same_back(artifact, exported, tmp_path, dropped=("embed",))
    model = compressed_tensors_model(exported.path / "files")
    assert np.abs(our_logits(artifact, IDS) - their_logits(model, IDS)).max() < 2e-5


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_export_with_their_biases_norms_and_windows(family, tmp_path):
    changes = {
        "mistral": {"windows": (8, 8)},
        "qwen2": {"qkv_bias": True, "windows": (None, 8)},
        "qwen3": {"qk_norm": True, "qkv_bias": True, "attention_out_bias": True},
    }
    spec = small_spec(family=family, **changes[family])
    artifact = checkpoint(tmp_path / "in", everywhere(int4(32)), spec)
    exported = export_to(artifact.path, tmp_path / "out", "compressed-tensors")
    same_back(artifact, exported, tmp_path)
    model = compressed_tensors_model(exported.path / "files")
    assert np.abs(our_logits(artifact, IDS) - their_logits(model, IDS)).max() < 2e-5


GPTQ = {
    "symmetric": int4(32),
    "asymmetric": int4(32, False),
    "row": int4(-1),
    "act-order": int4(16, index=True),
    "act-order asymmetric": int4(16, False, index=True, scale="float32"),
}


def gptq_dense(tensors: dict[str, torch.Tensor], module: str, minus: int) -> np.ndarray:
    """A weight [N, K] in float64 from the format's description, one value at a time."""
    words, zero_words = (tensors[f"{module}.{name}"].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    scales, index = tensors[f"{module}.scales"].double().numpy(), tensors[f"{module}.g_idx"].numpy()
    k, n = words.shape[0] * 8, words.shape[1]
    dense = np.empty((n, k))
    for i in range(k):
        values = (words[i // 8] >> np.uint32(4 * (i % 8))) & 15
        zeros = np.array([(zero_words[index[i], o // 8] >> np.uint32(4 * (o % 8))) & 15 for o in range(n)])
        dense[:, i] = (values.astype(np.int64) - zeros.astype(np.int64) - minus) * scales[index[i]]
    return dense


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_holds_what_the_format_says_and_comes_back_bit_for_bit(case, tmp_path):
    artifact = checkpoint(tmp_path / "in", everywhere(GPTQ[case]))
    exported = export_to(artifact.path, tmp_path / "out", "gptq")
    same_back(artifact, exported, tmp_path)
    settings = json.loads((exported.path / "files" / "config.json").read_text())["quantization_config"]
    assert settings["checkpoint_format"] == ("gptq_v2" if "asymmetric" in case else "gptq")
    assert settings["desc_act"] == ("act-order" in case)
    tensors = load_file(exported.path / "files" / "model.safetensors")
    from trtllm_cli.artifacts.tensors import TensorStore

    store = TensorStore(artifact.path)
    modules = {layer.module: layer for layer in artifact.checkpoint.quantization.layers}
    for ours, theirs in (("layers.0.attn.k", "self_attn.k_proj"), ("layers.0.mlp.down", "mlp.down_proj")):
        dense = gptq_dense(tensors, f"model.layers.0.{theirs}", 0 if "asymmetric" in case else 1)
        np.testing.assert_allclose(dequantized(store, modules[ours]).double().numpy(), dense, rtol=2e-7)


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_in_transformers_gives_our_logits(case, tmp_path):
    pytest.importorskip("optimum.gptq", reason="transformers loads GPTQ with optimum and gptqmodel")
    pytest.importorskip("gptqmodel", reason="transformers loads GPTQ with optimum and gptqmodel")
    artifact = checkpoint(tmp_path / "in", everywhere(GPTQ[case]))
    exported = export_to(artifact.path, tmp_path / "out", "gptq")
    model = transformers_model(exported.path / "files", device_map="cpu")
    # its kernels hold scales and activations in 16 bits
    assert np.abs(our_logits(artifact, IDS) - their_logits(model, IDS)).max() < 0.05


def test_an_int8_head_beside_int4_layers_is_written_dense_in_gptq(tmp_path):
    artifact = checkpoint(tmp_path / "in", lambda m: (int4(32) if m.startswith("layers.") else INT8, None))
    said = Said()
    exported = export_to(artifact.path, tmp_path / "out", "gptq", report=said)
    assert any("embed, lm_head" in line for line in said.lines)
    same_back(artifact, exported, tmp_path, dropped=("embed", "lm_head"))


@pytest.mark.parametrize("case", CASES)
def test_an_unquantized_export_is_the_published_model(case, tmp_path):
    """From a Hugging Face model to a checkpoint to a folder: the same tensors, config and logits."""
    from tests.support_artifacts import save_folder, source_of

    model = tiny_model(case)
    folder = save_folder(model, tmp_path / "published")
    artifact = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "in")
    exported = export_to(artifact.path, tmp_path / "out", "hf")
    before, after = load_file(folder / "model.safetensors"), load_file(exported.path / "files" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers_model(exported.path / "files")
    ids = tokens(40, 97)
    assert np.array_equal(their_logits(model, ids), their_logits(again, ids))
    config = json.loads((exported.path / "files" / "config.json").read_text())
    original = published_config(model)
    assert family_of(config, "a").spec(config, "a") == family_of(original, "b").spec(original, "b")
    same_back(artifact, exported, tmp_path)


def test_the_tokenizer_is_the_one_transformers_loads(text_checkpoint, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    exported = export_to(text_checkpoint.path, tmp_path / "out", "hf")
    folder = exported.path / "files"
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(str(text_checkpoint.path / "tokenizer.json"))
    for text in ("The quick brown fox.", "Ein Bär läuft", "</s> and  spaces \n\n tabs\t"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    chat = [{"role": "user", "content": "hello"}]
    assert "hello" in theirs.apply_chat_template(chat, tokenize=False)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)
    back = convert_to(exported.path, tmp_path / "back")
    info, again = text_checkpoint.checkpoint.tokenizer, back.checkpoint.tokenizer
    assert again == info


def test_sharding_changes_nothing(tmp_path):
    spec = small_spec(hidden_size=256, intermediate_size=1024, vocab_size=2048)
    artifact = checkpoint(tmp_path / "in", everywhere(int4(32)), spec)
    whole = export_to(artifact.path, tmp_path / "whole", "compressed-tensors")
    parts = export_to(artifact.path, tmp_path / "parts", "compressed-tensors", max_shard_mib=1)
    files = sorted((parts.path / "files").glob("model-*.safetensors"))
    assert len(files) > 2
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    one = load_file(whole.path / "files" / "model.safetensors")
    assert set(one) == set(together)
    assert all(torch.equal(one[name], together[name]) for name in one)
    same_back(artifact, parts, tmp_path)


def test_an_interrupted_export_resumes_with_the_same_bytes(tmp_path):
    spec = small_spec(hidden_size=256, intermediate_size=1024, vocab_size=2048)
    artifact = checkpoint(tmp_path / "in", everywhere(int4(32)), spec)

    class Stop(Said):
        def advance(self, label: str, done: float, total: float, unit: str) -> None:
            if done > 0.7 * total:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_to(artifact.path, tmp_path / "out", "gptq", max_shard_mib=1, report=Stop())
    finished = {file.name: file.stat().st_ino for file in (tmp_path / ".out.partial/files").glob("model-*.safetensors")}
    assert finished
    exported = export_to(artifact.path, tmp_path / "out", "gptq", max_shard_mib=1)
    assert {name: (exported.path / "files" / name).stat().st_ino for name in finished} == finished
    assert snapshot(exported.path) == snapshot(
        export_to(artifact.path, tmp_path / "whole", "gptq", max_shard_mib=1).path
    )


def test_a_second_export_is_up_to_date(tmp_path):
    artifact = checkpoint(tmp_path / "in", everywhere(INT8))
    first = export_to(artifact.path, tmp_path / "out", "compressed-tensors")
    before = (tmp_path / "out" / "files" / "model.safetensors").stat()
    assert export_to(artifact.path, tmp_path / "out", "compressed-tensors").id == first.id
    assert (tmp_path / "out" / "files" / "model.safetensors").stat().st_ino == before.st_ino
    assert first.source.origin.kind == "export"
    assert first.source.origin.reference == f"checkpoint:{artifact.id}"
    assert first.manifest.parents[0].id == artifact.id


def some(scheme_of_q, rest=None):
    return lambda m: scheme_of_q if m.endswith("attn.q") else (rest if m.startswith("layers.") else None)


REFUSED = {
    "hf of quantized": ("hf", everywhere(INT8), {}, ["quantized (random)"]),
    "gptq of unquantized": ("gptq", lambda m: None, {}, ["not quantized", "gptq"]),
    "compressed of unquantized": ("compressed-tensors", lambda m: None, {}, ["not quantized"]),
    "compressed of act-order": ("compressed-tensors", everywhere(int4(16, index=True)), {}, ["layers.0.attn.q"]),
    "gptq of int8": ("gptq", some((INT8, None), (int4(32), None)), {}, ["layers.0.attn.q", "layers.1.attn.q"]),
    "gptq of some": ("gptq", some((int4(32), None)), {}, ["every linear", "layers.0.attn.k", "more"]),
    "gptq of two sizes": ("gptq", some((int4(16), None), (int4(32), None)), {}, ["group 16", "group 32"]),
    "gptq of a cache": ("gptq", everywhere(int4(32)), {"kv": CACHES["fp8"]}, ["cache"]),
    "embedding only": ("compressed-tensors", lambda m: (INT8, None) if m == "embed" else None, {}, ["embedding"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(case, tmp_path):
    form, choose, more, needles = REFUSED[case]
    artifact = checkpoint(tmp_path / "in", choose, **more)
    with raises("EXPORT_UNSUPPORTED", 4, *needles):
        export_to(artifact.path, tmp_path / "out", form)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_the_command_says_which_folder_to_hand_to_transformers(tmp_path):
    from tests.support_artifacts import command

    artifact = checkpoint(tmp_path / "in", everywhere(int4(32)))
    done = command("export", artifact.path, "-o", tmp_path / "out", "--format", "gptq")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "files"
    assert f"hand this folder to transformers: {folder}" in done.stdout
    again = command("export", artifact.path, "-o", tmp_path / "out", "--format", "gptq", "--json")
    result = json.loads(again.stdout.splitlines()[-1])
    assert (result["status"], result["format"], result["folder"]) == ("up-to-date", "gptq", str(folder))
