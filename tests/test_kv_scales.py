"""Scales of a quantized cache: largest magnitudes, the search, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.quantized import kv_round_trip
from trtllm_cli.quantize.methods.kv_cache import SAMPLE_TOKENS, KvStatistics, check, key_smoothing

CPU = torch.device("cpu")
TOPS = {"int8": 127.0, "fp8": 448.0}


def observed(*, batches: int = 3, length: int = 32, heads: int = 3, seed: int = 0) -> tuple[KvStatistics, torch.Tensor]:
    """Statistics of random keys and values of very different sizes, and both tensors [2, B, heads, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[1.0, 8.0, 0.1], [0.01, 2.0, 30.0]])[:, None, :heads, None, None]
    x = torch.randn(2, 2 * batches, heads, length, 16, generator=generator) * sizes
    statistics = KvStatistics(heads, CPU)
    for k, v in zip(x[0].split(2), x[1].split(2)):
        statistics.add(k, v)
    return statistics, x


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_without_search_a_scale_maps_the_largest_magnitude_to_the_top(kind: str) -> None:
    statistics, x = observed()
    for scales, tensor in zip(statistics.scales(kind, "head", search=False), x):  # type: ignore[arg-type]
        torch.testing.assert_close(scales, tensor.abs().amax(dim=(0, 2, 3)) / TOPS[kind])
    for scales, tensor in zip(statistics.scales(kind, "tensor", search=False), x):  # type: ignore[arg-type]
        torch.testing.assert_close(scales, (tensor.abs().max() / TOPS[kind]).expand(3))


@pytest.mark.parametrize("kind", ["fp8"])
@pytest.mark.parametrize("granularity", ["head", "tensor"])
def test_the_search_never_has_the_larger_error(kind: str, granularity: str) -> None:
    statistics, x = observed()
    outlier = x[:, :1].clone()
    outlier[:, :, :, 0, 0] *= 40
    statistics.add(outlier[0], outlier[1])
    plain = statistics.scales(kind, granularity, search=False)  # type: ignore[arg-type]
    found = statistics.scales(kind, granularity)  # type: ignore[arg-type]
    for tensor, before, after in zip(torch.cat([x, outlier], dim=1), plain, found):
        errors = [
            (kv_round_trip(tensor, kind, scale) - tensor).double().square().sum(dim=(0, 2, 3))  # type: ignore[arg-type]
            for scale in (before, after)
        ]
        assert float(errors[1].sum()) <= float(errors[0].sum()) * (1 + 1e-5)
        if granularity == "tensor":
            assert len(after.unique()) == 1


def test_nothing_that_was_seen_is_cut_off() -> None:
    k = torch.randn(1, 1, 2000, 16, generator=torch.Generator().manual_seed(3))
    k[0, 0, 5, 2] = 12.0
    statistics = KvStatistics(1, CPU)
    statistics.add(k, k)
    torch.testing.assert_close(statistics.scales("int8", "head")[0], torch.tensor([12 / 127]))
    assert float(statistics.scales("fp8", "head")[0]) >= 12 / 448 * (1 - 1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from([0, 4, 16]), st.booleans())
