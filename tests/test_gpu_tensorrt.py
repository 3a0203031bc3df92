"""TensorRT engines on a GPU: the checks of ``test_tensorrt_runtime.py`` on real kernels, and what only a GPU has.

A CUDA graph must change nothing, compiled kernels must be kept, choices made on the GPU must be those of the CPU, and a
damaged plan must end in an error. Texts of different batch sizes come from different kernels: they may part where two
tokens are equally likely up to rounding, and only there.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import command
from tests.support_gpu import needs_gpu
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
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.generate import Request
from trtllm_cli.runtime.load import Execution, Loaded, load_checkpoint, load_engine
from trtllm_cli.runtime.sampling import Sampler, Sampling
from trtllm_cli.runtime.tensorrt import passes

pytestmark = [pytest.mark.gpu, needs_gpu]

#: of the norm of the logits: what rounding to the compute type explains (seen: up to 5.1e-3 and 2.8e-2 in single steps)
TOLERANCE = {"float16": 6e-3, "bfloat16": 4e-2}


class Pair:
    """A model as a TensorRT engine on the GPU, and as its checkpoint, which torch runs in float32 on the CPU."""

    def __init__(self, checkpoint: Artifact, engine: Artifact, graphs: bool = True) -> None:
        self.checkpoint, self.artifact = checkpoint, engine
        self.engine = load_engine(engine.path, how=Execution(graphs=graphs))
        self.source = load_checkpoint(checkpoint.path, CONTEXT, threads=2, slots=SLOTS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    kept: dict[tuple[str, str], Pair] = {}

    def pair(family: str = "llama", dtype: str = "float16") -> Pair:
        if (family, dtype) not in kept:
            directory = tmp_path_factory.mktemp(family)
            checkpoint = checkpoint_of(family_model(family), directory)
            kept[family, dtype] = Pair(checkpoint, engine_of(checkpoint, directory / "engine", dtype=dtype))
        return kept[family, dtype]

    yield pair
    for one in kept.values():
        one.engine.executor.close()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def part_at_a_tie(source: Loaded, prompt: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two greedy texts are equal or part where the model hardly prefers one token."""
    if one == other:
        return True
    place = next(i for i, (a, b) in enumerate(zip([*one, -1], [*other, -1])) if a != b)
    assert place < len(one) and place < len(other), "one text ended early"
    (logits,) = source.executor.forward([Segment(0, 0, [*prompt, *one[:place]])])
    gap = abs(float(logits[one[place]] - logits[other[place]]))
    return gap < 0.02 * float(np.abs(logits).max())


@pytest.mark.parametrize(("family", "dtype"), [*((family, "float16") for family in FAMILIES), ("llama", "bfloat16")])
def test_every_position_of_a_ragged_batch(pairs, family, dtype):
    pair = pairs(family, dtype)
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11, 1))]
    found, expected = (model.executor.forward(segments) for model in (pair.engine, pair.source))
    assert error(found, expected) < TOLERANCE[dtype]
    more = [Segment(slot, start, tokens(1, 9)) for slot, start in ((0, 13), (1, 9), (3, 1))]
    found, expected = (model.executor.forward(more) for model in (pair.engine, pair.source))
    assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_flight_batching_gives_each_request_the_text_it_gets_alone(pairs, family):
    pair = pairs(family)
    wanted = requests(11, least=5, step=3)
    together = texts(pair.engine, wanted)
    alone = [texts(pair.engine, [one])[0] for one in wanted]
    of_cpu = texts(pair.source, wanted)
    for request, one, other, third in zip(wanted, together, alone, of_cpu):
        assert part_at_a_tie(pair.source, request.tokens, one, other)
        assert part_at_a_tie(pair.source, request.tokens, one, third)
    same = sum(one == other for one, other in zip(together, alone))
    print(f"\n{family}: {same} of 11 texts identical alone and in flight")
    assert same > 5
    assert texts(pair.engine, wanted) == together, "the same requests again"


