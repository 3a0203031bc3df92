"""Whole models through the native library against Hugging Face implementations with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError, DoesNotFitError
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotaryScaling, RotarySpec
from trtllm_cli.ops.native import library
from trtllm_cli.ops.native.model import NativeModel, Segment
from trtllm_cli.ops.native.packing import PackedModule, pack_module, pack_vector
from trtllm_cli.ops.native.plan import Plan, record

pytestmark = pytest.mark.skipif(library.find_problem() is not None, reason=str(library.find_problem()))

VOCAB = 203


def published(kind: str) -> tuple[Any, DecoderSpec]:
    """A tiny random Hugging Face model and the spec that describes it."""
    import transformers as t

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 3,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.25,
        "attn_implementation": "eager",
    }
    llama3 = RotaryScaling(
        kind="llama3", factor=8.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0
    )
    config: Any
    sizes: dict[str, Any]
    if kind == "llama":  # grouped queries, a head size that is no multiple of sixteen, llama3 scaling
        sizes = {"hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        config = t.LlamaConfig(**common, **sizes, intermediate_size=112, rope_parameters=rope)
        model = t.LlamaForCausalLM(config)
    elif kind == "qwen2":  # biases, tied embeddings, seven query heads on one key head
        sizes = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
        config = t.Qwen2Config(**common, **sizes, intermediate_size=96, tie_word_embeddings=True)
        model = t.Qwen2ForCausalLM(config)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.3)
    elif kind == "qwen3":  # head norms, heads wider than hidden / heads
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
        config = t.Qwen3Config(**common, **sizes, intermediate_size=160)
        model = t.Qwen3ForCausalLM(config)
        for name, p in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(p, 0.5, 1.5)
    else:  # a sliding window in every layer, gelu
        sizes = {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80}
        config = t.MistralConfig(**common, **sizes, intermediate_size=72, sliding_window=24, hidden_act="gelu")
        model = t.MistralForCausalLM(config)
    model.eval()
    heads = sizes["num_attention_heads"]
    head_dim = sizes.get("head_dim", sizes["hidden_size"] // heads)
    theta = config.rope_parameters["rope_theta"]
    spec = DecoderSpec(
        family=kind,
        vocab_size=VOCAB,
        hidden_size=sizes["hidden_size"],
        num_layers=3,
        num_heads=heads,
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        max_positions=4096,
        norm=NormSpec(eps=1e-5),
        activation="gelu" if kind == "mistral" else "silu",
        rotary=RotarySpec(theta=theta, dim=head_dim, scaling=llama3 if kind == "llama" else None),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_embeddings=kind == "qwen2",
        windows=(24 if kind == "mistral" else None,) * 3,
    )
    return model, spec


def canonical(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in (
        ("embed_tokens", "embed"),
        ("self_attn.", "attn."),
        ("_proj", ""),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        name = name.replace(old, new)
    return name


def pack_model(weights: dict[str, NDArray[Any]], plan: Plan) -> tuple[dict[str, PackedModule], dict[str, NDArray[Any]]]:
    modules: dict[str, PackedModule] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name in plan.matrices:
        modules[name], packed = pack_module(
            name, "float32", weights[f"{name}.weight"], bias=weights.get(f"{name}.bias")
        )
        tensors.update(packed)
    for name in plan.vectors:
        tensors.update(pack_vector(name, weights[f"{name}.weight"]))
    return modules, tensors


class Pair:
    """A published model and its packed counterpart."""

    def __init__(self, kind: str) -> None:
        self.reference, self.spec = published(kind)
        self.plan = Plan.model_validate_json(record(self.spec).model_dump_json())
        weights = {canonical(k): v.detach().numpy() for k, v in self.reference.state_dict().items()}
        self.modules, self.tensors = pack_model(weights, self.plan)

    def native(self, **options: Any) -> NativeModel:
        settings = {"context": 256, "slots": 4, "gemm": "float32", "kv_dtype": "float32", **options}
        return NativeModel(self.plan, self.modules, self.tensors, **settings)

    def expected(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = (
                self.reference(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
            )
        return logits


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def llama() -> Pair:
    return Pair("llama")


def prompts(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(42)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


def close(got: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    scale = np.abs(expected).max()
    assert np.abs(got - expected).max() <= tolerance * max(scale, 1), np.abs(got - expected).max() / scale


def similar(got: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    """Relative error over all elements: single logits of random models jump where attention is nearly tied."""
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def test_prefill(pair: Pair) -> None:
    (tokens,) = prompts(150)
    expected = pair.expected(tokens)
    for threads in (1, 3):
        with pair.native(threads=threads) as model:
            model.poison()
            close(model.forward([Segment(0, 0, tokens, "all")]), expected)
            close(model.forward([Segment(1, 0, tokens)]), expected[-1:])
            assert model.lengths.tolist() == [150, 150, 0, 0]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_any_size(pair: Pair, chunk: int) -> None:
    (tokens,) = prompts(150)
    with pair.native(chunk=chunk, threads=2) as model:
        model.poison()
        close(model.forward([Segment(2, 0, tokens, "all")]), pair.expected(tokens))


def test_ragged_batches_of_prompts_and_tokens(pair: Pair) -> None:
    a, b, c = prompts(90, 130, 70)
    ea, eb, ec = (pair.expected(t) for t in (a, b, c))
    with pair.native(threads=2, chunk=50) as model:
        model.poison()
        got = model.forward([Segment(3, 0, a[:60], "none"), Segment(0, 0, b[:33], "all"), Segment(1, 0, c[:1], "last")])
        close(got, np.concatenate([eb[:33], ec[:1]]))
        got = model.forward(
            [Segment(1, 1, c[1:40], "last"), Segment(3, 60, a[60:61], "last"), Segment(0, 33, b[33:35], "all")]
        )
        close(got, np.concatenate([ec[39:40], ea[60:61], eb[33:35]]))
        for step in range(20):  # decoding three sequences at different positions
            i, j, k = 61 + step, 35 + step, 40 + step
            got = model.forward([Segment(3, i, a[i : i + 1]), Segment(0, j, b[j : j + 1]), Segment(1, k, c[k : k + 1])])
            close(got, np.stack([ea[i], eb[j], ec[k]]))
        # going back forgets what was beyond
        close(model.forward([Segment(0, 10, b[10:12], "all")]), eb[10:12])
        assert model.lengths[0] == 12


def test_long_contexts_are_combined_from_chunks(pair: Pair) -> None:
    (tokens,) = prompts(2100)
    expected = pair.expected(tokens)
    with pair.native(threads=2, context=2100, slots=2) as model:
        model.forward([Segment(1, 0, tokens[:2090], "none")])
        for i in range(2090, 2100):
            close(model.forward([Segment(1, i, tokens[i : i + 1])]), expected[i : i + 1])


def test_half_precision_modes_stay_close(pair: Pair) -> None:
    (tokens,) = prompts(120)
    expected = pair.expected(tokens)
    with pair.native(gemm="bfloat16", kv_dtype="float16", threads=2) as model:
        similar(model.forward([Segment(0, 0, tokens[:100], "all")]), expected[:100], 0.1)
        similar(model.forward([Segment(0, 100, tokens[100:101])]), expected[100:101], 0.1)
    with pair.native(gemm="float32", kv_dtype="float16", threads=2) as model:
        similar(model.forward([Segment(0, 0, tokens[:100], "all")]), expected[:100], 5e-3)
        similar(model.forward([Segment(0, 100, tokens[100:101])]), expected[100:101], 5e-3)


def test_without_avx512(pair: Pair) -> None:
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    (tokens,) = prompts(40)
    expected = pair.expected(tokens)
    for arch in ("x86-64-v2", "x86-64-v3"):
        with pair.native(native=library.load(arch), threads=2) as model:
            close(model.forward([Segment(0, 0, tokens[:39], "all")]), expected[:39])
            close(model.forward([Segment(0, 39, tokens[39:])]), expected[39:])


def runs(model: NativeModel, tokens: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
    yield model.forward([Segment(0, 0, tokens[:100], "all")])
    for i in range(100, 110):
        yield model.forward([Segment(0, i, tokens[i : i + 1])])


def test_same_bits_for_every_run_and_thread_count(llama: Pair) -> None:
    (tokens,) = prompts(110)
    results = []
    for threads in (1, 2, 2, 5):
        with llama.native(threads=threads, gemm="bfloat16", kv_dtype="float16") as model:
            results.append(np.concatenate(list(runs(model, tokens))))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


def test_decoding_does_not_depend_on_the_batch(llama: Pair) -> None:
    a, b = prompts(60, 50)
    with llama.native(threads=2) as model:
        alone = []
        model.forward([Segment(0, 0, a[:40], "none")])
        for i in range(40, 50):
            alone.append(model.forward([Segment(0, i, a[i : i + 1])]))
        model.forward([Segment(1, 0, b[:30], "none")])
        for n, i in enumerate(range(40, 50)):
            got = model.forward([Segment(1, 30 + n, b[30 + n : 31 + n]), Segment(0, i, a[i : i + 1])])
            assert np.array_equal(got[1:], alone[n])


def test_larger_batches_give_the_same_bits_too(llama: Pair) -> None:
    sequences = prompts(*[30] * 9)
    with llama.native(threads=2, slots=9, gemm="bfloat16") as model:
        got = []
        for size in (5, 9):
            for slot in range(9):
                model.forward([Segment(slot, 0, sequences[slot][:29], "none")])
            got.append(model.forward([Segment(slot, 29, sequences[slot][29:]) for slot in range(size)]))
        assert np.array_equal(got[0], got[1][:5])


def test_a_slot_can_be_copied(llama: Pair) -> None:
    (tokens,) = prompts(60)
    with llama.native(threads=2) as model:
        model.forward([Segment(0, 0, tokens[:50], "none")])
        model.copy_slot(0, 2, 37)
        assert model.lengths.tolist() == [50, 0, 37, 0]
        close(model.forward([Segment(2, 37, tokens[37:], "all")]), llama.expected(tokens)[37:])


def test_a_fork_can_run_the_model(llama: Pair) -> None:
    import multiprocessing

    (tokens,) = prompts(20)
    with llama.native(threads=2) as model:
        before = model.forward([Segment(0, 0, tokens)])
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(model.forward([Segment(0, 0, tokens)]).tobytes()))
        child.start()
        assert queue.get() == before.tobytes()
        child.join(20)
        assert child.exitcode == 0
        assert np.array_equal(model.forward([Segment(0, 0, tokens)]), before)


def test_an_output_buffer_is_used(llama: Pair) -> None:
    (tokens,) = prompts(12)
    with llama.native() as model:
        out = np.empty((12, VOCAB), np.float32)
        assert model.forward([Segment(0, 0, tokens, "all")], out=out) is out
        close(out, llama.expected(tokens))
        with pytest.raises(BadInputError, match="OUTPUT_SHAPE"):
            model.forward([Segment(0, 0, tokens, "last")], out=out)
        assert model.forward([Segment(0, 0, tokens, "none")]).shape == (0, VOCAB)
        assert model.forward([]).shape == (0, VOCAB)


@pytest.mark.parametrize(
    "segments,code",
    [
        ([Segment(0, 0, [VOCAB])], "TOKEN_OUT_OF_RANGE"),
        ([Segment(0, 0, [-1])], "TOKEN_OUT_OF_RANGE"),
        ([Segment(0, 0, [2**40])], "TOKEN_OUT_OF_RANGE"),
        ([Segment(4, 0, [1])], "SLOT_OUT_OF_RANGE"),
        ([Segment(-1, 0, [1])], "SLOT_OUT_OF_RANGE"),
        ([Segment(0, 0, [1]), Segment(0, 0, [1])], "SLOT_REPEATED"),
        ([Segment(0, 0, [])], "SEGMENT_EMPTY"),
        ([Segment(0, 1, [1])], "POSITION_GAP"),
        ([Segment(0, -1, [1])], "POSITION_GAP"),
        ([Segment(0, 0, [[1]])], "TOKENS_SHAPE"),
        ([Segment(0, 0, [1.5])], "TOKENS_SHAPE"),
    ],
)
def test_bad_segments(llama: Pair, segments: list[Segment], code: str) -> None:
    with llama.native() as model:
        with pytest.raises(BadInputError) as caught:
            model.forward(segments)
        assert caught.value.code == code
        assert model.lengths.tolist() == [0] * 4


def test_context_is_a_limit(llama: Pair) -> None:
    with llama.native(context=40) as model:
        model.forward([Segment(0, 0, [1] * 40, "none")])
        with pytest.raises(DoesNotFitError, match="CONTEXT_EXCEEDED"):
            model.forward([Segment(0, 40, [1])])
        with pytest.raises(DoesNotFitError, match="CONTEXT_EXCEEDED"):
            model.forward([Segment(1, 0, [1] * 41)])
    with pytest.raises(DoesNotFitError, match="CONTEXT_TOO_LONG"):
        llama.native(context=5000)


def test_damaged_engines(llama: Pair) -> None:
    tensors = dict(llama.tensors)
    del tensors["layers.1.attn.q.packed"]
    with pytest.raises(BadInputError, match=r"ENGINE_TENSOR_MISSING.*layers.1.attn.q.packed"):
        NativeModel(llama.plan, llama.modules, tensors, context=32)
    tensors["layers.1.attn.q.packed"] = llama.tensors["layers.1.attn.q.packed"][:-16]
    with pytest.raises(BadInputError, match="ENGINE_TENSOR_SHAPE"):
        NativeModel(llama.plan, llama.modules, tensors, context=32)
    modules = {k: v for k, v in llama.modules.items() if k != "lm_head"}
    with pytest.raises(BadInputError, match=r"ENGINE_MODULE_MISSING.*lm_head"):
        NativeModel(llama.plan, modules, llama.tensors, context=32)


def test_plans_repeat_and_round_trip(llama: Pair) -> None:
    plan = record(llama.spec)
    assert plan == record(llama.spec) == Plan.model_validate_json(plan.model_dump_json())
    with pytest.raises(ValueError, match="extra"):
        Plan.model_validate({**plan.model_dump(), "colour": "red"})


def test_the_runtime_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trtllm_cli.ops.native.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