def test_smoothing_leaves_scores_alone_and_lowers_the_error_of_heads_with_large_channels(
    seed: int, rotary: int, shared: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(400, 3, 16, generator=generator, dtype=torch.float64)
    k[..., 3] *= 30
    if rotary:
        k[..., (3 + rotary // 2) % rotary] *= 30
    s = key_smoothing(k.abs().amax(dim=0).float(), rotary, shared=shared).double()
    assert s.shape == (3, 16)
    mantissa, _ = torch.frexp(s)
    assert bool((mantissa == 0.5).all()), "not powers of two"
    half = rotary // 2
    torch.testing.assert_close(s[:, :half], s[:, half:rotary])
    if shared:
        assert len({tuple(row.tolist()) for row in s}) == 1
    q = torch.randn(8, 3, 16, generator=generator, dtype=torch.float64)
    scores = torch.einsum("qhd,khd->hqk", q, k)
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", q * s, k / s), scores, rtol=0, atol=1e-9)

    def error(x: torch.Tensor, query: torch.Tensor) -> float:
        scale = x.abs().amax(dim=(0, 2)).float() / 127
        cached = kv_round_trip(x.transpose(0, 1)[None].float(), "int8", scale)[0].transpose(0, 1).double()
        return float((torch.einsum("qhd,khd->hqk", query, cached) - scores).norm())

    assert error(k / s, q * s) < error(k, q)


def test_dividing_keys_equals_seeing_divided_keys() -> None:
    statistics, x = observed()
    s = torch.exp2(torch.randint(-3, 4, (3, 16), generator=torch.Generator().manual_seed(5)).float())
    divided = KvStatistics(3, CPU)
    for k, v in zip(x[0].split(2), x[1].split(2)):
        divided.add(k / s[:, None], v)
    statistics.divide_keys(s)
    for kind in ("int8", "fp8"):
        for ours, theirs in zip(statistics.scales(kind, "head"), divided.scales(kind, "head")):  # type: ignore[arg-type]
            torch.testing.assert_close(ours, theirs)


def test_keys_and_values_have_their_own_scales() -> None:
    statistics, _ = observed()
    k, v = statistics.scales("int8", "head")
    assert float(k[0] / v[0]) > 20
    assert float(v[2] / k[2]) > 20


def test_many_tokens_keep_a_bounded_sample_that_covers_all_positions() -> None:
    statistics = KvStatistics(1, CPU)
    for begin in range(64):
        position = torch.arange(512, dtype=torch.float32).view(1, 1, 512, 1) + 1
        statistics.add(position, position + begin)
    rows = torch.cat(statistics._keys.rows)
    assert SAMPLE_TOKENS / 3 - 1 <= len(rows) <= SAMPLE_TOKENS
    assert len(rows.unique()) > 400
    torch.testing.assert_close(statistics.largest()[0], torch.tensor([[512.0]]))


def test_dividing_the_value_projection_equals_seeing_divided_values() -> None:
    statistics, x = observed()
    s = torch.rand(3 * 16, generator=torch.Generator().manual_seed(4)) + 0.5
    divided = KvStatistics(3, CPU)
    for k, v in zip(x[0].split(2), x[1].split(2)):
        divided.add(k, v / s.view(1, 3, 1, 16))
    statistics.divide_values(s)
    for ours, theirs in zip(statistics.scales("int8", "head"), divided.scales("int8", "head")):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_scale_that_is_no_positive_number_is_refused_with_its_layer(bad: float, which: int) -> None:
    scales = [torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25])]
    scales[which][1] = bad
    with pytest.raises(BadInputError, match=rf"layers\.7\.attn\.{'kv'[which]}_scale of head 1") as caught:
        check(scales[0], scales[1], 7)
    assert caught.value.code == "KV_SCALE"
    assert caught.value.hint


def test_scales_that_are_all_one_are_refused_and_one_of_them_is_not() -> None:
    ones = torch.ones(2)
    with pytest.raises(BadInputError, match=r"layers\.3\.attn is exactly 1\.0") as caught:
        check(ones, ones, 3)
    assert caught.value.code == "KV_SCALE_ONES"
    check(ones, torch.tensor([1.0, 0.5]), 3)


def test_nan_keys_and_a_dead_head_do_not_pass() -> None:
    for value, which in ((math.nan, "nan"), (0.0, "0")):
        statistics, x = observed()
        k = x[0, :2].clone()
        if which == "0":
            statistics = KvStatistics(3, CPU)
        k[:, 1] = value
        statistics.add(k, x[1, :2])
        with pytest.raises(BadInputError, match=f"layers.0.attn.k_scale of head 1 is {which}"):
            check(*statistics.scales("int8", "head"), 0)


def test_a_dead_channel_is_named() -> None:
    _, x = observed()
    x[1, :, 2, :, 5] = 0
    statistics = KvStatistics(3, CPU)
    statistics.add(x[0], x[1])
    with pytest.raises(BadInputError, match=r"channel 5 of head 2 of the values of layers\.4\.attn") as caught:
        check(*statistics.scales("fp8", "head"), 4, statistics)
    assert caught.value.code == "KV_CHANNEL_DEAD"


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(BadInputError, match="no calibration tokens"):
        KvStatistics(2, CPU).scales("int8", "head")