def test_with_one_generation_profile_texts_are_identical_alone_and_in_flight(pairs, tmp_path):
    """Then every step has the same shapes and kernels, however many sequences run."""
    checkpoint = pairs().checkpoint
    engine = engine_of(checkpoint, tmp_path / "engine", dtype="float16", generation_batches=(SLOTS,))
    model = load_engine(engine.path)
    wanted = requests(9, least=5, step=3)
    assert texts(model, wanted) == [texts(model, [one])[0] for one in wanted]
    model.executor.close()


def test_tokens_run_for_nobody_change_nothing(pairs):
    """Slots 1 and 2 get idle tokens, a full slot 3 none; afterwards they go on as on the CPU."""
    pair = pairs()
    both = pair.engine.executor, pair.source.executor
    for executor in both:
        executor.forward([Segment(slot, 0, tokens(10 + slot, slot)) for slot in range(3)])
        executor.forward([Segment(3, 0, tokens(CONTEXT, 3), "none")])
        for step in range(3):
            executor.forward([Segment(0, 10 + step, tokens(1, step)), Segment(2, 12 + step, tokens(1, step))])
    after = [Segment(1, 11, tokens(2, 8), "all"), Segment(3, CONTEXT - 1, tokens(1, 8))]
    found, expected = (executor.forward(after) for executor in both)
    assert error(found, expected) < TOLERANCE["float16"]


def test_prompts_and_scored_texts_in_pieces(pairs, monkeypatch, tmp_path):
    from trtllm_cli.build.tensorrt import network

    monkeypatch.setattr(network, "_CHUNK", 16)
    monkeypatch.setattr(network, "_ROWS", 8)
    checkpoint = pairs("mistral").checkpoint
    small = Pair(checkpoint, engine_of(checkpoint, tmp_path / "engine", dtype="float16"))
    for want in ("all", "last"):
        segments = [Segment(1, 0, tokens(50), want), Segment(2, 0, tokens(50)[:21], "last")]
        found, expected = (model.executor.forward(segments) for model in (small.engine, small.source))
        assert error(found, expected) < TOLERANCE["float16"]
    small.engine.executor.close()


def test_attention_walks_more_of_the_caches_as_a_sequence_grows(pairs, monkeypatch):
    """A windowed model whose sequences, beside a longer idle one, cross from one number of positions to the next."""
    monkeypatch.setattr(passes, "_LEAST_SEEN", 16)
    pair = pairs("mistral")
    both = pair.engine.executor, pair.source.executor
    for executor in both:
        executor.forward([Segment(0, 0, tokens(12)), Segment(1, 0, tokens(14, 1)), Segment(2, 0, tokens(40, 2))])
    for step in range(14):
        segments = [Segment(0, 12 + step, tokens(1, step)), Segment(1, 14 + step, tokens(1, step))]
        if step % 3 == 0:  # not idle
            segments.append(Segment(2, 40 + step // 3, tokens(1, step)))
        found, expected = (executor.forward(segments) for executor in both)
        assert error(found, expected) < TOLERANCE["float16"]
    # what idle tokens left behind must not show in a new, shorter sequence that walks over it
    found, expected = (executor.forward([Segment(2, 0, tokens(36, 3), "all")]) for executor in both)
    assert error(found, expected) < TOLERANCE["float16"]


def test_graphs_change_nothing(pairs):
    pair = pairs()
    eager = load_engine(pair.artifact.path, how=Execution(graphs=False))
    assert pair.engine.executor.describe()["graphs"] is True
    assert eager.executor.describe()["graphs"] is False
    both = pair.engine.executor, eager.executor
    for executor in both:
        executor.forward([Segment(slot, 0, tokens(9, slot)) for slot in range(SLOTS)])
    for step in range(6):
        for slots in ((0,), (0, 1, 2, 3), (2,)):
            segments = [Segment(slot, 9 + step, tokens(1, step)) for slot in slots]
            found, expected = (executor.forward(segments) for executor in both)
            np.testing.assert_array_equal(found, expected)
    eager.executor.close()


def test_choices_made_on_the_gpu_are_those_of_the_cpu(pairs):
    """The same logits, copied out and chosen from by numpy."""
    pair = pairs()
    executor = pair.engine.executor
    settings = [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=1),
        Sampling(temperature=1.5, min_p=0.02, repetition_penalty=1.1, seed=2),
    ]
    prompts = [tokens(9 + slot, slot) for slot in range(SLOTS)]
    ours, theirs = ([Sampler(one, 0, p.tolist()) for one, p in zip(settings, prompts)] for _ in range(2))
    segments = [Segment(slot, 0, prompt) for slot, prompt in enumerate(prompts)]
    for step in range(20):
        chosen = executor.choose(segments, ours)
        logits = executor.forward(segments)
        assert chosen == [sampler.choose(row) for sampler, row in zip(theirs, logits)]
        segments = [Segment(slot, len(prompts[slot]) + step, [token]) for slot, token in enumerate(chosen)]


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "w8a8-token", "fp8-static"])
def test_quantized_engines(tmp_path_factory, scheme):
    checkpoint = Checkpoints(tmp_path_factory)(scheme)
    engine = engine_of(checkpoint, tmp_path_factory.mktemp("engine") / "engine", dtype="bfloat16")
    pair = Pair(checkpoint, engine)
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11))]
    found, expected = (model.executor.forward(segments) for model in (pair.engine, pair.source))
    bound = {"w8a8-token": 0.1, "fp8-static": 0.25}.get(scheme, 4e-2)
    print(f"\n{scheme}: relative error {error(found, expected):.4f}")
    assert error(found, expected) < bound
    steps = [Segment(slot, size, tokens(1, slot)) for slot, size in enumerate((13, 9, 11))]
    found, expected = (model.executor.forward(steps) for model in (pair.engine, pair.source))
    assert error(found, expected) < bound
    pair.engine.executor.close()


