"""Choosing tokens in torch is the numpy sampler's choice: the same tokens, and the same distribution behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtllm_cli.runtime import sampling, sampling_torch
from trtllm_cli.runtime.sampling import Sampler, Sampling

VOCAB = 61

settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, VOCAB, 500]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


def logits(rows: int, seed: int, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)
    return np.round(values) if ties else values


def dense(row: np.ndarray, one: Sampling) -> np.ndarray:
    ids, probabilities = sampling.filtered(row, one)
    found = np.zeros(len(row))
    found[ids] = probabilities
    return found


@given(st.lists(settings, min_size=1, max_size=5), st.integers(0, 10**6), st.booleans())
def test_each_row_has_the_probabilities_of_its_own_setting(batch, seed, ties):
    rows = logits(len(batch), seed, ties)
    weights = sampling_torch.filtered(torch.from_numpy(rows), batch).numpy()
    weights /= weights.sum(axis=1, keepdims=True)
    for row, one, found in zip(rows, batch, weights):
        np.testing.assert_allclose(found, dense(row, one), rtol=1e-9, atol=1e-15)


@given(st.lists(settings, min_size=1, max_size=5), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_number_draws_the_token_of_the_inverse_distribution(batch, seed, number):
    rows = logits(len(batch), seed)
    weights = sampling_torch.filtered(torch.from_numpy(rows), batch)
    found = sampling_torch.draw(weights, torch.full((len(batch),), number, dtype=torch.float64))
    for row, one, token in zip(rows, batch, found.tolist()):
        edge = np.cumsum(dense(row, one))
        assert dense(row, one)[token] > 0
        assert edge[token] - dense(row, one)[token] - 1e-9 <= number * edge[-1] <= edge[token] + 1e-9


def samplers(batch: list[Sampling], seed: int) -> list[Sampler]:
    prompts = np.random.default_rng(seed).integers(0, VOCAB, (len(batch), 9))
    return [Sampler(one, index, prompt.tolist()) for index, (one, prompt) in enumerate(zip(batch, prompts))]


@given(st.integers(0, 10**6), st.lists(settings | st.just(Sampling()), min_size=1, max_size=5))
def test_the_tokens_of_many_steps_are_those_of_the_numpy_sampler(seed, batch):
    """Greedy rows and sampled ones, with and without penalty, mixed in a batch."""
    batch = [
        one.model_copy(update={"seed": seed, "repetition_penalty": (1.0, 1.3, 0.8)[index % 3]})
        for index, one in enumerate(batch)
    ]
    ours, theirs = samplers(batch, seed), samplers(batch, seed)
    for step in range(12):
        rows = logits(len(batch), seed + step)
        found = sampling_torch.choose(torch.from_numpy(rows), ours)
        assert found == [sampler.choose(row) for sampler, row in zip(theirs, rows)]
    assert [one.seen for one in ours] == [one.seen for one in theirs]


def test_the_logits_are_not_changed():
    rows = torch.from_numpy(logits(2, 3))
    before = rows.clone()
    sampling_torch.choose(rows, samplers([Sampling(repetition_penalty=2.0), Sampling(temperature=1.0)], 0))
    assert torch.equal(rows, before)


def test_sampled_tokens_follow_the_distribution():
    one = Sampling(temperature=1.1, top_k=20, top_p=0.9, seed=3)
    row = logits(1, 11)
    expected = dense(row[0], one)
    draws = 20000
    weights = sampling_torch.filtered(torch.from_numpy(row), [one]).expand(draws, -1)
    stream = Sampler(one, 0, ())
    numbers = torch.tensor([stream.uniform() for _ in range(draws)], dtype=torch.float64)
    counts = np.bincount(sampling_torch.draw(weights.contiguous(), numbers).numpy(), minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    degrees = kept.sum() - 1
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_gets_no_token(bad):
    rows = logits(3, 1)
    rows[1, 5] = bad
    greedy = samplers([Sampling()] * 3, 0)
    assert sampling_torch.choose(torch.from_numpy(rows), greedy) == [int(rows[0].argmax()), None, int(rows[2].argmax())]


def test_equal_logits_go_to_the_first_token():
    rows = torch.zeros(1, VOCAB)
    rows[0, [7, 30]] = 2.0
    assert sampling_torch.choose(rows, [Sampler(Sampling(), 0, ())]) == [7]
