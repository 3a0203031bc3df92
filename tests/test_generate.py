"""Generation: token for token what transformers makes, independent of neighbours, and every way to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support_artifacts import build_to, copy_of, raises, text_model
from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.runtime.executor import Segment
from trtllm_cli.runtime.generate import Completion, Request, generate
from trtllm_cli.runtime.load import Loaded, load_checkpoint, load_engine
from trtllm_cli.runtime.sampling import Sampling
from trtllm_cli.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["torch", "native"])
def model(request, torch_engine, native_engine):
    loaded = load_engine({"torch": torch_engine, "native": native_engine}[request.param].path, threads=1)
    yield loaded
    loaded.executor.close()


@pytest.fixture(scope="module")
def published():
    return text_model()


def prompts(model: Loaded, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(t) for t in rng.integers(2, 300, rng.integers(1, 30))) for _ in range(count)]


def greedy(published: Any, prompt: Sequence[int], new: int, eos: int | None = 1) -> list[int]:
    """What transformers continues with, its end token left out."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = published.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=eos,
            pad_token_id=0,
        )
    found = out[0, len(prompt) :].tolist()
    return found[:-1] if eos is not None and found[-1:] == [eos] else found


def test_greedy_text_is_that_of_transformers(model, published):
    """Eleven ragged prompts through four slots, each with its own length."""
    requests = [Request(tokens=p, max_new_tokens=5 + 3 * i) for i, p in enumerate(prompts(model, 11))]
    done = generate(model.executor, model.tokenizer, requests)
    assert len(done) == 11
    for request, completion in zip(requests, done):
        assert list(completion.tokens) == greedy(published, request.tokens, request.max_new_tokens)
        assert completion.text == model.tokenizer.decode(completion.tokens)
        assert completion.prompt_tokens == len(request.tokens)
        assert completion.finish_reason in ("length", "eos")
        assert 0 < completion.first_token_s <= completion.total_s


def test_a_checkpoint_continues_as_its_engine(model, text_checkpoint):
    loaded = load_checkpoint(text_checkpoint.path, context=64)
    request = Request(tokens=prompts(model, 1)[0], max_new_tokens=12)
    (ours,) = generate(loaded.executor, loaded.tokenizer, [request])
    (engine,) = generate(model.executor, model.tokenizer, [request])
    assert ours.tokens == engine.tokens


def test_a_sampled_text_is_the_same_alone_and_in_any_batch(model):
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=7)
    requests = [Request(tokens=p, max_new_tokens=12, sampling=sampling) for p in prompts(model, 9, seed=1)]
    together = generate(model.executor, model.tokenizer, requests)
    backwards = generate(model.executor, model.tokenizer, requests[::-1])[::-1]
    for request, in_batch, other in zip(requests, together, backwards):
        (alone,) = generate(model.executor, model.tokenizer, [request])
        assert alone.tokens == in_batch.tokens == other.tokens
    reseeded = [r.model_copy(update={"sampling": sampling.model_copy(update={"seed": 8})}) for r in requests]
    assert [c.tokens for c in generate(model.executor, model.tokenizer, reseeded)] != [c.tokens for c in together]


def test_equal_requests_of_one_call_differ(model):
    request = Request(tokens=prompts(model, 1)[0], max_new_tokens=12, sampling=Sampling(temperature=1.5, seed=7))
    done = generate(model.executor, model.tokenizer, [request] * 6)
    assert len({completion.tokens for completion in done}) == 6
    assert [c.tokens for c in generate(model.executor, model.tokenizer, [request] * 6)] == [c.tokens for c in done]