def test_an_engine_whose_weights_are_inputs(pairs, tmp_path):
    pair = pairs("qwen2")
    engine = engine_of(pair.checkpoint, tmp_path / "engine", dtype="float16", weights_as_inputs=True)
    model = load_engine(engine.path)
    segments = [Segment(slot, 0, tokens(size, slot), "all") for slot, size in enumerate((13, 9, 11))]
    expected = pair.source.executor.forward(segments)
    assert error(model.executor.forward(segments), expected) < TOLERANCE["float16"]
    steps = [Segment(slot, size, tokens(1, slot)) for slot, size in enumerate((13, 9, 11))]
    for _ in range(3):  # the third is a graph
        found = model.executor.forward(steps)
    assert error(found, pair.source.executor.forward(steps)) < TOLERANCE["float16"]
    model.executor.close()


def test_compiled_kernels_are_kept_beside_the_engine(pairs, tmp_path):
    checkpoint = pairs().checkpoint
    engine = engine_of(checkpoint, tmp_path / "engine", dtype="float16", context=48)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model = load_engine(engine.path)
        first = texts(model, [Request(tokens=(5, 6, 7), max_new_tokens=3)])
        seconds.append(time.perf_counter() - started)
        kept = list((tmp_path / "engine.kernels").glob("*.bin"))
        assert [path.name.split("-")[0] for path in kept] == [engine.id[:12]]
        assert str(kept[0]) == model.executor.describe()["kernels"]
        model.executor.close()
    print(f"\nload and three tokens: {seconds[0]:.2f} s, with kept kernels {seconds[1]:.2f} s")
    content = kept[0].read_bytes()
    kept[0].write_bytes(content[: len(content) // 2])
    model = load_engine(engine.path)
    assert texts(model, [Request(tokens=(5, 6, 7), max_new_tokens=3)]) == first
    model.executor.close()
    assert len(kept[0].read_bytes()) > len(content) // 2


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_plan_with_damaged_bytes_is_told_before_tensorrt_reads_it(pairs, tmp_path, place):
    """In a process of its own: at some places TensorRT dies of a signal (seen of 1.6.1: at a tenth)."""
    engine = Path(shutil.copytree(pairs().artifact.path, tmp_path / "engine"))
    content = bytearray((engine / PLAN).read_bytes())
    at = int(place * len(content))
    content[at : at + 4096] = bytes(byte ^ 0xFF for byte in content[at : at + 4096])
    (engine / PLAN).write_bytes(content)
    done = command("run", engine, "--prompt", "The", "--max-new-tokens", "2")
    assert done.returncode == 3, done.stderr
    assert "error[PLAN_DAMAGED]" in done.stderr
    assert "Traceback" not in done.stderr
