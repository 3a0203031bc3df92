"""Models, tokenizers and artifacts that the evaluation tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.publish import Request, publish
from trtllm_cli.artifacts.schema import (
    EngineBody,
    EngineLimits,
    LayerQuantization,
    QuantizationRecord,
    TokenizerInfo,
    WeightScheme,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec
from trtllm_cli.runtime.executor import Logits, Segment
from trtllm_cli.runtime.load import Loaded
from trtllm_cli.runtime.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
CORPUS = (
    "The quick brown fox jumps over the lazy dog. A clever fox reads the whole library, and the lazy dog sleeps. "
    "Question: what does the dog do? Answer: it sleeps all day. The library has many books about brown dogs.\n"
) * 4


class Recording:
    """What every stand-in keeps: the tokens written to each slot, and the largest result it returned."""

    def __init__(self, vocab_size: int, context: int, slots: int) -> None:
        self.vocab_size, self.context, self.slots = vocab_size, context, slots
        self.cache: dict[int, list[int]] = {}
        self.largest = 0
        self.calls = 0
        self.closed = False

    def logits(self, tokens: list[int]) -> Logits:
        raise NotImplementedError

    def forward(self, segments: Sequence[Segment]) -> Logits:
        self.calls += 1
        assert segments
        assert len({segment.slot for segment in segments}) == len(segments)
        rows = [np.empty((0, self.vocab_size), np.float32)]
        for segment in segments:
            written = self.cache.get(segment.slot, [])
            new = [int(token) for token in segment.tokens]
            assert new
            assert 0 <= segment.slot < self.slots
            assert segment.start <= len(written), "a gap in the cache"
            assert segment.start + len(new) <= self.context
            self.cache[segment.slot] = written[: segment.start] + new
            if segment.want != "none":
                every = self.logits(self.cache[segment.slot])
                rows.append(every[-1:] if segment.want == "last" else every[segment.start :])
        found = np.concatenate(rows)
        self.largest = max(self.largest, len(found))
        return found

    def describe(self) -> dict[str, Any]:
        return {"executor": "stand-in", "threads": 1}

    def close(self) -> None:
        self.closed = True


class Bigram(Recording):
    """The next token depends on the latest one: logits are rows of a random table."""

    def __init__(
        self, vocab_size: int = 64, seed: int = 0, context: int = 64, slots: int = 1, noise: float = 0
    ) -> None:
        super().__init__(vocab_size, context, slots)
        self.table = np.random.default_rng(seed).normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)
        self.table += noise * np.random.default_rng(99).normal(0, 1, self.table.shape).astype(np.float32)

    def logits(self, tokens: list[int]) -> Logits:
        return self.table[tokens]


class TinyLlama(Recording):
    """A random Llama of the transformers library, always run over the whole sequence."""

    def __init__(self, vocab_size: int, seed: int = 0, context: int = 64, slots: int = 1) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__(vocab_size, context, slots)
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5,
            )
        ).eval()  # fmt: skip

    def logits(self, tokens: list[int]) -> Logits:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model only waits for other threads
        with torch.no_grad():
            found: Logits = self.model(torch.tensor([tokens])).logits[0].float().numpy()
        torch.set_num_threads(threads)
        return found


def make_tokenizer(directory: Path, vocab_size: int = 300, bos: bool = False) -> Tokenizer:
    """A small byte-level BPE tokenizer, trained on CORPUS."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([CORPUS], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory, tokenizer_info(fast.get_vocab_size(), bos))


def tokenizer_info(vocab_size: int, bos: bool = False) -> TokenizerInfo:
    return TokenizerInfo(
        vocab_size=vocab_size, bos_id=0 if bos else None, eos_ids=(0,), bos_token="<s>" if bos else None
    )


def make_spec(vocab_size: int, tie: bool = True) -> DecoderSpec:
    return DecoderSpec(
        family="llama", vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=64, max_positions=128, norm=NormSpec(eps=1e-6), activation="silu",
        rotary=RotarySpec(theta=10000.0, dim=8), tie_embeddings=tie, windows=(None, None),
    )  # fmt: skip


def make_engine(path: Path, tokenizer: Tokenizer, spec: DecoderSpec, method: str | None = "rtn") -> Artifact:
    """A published engine artifact with everything but weights."""
    modules = [name for layer in range(spec.num_layers) for name in spec.layer_linears(layer)]
    scheme = WeightScheme(type="int4", granularity="group", group_size=32, symmetric=False)
    layers = tuple(
        LayerQuantization(module=name, scheme=scheme, relative_error=0.01 * (i + 1), max_error=0.1)
        for i, name in enumerate(modules)
    )
    record = (
        QuantizationRecord(method=method, parameters={"bits": 4}, layers=layers, bits_per_weight=4.5)
        if method
        else None
    )
    body = EngineBody(
        backend="cpu", executor="native", spec=spec, dtype="bfloat16", tokenizer=tokenizer.info, quantization=record,
        limits=EngineLimits(context=64, concurrency=1, weight_bytes=1_000_000, cache_bytes=0, scratch_bytes=0),
    )  # fmt: skip
    request = Request("engine", "build", Configured(StageOptions()), identity={"name": path.name})
    with publish(path, request) as work:
        work.file("weights.bin").write_bytes(b"weights of " + path.name.encode())
        return work.complete(body)


def make_loaded(path: Path, executor: Recording, tokenizer: Tokenizer, method: str | None = "rtn") -> Loaded:
    artifact = make_engine(path, tokenizer, make_spec(executor.vocab_size), method)
    return Loaded(path.name, artifact, executor, tokenizer, 0.25)