class Scripted:
    """An executor that emits a given text whatever it is fed; slots and positions are checked."""

    def __init__(self, tokens: Sequence[int], context: int = 64, slots: int = 2, vocab_size: int = 320) -> None:
        self.script, self.context, self.slots, self.vocab_size = list(tokens), context, slots, vocab_size
        self.lengths: dict[int, int] = {}
        self.prompt: dict[int, int] = {}

    def forward(self, segments: Sequence[Segment]) -> np.ndarray:
        rows = []
        for segment in segments:
            assert 0 <= segment.slot < self.slots
            if segment.start == 0:
                self.prompt[segment.slot] = len(segment.tokens)
            else:
                assert segment.start == self.lengths[segment.slot]
            self.lengths[segment.slot] = segment.start + len(segment.tokens)
            assert self.lengths[segment.slot] <= self.context
            row = np.zeros(self.vocab_size, np.float32)
            row[self.script[self.lengths[segment.slot] - self.prompt[segment.slot]]] = 1
            rows.append(row)
        return np.stack(rows)

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(torch_engine) -> Tokenizer:
    info = torch_engine.engine.tokenizer
    assert isinstance(info, TokenizerInfo)
    return Tokenizer(torch_engine.path, info)


def scripted(tokenizer: Tokenizer, text: str, *, tail: int = 1, **options: Any) -> tuple[Completion, str]:
    """The completion of a model that would say ``text`` and then the end token, and what was streamed of it."""
    ids = [*tokenizer.encode(text, special=False), *[tail] * 300]
    context = options.pop("context", 256)
    shown: list[str] = []
    request = Request(tokens=(5, 6, 7), **{"max_new_tokens": 200, **options})
    executor = Scripted(ids, context)
    (done,) = generate(executor, tokenizer, [request], lambda index, piece: shown.append(piece))
    assert all(shown)
    return done, "".join(shown)


def test_eos_ends_and_is_not_shown(tokenizer):
    done, shown = scripted(tokenizer, "the lazy dog")
    assert (done.text, done.finish_reason, shown) == ("the lazy dog", "eos", "the lazy dog")
    assert 1 not in done.tokens


def test_ignoring_eos_goes_on_to_the_length(tokenizer):
    done, shown = scripted(tokenizer, "the dog", ignore_eos=True, max_new_tokens=20)
    assert done.finish_reason == "length"
    assert len(done.tokens) == 20
    assert done.tokens[-1] == 1
    assert shown == done.text == "the dog"


def test_the_length_counts_new_tokens(tokenizer):
    done, _ = scripted(tokenizer, "the lazy dog and the quick brown fox", max_new_tokens=3)
    assert (len(done.tokens), done.finish_reason) == (3, "length")
    done, _ = scripted(tokenizer, "the", max_new_tokens=1)
    assert len(done.tokens) == 1


@pytest.mark.parametrize("context", [3, 4, 10])
def test_a_full_context_ends(tokenizer, context):
    done, shown = scripted(tokenizer, "a b c d e f g h i j k l m n o p", context=context)
    assert done.finish_reason == "context"
    # every token but the newest has a place in the cache
    assert 3 + len(done.tokens) == context + 1
    assert shown == done.text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the lazy dog sleeps", ("dog",), "the lazy "),
        ("the lazy dog sleeps", ("zy d",), "the la"),
        ("the lazy dog sleeps", ("s", "dog"), "the lazy "),
        ("the lazy dog sleeps", ("cat",), "the lazy dog sleeps"),
        ("the lazy dog sleeps", ("the",), ""),
        ("aaaaab", ("aab",), "aaa"),
        ("ab abc abcd", ("abcd",), "ab abc "),
        ("x\n\ny", ("\n\n",), "x"),
        ("über 👋 alles", ("👋",), "über "),
        ("end of it", ("it and more",), "end of it"),
    ],
)
def test_stop_strings_end_the_text_before_them(tokenizer, text, stop, expected):
    done, shown = scripted(tokenizer, text, stop=stop)
    assert done.text == shown == expected
    assert done.finish_reason == ("eos" if expected == text else "stop")


WORDS = st.lists(st.sampled_from(["a", "b", "ab", " ", "é", "👋", "the", "dog", "\n"]), max_size=14).map("".join)


