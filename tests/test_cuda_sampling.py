"""The sampling twin and operator without a GPU: against the CPU sampler, known answers and the laws of chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_gpu import assert_refused
from trtllm_cli.ops.cuda import sampling, sampling_twin
from trtllm_cli.ops.cuda.sampling_twin import Request
from trtllm_cli.runtime import sampling as cpu


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with the generator
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_answers(counter: tuple, key: int, words: tuple) -> None:
    assert sampling_twin.philox(key, counter) == words


def test_random_words_of_seeds_and_steps_look_independent_and_uniform() -> None:
    words = np.array([[sampling_twin.random_word(s, n) for n in range(64)] for s in range(64)], dtype=np.uint64)
    assert len(np.unique(words)) == words.size
    unit = words.astype(np.float64) / 2**64
    expected = words.size / 16
    chi2 = ((np.bincount((unit.ravel() * 16).astype(int), minlength=16) - expected) ** 2 / expected).sum()
    assert chi2 < 37.7  # 15 degrees of freedom, one in a thousand
    for other in (np.roll(unit, 1, axis=0), np.roll(unit, 1, axis=1)):
        assert abs(np.corrcoef(unit.ravel(), other.ravel())[0, 1]) < 4 / 64


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_weights_are_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5000) * 4
    weight = sampling_twin.weights(x, temperature)
    wanted = ((x.double() - x.max().double()) / temperature).exp()
    assert weight.max() == 2**sampling_twin.WEIGHT_BITS
    assert torch.allclose(weight.double() / 2**40, wanted, rtol=4e-6, atol=2**-40)


SETTINGS = [
    {},
    {"temperature": 0.8, "top_k": 40},
    {"top_p": 0.9},
    {"top_k": 50, "top_p": 0.7},
    {"min_p": 0.1, "temperature": 2.0},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
    {"top_k": 1},
    {"top_p": 0.01},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_filters_leave_what_the_cpu_sampler_leaves(setting: dict, ties: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(3000) * 3
    if ties:
        x = (x * 4).round() / 4
    setting = {"temperature": 1.0, **setting}
    ids, probabilities = cpu.filtered(x.numpy(), cpu.Sampling(**setting))
    weight = sampling_twin.filtered(x, Request(**setting))
    found = weight.nonzero()[:, 0]
    assert found.tolist() == ids.tolist()
    assert np.allclose(weight[found].double() / weight.sum(), probabilities, rtol=1e-5)


def test_repetition_penalty_is_that_of_the_cpu_sampler() -> None:
    torch.manual_seed(2)
    x = torch.randn(100)
    prompt = [3, 7, 7, 50]
    sampler = cpu.Sampler(cpu.Sampling(repetition_penalty=2.5), 0, prompt)
    counts = sampling.prompt_counts([prompt], 100)
    penalty = torch.tensor([2.5])
    for _ in range(20):
        token = sampling.sample(x[None], counts, repetition=penalty, advance=True)
        assert token.tolist() == [sampler.choose(x.numpy())]


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    counts = sampling.prompt_counts([[0, 1]], 4)
    counts[0, 1] += 3
    counts[0, 2] = 1
    x = torch.tensor([1.0, 2.0, -3.0, 4.0])
    found = sampling_twin.penalized(x, counts[0], Request(repetition=2.0, frequency=0.25, presence=0.5))
    assert found.tolist() == [0.5, 1.0 - 0.75 - 0.5, -6.0 - 0.25 - 0.5, 4.0]


@pytest.mark.parametrize("setting", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_tokens_come_as_often_as_their_probability_says(setting: dict) -> None:
    torch.manual_seed(3)
    x = torch.randn(12)
    draws = 4000
    request = {"temperature": 0.9, **setting}
    ids, probabilities = cpu.filtered(x.numpy(), cpu.Sampling(**request))
    drawn = [sampling_twin.choose(x, None, Request(seed=11, step=n, **request)) for n in range(draws)]
    seen = np.bincount(drawn, minlength=12)
    assert set(np.flatnonzero(seen)) <= set(ids.tolist())
    expected = probabilities * draws
    chi2 = ((seen[ids] - expected) ** 2 / expected).sum()
    assert chi2 < len(ids) - 1 + 4 * np.sqrt(2 * len(ids))


def test_a_rows_token_does_not_depend_on_its_batch_and_steps_advance() -> None:
    torch.manual_seed(4)
    x = torch.randn(5, 300)
    arguments = {
        "temperature": torch.full((5,), 1.3),
        "seeds": torch.arange(5) - 2,
        "steps": torch.arange(5, dtype=torch.int32),
    }
    steps = arguments["steps"].clone()
    together = sampling.sample(x, **arguments, advance=True)
    assert arguments["steps"].tolist() == [1, 2, 3, 4, 5]
    arguments["steps"] = steps
    alone = [sampling.sample(x[i : i + 1], **{k: v[i : i + 1] for k, v in arguments.items()}) for i in range(5)]
    assert together.tolist() == [int(one) for one in alone]


def test_rows_without_a_largest_logit_are_marked() -> None:
    x = torch.zeros(5, 9)
    x[0, 3] = torch.nan
    x[1, 3] = torch.inf
    x[2] = -torch.inf
    x[3, 1:] = -torch.inf
    steps = torch.zeros(5, dtype=torch.int32)
    found = sampling.sample(x, temperature=torch.ones(5), steps=steps, advance=True)
    assert found[:4].tolist() == [-1, -1, -1, 0] and found[4] >= 0
    assert steps.tolist() == [0, 0, 0, 1, 1]
    assert sampling.argmax(x).tolist() == [-1, -1, -1, 0, 0]


def test_the_operator_passes_torchs_checks() -> None:
    ones, counts = torch.ones(2), torch.zeros(2, 9, dtype=torch.int16)
    arrays = (ones, None, ones * 0.5, None, None, None, None, torch.arange(2), torch.zeros(2, dtype=torch.int32))
    arguments = (torch.randn(2, 9), counts, *arrays, True, 0, 0)
    torch.library.opcheck(sampling._sample, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals_name_what_is_wrong() -> None:
    x, one = torch.zeros(2, 9), torch.ones(2)
    assert_refused(lambda: sampling.sample(x.double()), "torch.float64")
    assert_refused(lambda: sampling.sample(x[0]), "(9,)")
    assert_refused(lambda: sampling.sample(x.T.contiguous().T), "logits", "contiguous")
    assert_refused(lambda: sampling.sample(x, temperature=one[:1]), "temperature", "(1,)")
    assert_refused(lambda: sampling.sample(x, top_k=one), "top_k", "torch.int32")
    assert_refused(lambda: sampling.sample(x, repetition=one), "counts", "prompt_counts")
    assert_refused(lambda: sampling.sample(x, torch.zeros(2, 8, dtype=torch.int16)), "counts", "(2, 8)")
