"""Sampling filters against the logits processors of transformers, and what "reproducible by seed" means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.support_artifacts import raises
from trtllm_cli.runtime.sampling import Sampler, Sampling, filtered


def oracle(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities after the processors of transformers, in its order, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    if s.temperature != 1:
        scores = TemperatureLogitsWarper(s.temperature)(ids, scores)
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(ids, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(ids, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def spread(logits: np.ndarray, s: Sampling) -> np.ndarray:
    ids, probabilities = filtered(logits, s)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    return full


SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.5, 0.7, 1.0, 1.5, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)


def near_an_edge(logits: np.ndarray, s: Sampling) -> bool:
    """Whether rounding decides a filter: a sum within 1e-9 of top-p, or a probability of min-p times the largest."""
    kept = logits.astype(np.float64) / s.temperature
    if s.top_k:
        kept = np.sort(kept)[-min(s.top_k, len(kept)) :]
    p = np.sort(np.exp(kept - kept.max()))[::-1]
    p /= p.sum()
    sums = np.cumsum(p)
    ratio = p / p[0]
    return bool(np.abs(sums - s.top_p).min() < 1e-9 or np.abs(ratio[1:] - s.min_p).min(initial=1) < 1e-9)


@settings(max_examples=300)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 200), scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]), s=SAMPLING)
def test_the_filters_are_those_of_transformers(seed, size, scale, s):
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    assume(not near_an_edge(logits, s))
    assert np.allclose(spread(logits, s), oracle(logits, s), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("s", [Sampling(temperature=1, top_k=2), Sampling(temperature=1, min_p=0.3)])
def test_ties_at_the_edge_stay_together(s):
    logits = np.array([1, 3, 2, 2, 2, -1], np.float32)
    assert np.allclose(spread(logits, s), oracle(logits, s))


@given(
    seed=st.integers(0, 10**6),
    penalty=st.sampled_from([0.5, 1.1, 1.3, 2.0]),
    prompt=st.lists(st.integers(0, 19), max_size=10),
)
def test_the_repetition_penalty_is_that_of_transformers(seed, penalty, prompt):
    rng = np.random.default_rng(seed)
    sampler = Sampler(Sampling(repetition_penalty=penalty), 0, prompt)
    seen = list(prompt)
    for _ in range(6):
        logits = (rng.standard_normal(20) * 3).astype(np.float32)
        before = logits.copy()
        token = sampler.choose(logits)
        assert np.array_equal(logits, before), "the executor's logits were changed"
        if seen:
            scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.from_numpy(before)[None])
            assert token == int(scores.argmax())
        seen.append(token)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.integers(0, 5))
def test_greedy_takes_the_first_of_the_largest(values, seed):
    logits = np.array(values, np.float32)
    assert Sampler(Sampling(seed=seed), 0, ()).choose(logits) == int(np.argmax(logits))


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=20),
    temperature=st.floats(0, 1e308, exclude_min=True),
    s=SAMPLING,
)
@example(values=[1.0, 2.0], temperature=5e-324, s=Sampling(temperature=1))
@example(values=[1e4, -1e4], temperature=1e-310, s=Sampling(temperature=1, top_p=0.9))
def test_no_temperature_makes_probabilities_that_are_none(values, temperature, s):
    s = s.model_copy(update={"temperature": temperature})
    ids, probabilities = filtered(np.array(values, np.float32), s)
    assert len(ids) >= 1
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1)
    if temperature < 1e6:  # beyond, all are equally likely to within rounding
        assert int(np.argmax(values)) in ids


def test_draws_follow_the_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -8.0], np.float32)
    s = Sampling(temperature=1.0, seed=3)
    sampler = Sampler(s, 0, ())
    count = 20000
    found = np.bincount([sampler.choose(logits) for _ in range(count)], minlength=4) / count
    expected = oracle(logits, s)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def test_the_same_seed_draws_the_same():
    logits = np.random.default_rng(0).standard_normal((30, 100)).astype(np.float32)

    def draw(seed: int, index: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed), index, ())
        return [sampler.choose(row) for row in logits]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, index)) for seed in range(4) for index in range(4)}) == 16


@pytest.mark.parametrize("s", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_no_text(s, value):
    with raises("LOGITS_NOT_FINITE", 3):
        Sampler(s, 0, ()).choose(np.array([1, value, 2], np.float32))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"top_n": 1},
    ],
)
def test_senseless_values_are_refused(values):
    with pytest.raises(ValidationError):
        Sampling(**values)