@given(text=WORDS, stop=st.lists(WORDS.filter(bool), max_size=2).map(tuple), length=st.integers(1, 40))
def test_streaming_never_shows_part_of_a_stop_string(tokenizer, text, stop, length):
    done, shown = scripted(tokenizer, text, stop=stop, max_new_tokens=length)
    assert shown == done.text
    assert not any(item in shown for item in stop)
    places = [text.find(item) for item in stop if item in text]
    if done.finish_reason == "stop":
        assert places
    if done.finish_reason == "eos":
        assert done.text == text
    assert text.startswith(done.text.rstrip("\ufffd"))


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    length = len(tokenizer.encode("a👋", special=False)) - 1
    done, shown = scripted(tokenizer, "a👋", max_new_tokens=length)
    assert done.text == shown == "a\ufffd"


@pytest.mark.parametrize("text", ["Grüße", "世界 👋🏽", "\u2028 x \ufeff", "👩‍👩‍👧"])
def test_prompts_of_any_script_run(model, text):
    tokens = model.tokenizer.encode(text)
    (done,) = generate(model.executor, model.tokenizer, [Request(tokens=tuple(tokens), max_new_tokens=4)])
    assert done.prompt_tokens == len(tokens)


def test_an_empty_prompt_is_refused(model):
    with raises("PROMPT_EMPTY", 3, "prompt 2"):
        generate(model.executor, model.tokenizer, [Request(tokens=(5,)), Request(tokens=())])


def test_a_prompt_may_fill_the_context_but_not_more(model):
    (done,) = generate(model.executor, model.tokenizer, [Request(tokens=(5,) * 64, max_new_tokens=9, ignore_eos=True)])
    assert (len(done.tokens), done.finish_reason) == (1, "context")
    with raises("PROMPT_TOO_LONG", 5, "the prompt has 65 tokens", "64") as caught:
        generate(model.executor, model.tokenizer, [Request(tokens=(5,) * 65)])
    assert "--context" in caught.value.hint


def test_no_request_is_no_work(model):
    assert generate(model.executor, model.tokenizer, []) == []


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"stop": ("",)}, {"surprise": 1}])
def test_senseless_requests_are_refused(values):
    with pytest.raises(ValidationError):
        Request(tokens=(1,), **values)


def test_an_executor_refuses_what_does_not_fit(model):
    def segment(slot: int = 0, start: int = 0, tokens: tuple[int, ...] = (5,)) -> Segment:
        return Segment(slot, start, np.array(tokens, np.int32))

    for bad, code, exit_code in [
        ([segment(slot=4)], "SLOT_", 3),
        ([segment(slot=-1)], "SLOT_", 3),
        ([segment(), segment()], "SLOT_", 3),
        ([segment(tokens=())], "EMPTY", 3),
        ([segment(tokens=(320,))], "TOKEN_OUT_OF_RANGE", 3),
        ([segment(tokens=(-1,))], "TOKEN_OUT_OF_RANGE", 3),
        ([segment(tokens=(5,) * 65)], "CONTEXT_EXCEEDED", 5),
    ]:
        with pytest.raises(Exception, match=code) as caught:
            model.executor.forward(bad)
        assert getattr(caught.value, "exit_code", None) == exit_code, (code, caught.value)


def test_loading_says_what_is_wrong(text_checkpoint, torch_engine, native_engine, text_source, tmp_path):
    with raises("WRONG_KIND", 3, "checkpoint"):
        load_engine(text_checkpoint.path)
    with raises("ARTIFACT_MISSING", 3):
        load_engine(tmp_path / "nowhere")
    damaged = copy_of(native_engine, tmp_path / "damaged")
    (damaged / "plan.json").write_text("{}".ljust((damaged / "plan.json").stat().st_size))
    with raises("ENGINE_FOREIGN", 3, str(damaged)):
        load_engine(damaged)


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_context_limits_are_checked_at_build_and_the_correction_works(text_checkpoint, tmp_path, executor):
    with raises("CONTEXT_TOO_LONG", 2, "129", "128") as caught:
        build_to(text_checkpoint.path, tmp_path / "out", executor=executor, context=129)
    assert "--context 128" in caught.value.hint
    assert build_to(text_checkpoint.path, tmp_path / "out", executor=executor, context=128).engine.limits.context == 128
