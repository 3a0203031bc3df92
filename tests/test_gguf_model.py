"""GGUF files as Hugging Face models: against the model they were written from, and against transformers' own loader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support_gguf import write_model
from tests.support_models import CASES, published_config, tiny_model
from trtllm_cli.convert import gguf_model
from trtllm_cli.convert.gguf_model import GgufModel
from trtllm_cli.convert.gguf_reader import GgufFile
from trtllm_cli.errors import BadInputError, UnsupportedError, UserError
from trtllm_cli.models.families import family_of

#: cases whose config a GGUF file cannot say: another activation, a window in some layers, yarn with a factor of its own
UNSAYABLE = {"llama-head-dim", "qwen2-window", "qwen3-window", "qwen2-yarn"}
SAYABLE = sorted(set(CASES) - UNSAYABLE)


@pytest.mark.parametrize("case", SAYABLE)
def test_config_and_tensors_come_back(case: str, tmp_path: Path) -> None:
    model = tiny_model(case)
    opened = GgufModel(write_model(tmp_path / "model.gguf", model))
    published = published_config(model)
    ours, theirs = family_of(opened.config, "gguf"), family_of(published, "config.json")
    spec, expected_spec = ours.spec(opened.config, "gguf"), theirs.spec(published, "config.json")
    # without a window Mistral's arithmetic is Llama's, and its file says llama
    assert spec.model_copy(update={"family": expected_spec.family}) == expected_spec
    expected = {
        name: tensor for name, tensor in model.state_dict().items() if name in ours.published_names(spec).values()
    }
    assert set(opened.names()) == set(expected)
    for name, tensor in expected.items():
        found = opened.tensor(name)
        assert opened.shape(name) == tuple(tensor.shape)
        assert torch.equal(found, tensor.float()), name
    assert set(ours.published_names(spec).values()) == set(opened.names())


@pytest.mark.parametrize(("case", "kind"), [("llama-gqa", Kind.F32), ("qwen2-full", Kind.F32), ("qwen3", Kind.F32),
                                            ("llama-wide", Kind.Q8_0), ("llama-wide", Kind.Q4_0)])  # fmt: skip
def test_transformers_own_loader_sees_the_same(case: str, kind: Kind, tmp_path: Path) -> None:
    import transformers

    model = {"llama-wide": wide_llama, "qwen3": qwen3}.get(case, lambda: tiny_model(case))()

    def say_vocabulary(writer: gguf.GGUFWriter, architecture: str) -> None:
        # transformers counts the tokens, and this file has none
        if architecture != "llama":
            writer.add_vocab_size(model.config.vocab_size)

    opened = GgufModel(write_model(tmp_path / "model.gguf", model, lambda name: kind, say_vocabulary))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = loaded.state_dict()
    for name in opened.names():
        assert torch.allclose(opened.tensor(name).float(), state[name], rtol=0, atol=1e-6), name
    ids = torch.arange(5)[None]
    with torch.no_grad():
        if kind == Kind.F32:
            assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def qwen3() -> Any:
    """Heads of 128 elements: transformers' loader does not read their size, and every published Qwen3 has this one."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def wide_llama() -> Any:
    """A Llama whose rows are whole blocks of every type: 256 elements."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_half_precision_stays_as_it_is_stored(kind: Kind, tmp_path: Path) -> None:
    model = wide_llama()
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    opened = GgufModel(write_model(tmp_path / "model.gguf", model, lambda name: kind))
    for name, tensor in model.state_dict().items():
        found = opened.tensor(name)
        if tensor.ndim == 2:
            assert opened.stored_type(name) == kind.name
            assert found.dtype == dtype
            assert torch.equal(found, tensor.to(dtype)), name
        else:
            assert torch.equal(found, tensor)


def q8_0(raw: np.ndarray) -> np.ndarray:
    """ggml: a float16 scale and 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)).reshape(-1)


def q4_1(raw: np.ndarray) -> np.ndarray:
    """ggml: float16 scale and minimum, 32 nibbles, the low ones first."""
    blocks = raw.reshape(-1, 20)
    scale, low = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * nibbles + low).reshape(-1)


