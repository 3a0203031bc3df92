"""TensorRT engines of every family through the runtime, by the reference executor: logits, texts and batching.

Only the kernels are not those of a GPU; ``test_gpu_tensorrt.py`` repeats the checks there.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import raises
from tests.support_tensorrt_quantized import Checkpoints
from tests.support_tensorrt_runtime import (
    CONTEXT,
    FAMILIES,
    SLOTS,
    checkpoint_of,
    engine_of,
    family_model,
    requests,
    texts,
    tokens,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.evaluate.stage import decode_weight_bytes
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.executor import ChoosingExecutor
from trtllm_cli.runtime.load import Execution, load_checkpoint, load_engine
from trtllm_cli.runtime.sampling import Sampler, Sampling
from trtllm_cli.runtime.tensorrt import passes

REFERENCE = Execution("reference")


class Pair:
    """One model as a TensorRT engine and as its checkpoint, which torch runs."""

    def __init__(self, checkpoint: Artifact, engine: Artifact) -> None:
        self.engine = load_engine(engine.path, threads=1, how=Execution("reference", checkpoint.path))
        self.source = load_checkpoint(checkpoint.path, CONTEXT, threads=1, slots=SLOTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    kept: dict[str, tuple[Artifact, Artifact]] = {}

    def make(family: str) -> tuple[Artifact, Artifact]:
        if family not in kept:
            directory = tmp_path_factory.mktemp(family)
            checkpoint = checkpoint_of(family_model(family), directory)
            kept[family] = checkpoint, engine_of(checkpoint, directory / "engine")
        return kept[family]

    return make


@pytest.fixture(scope="module")
def pairs(made):
    kept: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in kept:
            kept[family] = Pair(*made(family))
        return kept[family]

    return pair


@pytest.fixture
def pair(pairs, request):
    """Shared by the tests: what earlier ones left in the caches must not matter."""
    return pairs(getattr(request, "param", "llama"))


@pytest.fixture(autouse=True)
def short_reach(monkeypatch):
    """Attention walks fewer positions than these small caches have, and ever more of them as sequences grow."""
    monkeypatch.setattr(passes, "_LEAST_SEEN", 8)


each_family = pytest.mark.parametrize("pair", FAMILIES, indirect=True)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@each_family
def test_every_position_of_a_ragged_batch(pair):
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11, 1))]
    assert_close(pair.engine.executor.forward(segments), pair.source.executor.forward(segments))
    more = [Segment(slot, start, tokens(1, 9)) for slot, start in ((0, 13), (1, 9), (3, 1))]
    assert_close(pair.engine.executor.forward(more), pair.source.executor.forward(more))


@each_family
def test_in_flight_batching_gives_each_request_the_text_it_gets_alone(pair):
    """Nine requests share four slots: prompts run into freed slots while others generate."""
    wanted = requests(9)
    together = texts(pair.engine, wanted)
    assert together == texts(pair.source, wanted)
    assert together == [texts(pair.engine, [one])[0] for one in wanted]
    assert len(set(together)) > 6


def test_a_sampled_text_is_that_of_the_cpu(pair):
    sampling = Sampling(temperature=1.3, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7)
    wanted = requests(9, sampling=sampling)
    assert texts(pair.engine, wanted) == texts(pair.source, wanted) == texts(pair.engine, wanted[::-1])[::-1]


def test_a_text_longer_than_a_pass_returns_rows_of(made, monkeypatch, tmp_path):
    """With passes of 16 tokens and 8 rows, prompts and scored texts go in pieces."""
    from trtllm_cli.build.tensorrt import network

    monkeypatch.setattr(network, "_CHUNK", 16)
    monkeypatch.setattr(network, "_ROWS", 8)
    checkpoint, _ = made("mistral")
    small = Pair(checkpoint, engine_of(checkpoint, tmp_path / "engine"))
    text = tokens(50)
    for want in ("all", "last"):
        segments = [Segment(1, 0, text, want), Segment(2, 0, text[:21], "last")]
        assert_close(small.engine.executor.forward(segments), small.source.executor.forward(segments))
    wanted = requests(6)
    assert texts(small.engine, wanted) == texts(small.source, wanted)


def test_tokens_run_for_nobody_change_nothing(pair):
    """Steps of slots 0 and 3 run idle tokens in 1 and 2, which go on afterwards as if nothing had been."""
    both = pair.engine.executor, pair.source.executor
    for executor in both:
        executor.forward([Segment(slot, 0, tokens(10 + slot, slot)) for slot in range(4)])
        for step in range(3):
            executor.forward([Segment(0, 10 + step, tokens(1, step)), Segment(3, 13 + step, tokens(1, step))])
    after = [Segment(1, 11, tokens(2, 8), "all"), Segment(2, 12, tokens(1, 8))]
    assert_close(both[0].forward(after), both[1].forward(after))


@pytest.mark.parametrize("pair", ["mistral"], indirect=True)
def test_attention_walks_more_of_the_caches_as_a_sequence_grows(pair):
    """Windowed sequences, beside a longer idle one, cross from one number of positions to the next."""
    both = pair.engine.executor, pair.source.executor
    for executor in both:
        executor.forward([Segment(0, 0, tokens(5)), Segment(1, 0, tokens(7, 1)), Segment(2, 0, tokens(40, 2))])
    for step in range(9):
        segments = [Segment(0, 5 + step, tokens(1, step)), Segment(1, 7 + step, tokens(1, step))]
        if step % 3 == 0:  # not idle
            segments.append(Segment(2, 40 + step // 3, tokens(1, step)))
        assert_close(both[0].forward(segments), both[1].forward(segments))
    # what idle tokens left behind must not show in a new, shorter sequence that walks over it
    again = [Segment(2, 0, tokens(36, 3), "all")]
    assert_close(both[0].forward(again), both[1].forward(again))


def test_a_full_slot_between_two_others(pair):
    both = pair.engine.executor, pair.source.executor
    for executor in both:
        executor.forward([Segment(0, 0, tokens(5)), Segment(1, 0, tokens(CONTEXT)), Segment(2, 0, tokens(7))])
    after = [Segment(0, 5, tokens(1, 1)), Segment(2, 7, tokens(1, 1))]
    assert_close(both[0].forward(after), both[1].forward(after))
    last = [Segment(1, CONTEXT - 1, tokens(CONTEXT)[-1:])]
    assert_close(both[0].forward(last), both[1].forward(last))


def test_nothing_is_returned_of_a_segment_that_wants_nothing(pair):
    assert pair.engine.executor.forward([Segment(0, 0, tokens(5), "none")]).shape == (0, 320)
    rows = pair.engine.executor.forward([Segment(0, 5, tokens(3), "none"), Segment(1, 0, tokens(4))])
    assert rows.shape == (1, 320)


def test_wrong_segments_are_refused(pair):
    executor = pair.engine.executor
    with raises("CONTEXT_EXCEEDED", 5, str(CONTEXT)):
        executor.forward([Segment(0, 60, tokens(5))])
    with pytest.raises(Exception, match="SLOT_INVALID"):
        executor.forward([Segment(SLOTS, 0, tokens(5))])


def test_numbers_that_are_not_finite_end_in_an_error_and_leave_nothing_behind(made):
    checkpoint, engine = made("llama")
    fresh = Pair(checkpoint, engine).engine
    (expected,) = texts(fresh, requests(1))
    executor = fresh.executor
    executor.forward([Segment(0, 0, tokens(5))])
    for cache in executor._caches.values():
        cache[0, :, 2] = float("nan")
    with raises("LOGITS_NOT_FINITE", 3, "NaN"):
        executor.choose([Segment(0, 5, tokens(1))], [Sampler(Sampling(), 0, ())])
    assert texts(fresh, requests(1)) == [expected]


def test_the_engine_says_how_it_runs(pair):
    described = pair.engine.executor.describe()
    assert described["executor"] == "reference"
    assert described["graphs"] is False
    assert isinstance(pair.engine.executor, ChoosingExecutor)


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 2e-5), ("int4-g64", 2e-5), ("w8a8-token", 2e-2)])
def test_a_quantized_engine_computes_what_its_checkpoint_says(tmp_path_factory, scheme, tolerance):
    checkpoints = Checkpoints(tmp_path_factory)
    checkpoint = checkpoints(scheme)
    quantized = Pair(checkpoint, engine_of(checkpoint, tmp_path_factory.mktemp("engine") / "engine"))
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11))]
    found, expected = (one.executor.forward(segments) for one in (quantized.engine, quantized.source))
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    dense = load_checkpoint(checkpoints.dense().path, CONTEXT, slots=SLOTS).executor.forward(segments)
    assert np.linalg.norm(found - dense) > 10 * np.linalg.norm(found - expected)


def test_an_engine_whose_weights_are_inputs_brings_them(made, tmp_path):
    """The same plan takes other weights: it runs without the checkpoint it was built from."""
    checkpoint, engine = made("qwen2")
    inputs = engine_of(checkpoint, tmp_path / "engine", weights_as_inputs=True)
    loaded = load_engine(inputs.path, threads=1, how=Execution("reference"))
    expected = load_engine(engine.path, threads=1, how=Execution("reference", checkpoint.path))
    assert texts(loaded, requests(5)) == texts(expected, requests(5))


def test_fp8_attention_departs_by_its_rounding(made, tmp_path):
    checkpoint, _ = made("llama")
    narrow = Pair(checkpoint, engine_of(checkpoint, tmp_path / "engine", dtype="bfloat16", fp8_attention=True))
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11))]
    found, expected = (one.executor.forward(segments) for one in (narrow.engine, narrow.source))
    assert 1e-2 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.15


@pytest.mark.parametrize("scheme", ["int8", "mixed"])
def test_a_step_reads_each_weight_once(tmp_path_factory, scheme):
    """As many bytes as the checkpoint holds, but for the embedding table."""
    checkpoints = Checkpoints(tmp_path_factory)
    for checkpoint in (checkpoints.dense(), checkpoints(scheme)):
        body = checkpoint.checkpoint
        engine = engine_of(checkpoint, tmp_path_factory.mktemp("engine") / "engine", dtype="float32")
        found = decode_weight_bytes(load_engine(engine.path, threads=1, how=Execution("reference", checkpoint.path)))
        embedding = body.spec.vocab_size * body.spec.hidden_size * 4
        if body.quantization and any(layer.module == "embed" for layer in body.quantization.layers):
            embedding = body.spec.vocab_size * (body.spec.hidden_size + 4)
        # scales of int4 groups are float16 in the checkpoint, and have the compute type here
        rounding = 0.0 if body.quantization is None or scheme == "int8" else 0.01
        assert found == pytest.approx(body.weight_bytes - embedding, rel=rounding, abs=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_caches_and_logits(made, tmp_path, dtype):
    checkpoint, _ = made("qwen3")
    narrow = Pair(checkpoint, engine_of(checkpoint, tmp_path / "engine", dtype=dtype))
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11))]
    found, expected = (one.executor.forward(segments) for one in (narrow.engine, narrow.source))
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < {"float16": 5e-3, "bfloat16": 4e-2}[dtype]
