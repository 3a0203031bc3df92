"""Perplexity and divergence against float64 arithmetic of torch and a transformers model."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.support_evaluate import Bigram, TinyLlama
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UsageError, UserError
from trtllm_cli.evaluate import scores
from trtllm_cli.evaluate.divergence import divergence, position_divergences
from trtllm_cli.evaluate.perplexity import perplexity, text_protocol, window_nlls, windows
from trtllm_cli.runtime.executor import Segment

RANDOM = np.random.default_rng(7)
TOKENS = RANDOM.integers(0, 64, 150, dtype=np.int32)


def _protocol(tokens: np.ndarray, **options: object):  # type: ignore[no-untyped-def,type-arg]
    return text_protocol("some text", len(tokens), **options)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_token_is_scored_exactly_once(data: st.DataObject) -> None:
    bos = data.draw(st.booleans())
    context = data.draw(st.integers(2, 40))
    stride = data.draw(st.one_of(st.none(), st.integers(1, context - bos)))
    tokens = data.draw(st.integers(context - bos, 300))
    protocol = text_protocol("t", tokens, context=context, stride=stride, bos=bos)
    found = list(windows(protocol))
    assert len(found) == protocol.windows
    scored = [token for window in found for token in range(window.scored, window.end)]
    assert len(scored) == len(set(scored))
    assert all(window.end - window.begin + bos == context and window.end <= tokens for window in found)
    # one more window would not fit
    assert found[-1].begin + protocol.stride + context - bos > tokens
    overlapping = protocol.stride < context - bos
    if bos:
        assert scored == list(range(found[-1].end))
    elif overlapping:
        assert scored == list(range(1, found[-1].end))
    else:
        assert scored == [token for token in range(found[-1].end) if token % context]


@pytest.mark.parametrize(
    ("context", "stride", "bos"), [(16, None, False), (16, 5, False), (16, None, True), (16, 3, True)]
)
def test_perplexity_of_a_transformers_model(context: int, stride: int | None, bos: bool) -> None:
    model = TinyLlama(64)
    protocol = _protocol(TOKENS, context=context, stride=stride, bos=bos)
    result = perplexity(model, TOKENS, protocol, bos_id=3 if bos else None)
    expected: list[float] = []
    step = stride or context - bos
    covered = 0
    for begin in range(0, len(TOKENS) - (context - bos) + 1, step):
        ids = ([3] if bos else []) + TOKENS[begin : begin + context - bos].tolist()
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[0].double()
        nll = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()
        last = nll if bos else [math.nan, *nll]  # by text token of the window
        expected += [value for value in last[max(covered - begin, 0) :] if not math.isnan(value)]
        covered = begin + context - bos
    assert result.scored_tokens == len(expected)
    assert result.nll == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.nll_stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(len(expected)), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_the_arithmetic_is_float64_even_for_sharp_distributions() -> None:
    logits = (RANDOM.normal(0, 30, (40, 5000))).astype(np.float32)
    targets = RANDOM.integers(0, 5000, 40).astype(np.int32)
    found = scores.score_rows(logits, targets, "here")
    exact = functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets).long(), reduction="none")
    np.testing.assert_allclose(found.nll, exact.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(found.greedy, logits.argmax(axis=1) == targets)


def test_memory_is_bounded_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = _protocol(TOKENS, context=32, stride=20)
    whole = perplexity(TinyLlama(64), TOKENS, protocol)
    pair = divergence(TinyLlama(64), TinyLlama(64, seed=1), TOKENS, protocol)
    monkeypatch.setattr(scores, "_LOGITS_BYTES", 4 * 64 * 6)
    monkeypatch.setattr(scores, "_CHUNK_BYTES", 8 * 64 * 2)
    small = TinyLlama(64)
    assert perplexity(small, TOKENS, protocol).nll == pytest.approx(whole.nll, rel=1e-6)
    assert small.largest == 6
    a, b = TinyLlama(64), TinyLlama(64, seed=1)
    assert divergence(a, b, TOKENS, protocol).mean == pytest.approx(pair.mean, rel=1e-6)
    assert a.largest == b.largest == 3


def test_windows_beyond_the_text_are_counted_and_fewer_are_respected() -> None:
    assert _protocol(TOKENS, context=16, windows=1000).windows == 150 // 16
    protocol = _protocol(TOKENS, context=16, windows=2)
    model = Bigram()
    seen: list[tuple[int, int]] = []
    result = perplexity(model, TOKENS, protocol, progress=lambda done, total, nll: seen.append((done, total)))
    assert (result.protocol.windows, result.scored_tokens, seen) == (2, 30, [(1, 2), (2, 2)])
    assert protocol.text_sha256 == hashlib.sha256(b"some text").hexdigest()
    assert [len(nll) for nll in window_nlls(model, TOKENS, protocol)] == [15, 15]


@pytest.mark.parametrize(
    ("tokens", "options", "code", "kind"),
    [
        (0, {"context": 8}, "TEXT_EMPTY", BadInputError),
        (7, {"context": 8}, "TEXT_TOO_SHORT", BadInputError),
        (50, {"context": 1}, "OPTION_INVALID", UsageError),
        (50, {"context": 8, "stride": 9}, "OPTION_INVALID", UsageError),
        (50, {"context": 8, "stride": 8, "bos": True}, "OPTION_INVALID", UsageError),
        (50, {"context": 8, "stride": 0}, "OPTION_INVALID", UsageError),
        (50, {"context": 8, "windows": 0}, "OPTION_INVALID", UsageError),
    ],
)
def test_senseless_protocols_are_refused(
    tokens: int, options: dict[str, int], code: str, kind: type[UserError]
) -> None:
    with pytest.raises(kind) as caught:
        text_protocol("t", tokens, **options)  # type: ignore[arg-type]
    assert caught.value.code == code
    assert caught.value.hint


def test_what_the_model_cannot_do_is_refused() -> None:
    protocol = _protocol(TOKENS, context=32)
    with pytest.raises(DoesNotFitError, match=r"32 positions.*built for 16"):
        perplexity(Bigram(context=16), TOKENS, protocol)
    with pytest.raises(BadInputError, match=r"token id 63.*40 entries"):
        perplexity(Bigram(vocab_size=40), np.full(150, 63), protocol)
    with pytest.raises(UnsupportedError, match="no BOS"):
        perplexity(Bigram(), TOKENS, _protocol(TOKENS, context=32, bos=True))
    with pytest.raises(BadInputError, match="150 tokens, this one has 149"):
        perplexity(Bigram(), TOKENS[:-1], protocol)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_senseless_logits_name_their_window(bad: float) -> None:
    model = Bigram()
    latest = next(int(token) for token in TOKENS[32:47] if token not in TOKENS[:32])
    model.table[latest, 5] = bad
    with pytest.raises(BadInputError, match=r"window 2 \(tokens 32 to 47\)") as caught:
        perplexity(model, TOKENS, _protocol(TOKENS, context=16))
    assert caught.value.code == "LOGITS_NOT_FINITE"
    with pytest.raises(BadInputError, match=r"window 2.*of the reference"):
        divergence(model, Bigram(), TOKENS, _protocol(TOKENS, context=16))


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_divergence_is_that_of_torch(noise: float) -> None:
    reference, subject = Bigram(), Bigram(noise=noise)
    protocol = _protocol(TOKENS, context=16, windows=6)
    result = divergence(reference, subject, TOKENS, protocol, reference_name="source")
    rows = [int(TOKENS[i]) for i in range(96) if i % 16 != 15]
    targets = torch.tensor([int(TOKENS[i + 1]) for i in range(96) if i % 16 != 15])
    p, q = torch.tensor(reference.table[rows]).double(), torch.tensor(subject.table[rows]).double()
    exact = functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1).numpy()
    assert result.scored_tokens == len(exact) == 90
    assert result.mean == pytest.approx(exact.mean(), rel=1e-9)
    assert result.stderr == pytest.approx(exact.std(ddof=1) / math.sqrt(90), rel=1e-9)
    assert result.maximum == pytest.approx(exact.max(), rel=1e-9)
    assert result.percentiles == pytest.approx({k: np.percentile(exact, float(k)) for k in ("50", "90", "99", "99.9")})
    assert result.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert result.reference_perplexity == pytest.approx(functional.cross_entropy(p, targets).exp().item())
    assert result.subject_perplexity == pytest.approx(functional.cross_entropy(q, targets).exp().item())
    assert result.reference == "source"


def test_a_model_does_not_differ_from_itself() -> None:
    model = Bigram()
    result = divergence(model, model, TOKENS, _protocol(TOKENS, context=16))
    assert (result.mean, result.maximum, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.subject_perplexity == result.reference_perplexity


def test_the_subject_of_a_divergence_has_its_own_perplexity() -> None:
    protocol = _protocol(TOKENS, context=16, stride=7)
    found = position_divergences(Bigram(), Bigram(seed=5), TOKENS, protocol)
    for per_window, seed in ((found.reference_windows(), 0), (found.subject_windows(), 5)):
        alone = window_nlls(Bigram(seed=seed), TOKENS, protocol)
        assert [len(nll) for nll in per_window] == [len(nll) for nll in alone]
        np.testing.assert_allclose(np.concatenate(per_window), np.concatenate(alone), rtol=1e-12)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(UnsupportedError, match=r"64 tokens, the model 65") as caught:
        divergence(Bigram(), Bigram(vocab_size=65), TOKENS, _protocol(TOKENS, context=16))
    assert caught.value.code == "VOCABULARY_DIFFERS"


def test_an_overflowing_perplexity_is_an_error_not_infinity() -> None:
    model = Bigram()
    model.table[:] = 0
    model.table[:, 0] = 2000.0
    with pytest.raises(BadInputError, match="make no sense"):
        perplexity(model, np.full(32, 9), _protocol(np.zeros(32), context=16))


def test_the_stand_in_gives_the_same_logits_in_pieces() -> None:
    model = TinyLlama(64)
    tokens = np.arange(1, 13, dtype=np.int32)
    whole = model.forward([Segment(0, 0, tokens, "all")])
    model.forward([Segment(0, 0, tokens[:5], "none")])
    rest = model.forward([Segment(0, 5, tokens[5:], "all")])
    np.testing.assert_array_equal(whole[5:], rest)