@pytest.mark.parametrize(("kind", "formula"), [(Kind.Q8_0, q8_0), (Kind.Q4_1, q4_1)])
def test_dequantized_by_the_formats_formula(kind: Kind, formula: Any, tmp_path: Path) -> None:
    model = wide_llama()
    opened = GgufModel(write_model(tmp_path / "model.gguf", model, lambda name: kind))
    name = "model.layers.0.mlp.down_proj.weight"
    entry = opened.file.tensors["blk.0.ffn_down.weight"]
    expected = formula(np.array(opened.file.bytes(entry))).reshape(entry.shape)
    np.testing.assert_array_equal(opened.tensor(name).numpy(), expected)
    step = {Kind.Q8_0: 127, Kind.Q4_1: 7.5}[kind]
    original = model.state_dict()[name]
    assert (opened.tensor(name) - original).abs().max() < original.abs().max() / step


DEQUANTIZED = sorted(
    (kind for kind in gguf.quants._type_traits if kind not in (Kind.BF16,)), key=lambda kind: kind.name
)


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_type_in_pieces_and_with_rows_in_order(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns, heads = 48, 256, 4
    _, size = gguf.GGML_QUANT_SIZES[kind]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    raw = np.random.default_rng(0).integers(0, 60, (rows, columns // block * size), np.uint8)
    model = tiny_model("llama-gqa")

    def one_more(writer: gguf.GGUFWriter, architecture: str) -> None:
        writer.add_tensor("blk.7.attn_q.weight", raw, raw_dtype=kind)

    path = write_model(tmp_path / "model.gguf", model, change=one_more)
    monkeypatch.setattr(gguf_model, "_CHUNK", 5 * columns)  # a piece of rows that is not a divisor of all of them
    found = GgufModel(path).tensor("model.layers.7.self_attn.q_proj.weight")
    whole = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    head = rows // heads
    # row 2j+h of a head in the file is row j of half h of the published head
    order = [h * head + 2 * (j % (head // 2)) + j // (head // 2) for h in range(heads) for j in range(head)]
    torch.testing.assert_close(found, whole[order], rtol=0, atol=0, equal_nan=True)


def test_the_reader_agrees_with_the_gguf_packages(tmp_path: Path) -> None:
    def everything(writer: gguf.GGUFWriter, architecture: str) -> None:
        writer.add_array("test.strings", ["a", "é", "", "▁x"])
        writer.add_array("test.floats", [0.5, -1.25])
        writer.add_array("test.ints", [1, -2, 3])
        writer.add_array("test.bools", [True, False])
        for number, name in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
            getattr(writer, f"add_{name}")(f"test.{name}", number)
        writer.add_float64("test.float64", 0.1)
        writer.add_custom_alignment(128)

    path = write_model(tmp_path / "model.gguf", wide_llama(), lambda name: Kind.Q5_0, everything)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, field in fields.items():
        assert ours.metadata[name] == field.contents(), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.type, entry.offset, entry.size) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert entry.shape == tuple(tensor.shape.tolist())[::-1]
        np.testing.assert_array_equal(ours.bytes(entry), np.asarray(tensor.data).reshape(-1).view(np.uint8))


def test_published_llama3_scaling_comes_back(tmp_path: Path) -> None:
    """The factors of Llama 3.1 (8) and 3.2 (32) with their published 8192, which the file does not say."""
    from tests.support_gguf import rope_factors

    for factor in (8.0, 32.0):
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip

        def change(writer: gguf.GGUFWriter, _: str, rope: dict[str, Any] = rope) -> None:
            writer.add_tensor("rope_freqs.weight", rope_factors(128, rope))

        model = tiny_llama(head_dim=128, theta=500000.0)
        config = GgufModel(write_model(tmp_path / "model.gguf", model, change=change)).config
        assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == rope


def tiny_llama(head_dim: int = 16, theta: float = 10000.0) -> Any:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )  # fmt: skip


def test_factors_that_are_all_one_scale_nothing(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.gguf", tiny_llama(), change=lambda w, _: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    )
    assert "rope_scaling" not in GgufModel(path).config


REFUSED: dict[str, tuple[Any, str, str]] = {
    "moe": (lambda w, a: w.add_expert_count(8), "MODEL_FEATURE_UNSUPPORTED", "llama.expert_count is 8"),
    "scale": (lambda w, a: w.add_logit_scale(0.5), "MODEL_FEATURE_UNSUPPORTED", "llama.logit_scale is 0.5"),
    "layers": (
        lambda w, a: w.add_array("llama.attention.head_count_kv", [1, 2]), "MODEL_FEATURE_UNSUPPORTED", "between layers"
    ),
    "partial rotary": (
        lambda w, a: w.add_uint32("llama.rope.dimension_count", 8), "MODEL_FEATURE_UNSUPPORTED", "16 elements"
    ),
    "longrope": (
        lambda w, a: w.add_string("llama.rope.scaling.type", "longrope"), "MODEL_FEATURE_UNSUPPORTED", "longrope"
    ),
    "freqs": (
        lambda w, a: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
        "MODEL_FEATURE_UNSUPPORTED", "not Llama 3's scaling",
    ),
    "split": (lambda w, a: w.add_uint16("split.count", 3), "GGUF_SPLIT", "one of 3 parts"),
    "projector": (lambda w, a: w.add_string("general.type", "mmproj"), "GGUF_NOT_A_MODEL", "mmproj"),
    "architecture": (lambda w, a: w.add_string("general.architecture", "gemma2"), "ARCHITECTURE_UNSUPPORTED", "gemma2"),
    "tensor": (
        lambda w, a: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 32), np.float32)), "GGUF_TENSOR_UNKNOWN",
        "blk.0.ffn_gate_inp.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_families_cannot_compute_is_refused_by_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, code, says = REFUSED[what]

    def overwriting(writer: gguf.GGUFWriter, architecture: str) -> None:
        adds = writer.add_key_value

        def replace(key: str, *args: Any, **kwargs: Any) -> None:
            for shard in writer.kv_data:
                shard.pop(key, None)
            adds(key, *args, **kwargs)

        monkeypatch.setattr(writer, "add_key_value", replace)
        change(writer, architecture)

    path = write_model(tmp_path / "model.gguf", tiny_llama(), change=overwriting)
    with pytest.raises(UnsupportedError, match=says) as caught:
        GgufModel(path)
    assert caught.value.code == code
    assert str(path) in caught.value.message


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="needs the gguf package") as caught:
        GgufModel(path)
    assert caught.value.hint == "pip install 'trtllm-cli[gguf]'"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_model(path, tiny_llama(), lambda name: Kind.Q8_0).read_bytes()


def read_all(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    model = GgufModel(path)
    for name in model.names():
        assert tuple(model.tensor(name).shape) == model.shape(name)


@settings(max_examples=150)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(share: float, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    # the last tensor is followed by padding, whose loss harms nothing
    with pytest.raises(BadInputError) as caught:
        read_all(whole[: int(share * (len(whole) - 32))], path)
    assert caught.value.code in ("GGUF_DAMAGED", "GGUF_INVALID")
    assert str(path) in caught.value.message


@settings(max_examples=300)
@given(changes=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_an_altered_header_never_escapes_as_another_error(
    changes: list[tuple[int, int]], whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(whole)
    for position, value in changes:
        data[min(position, len(data) - 1)] = value
    try:
        read_all(bytes(data), tmp_path_factory.getbasetemp() / "altered.gguf")
    except UserError as error:
        caught: UserError | None = error
    else:
        caught = None
    assert caught is None or caught.hint


def one_key(value: bytes) -> bytes:
    """A file of no tensors and one key whose value is a list."""
    return b"GGUF\x03\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"k\x09\0\0\0" + value


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "GGUF_INVALID"),
        (b"GGUF", "GGUF_DAMAGED"),
        (b"GGML" + bytes(60), "GGUF_DAMAGED"),
        (b"GGUF\x01\0\0\0" + bytes(60), "GGUF_VERSION"),
        (b"GGUF\0\0\0\x03" + bytes(60), "GGUF_VERSION"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "GGUF_DAMAGED"),
        (one_key(b"\0\0\0\0" + (2**62).to_bytes(8, "little")), "GGUF_DAMAGED"),  # a list of 2**62 bytes
        (one_key(b"\x08\0\0\0" + (2**40).to_bytes(8, "little")), "GGUF_DAMAGED"),  # a list of 2**40 texts
        (one_key(b"\x09\0\0\0" + (2**40).to_bytes(8, "little")), "GGUF_DAMAGED"),  # a list of lists
        (b"GGUF\x03\0\0\0" + bytes(16), "GGUF_METADATA"),
    ],
)  # fmt: skip
def test_hostile_headers(data: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError) as caught:
        GgufModel(tmp_path / "x.gguf")
    assert caught.value.code == code


def test_a_tensor_beyond_the_end_is_named(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole[:-64])
    with pytest.raises(BadInputError, match=r"the data of tensor 'output_norm.weight' lies beyond its end"):
        GgufModel(tmp_path / "x.gguf")
