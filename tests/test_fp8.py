"""FP8 weights against the E4M3 numbers, listed one by one from the definition of the format, in float64."""

from __future__ import annotations

import pytest
import torch

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods.fp8 import METHOD, Fp8

CHANNEL = WeightScheme(type="fp8", granularity="channel")
TENSOR = WeightScheme(type="fp8", granularity="tensor")


def e4m3_numbers() -> torch.Tensor:
    """Every finite E4M3 value, from its definition: 4 exponent bits of bias 7, 3 mantissa bits; S.1111.111 is NaN."""
    found = [m / 8 * 2.0**-6 for m in range(8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({sign * value for value in found for sign in (1, -1)}), dtype=torch.float64)


@pytest.mark.parametrize("scheme", [CHANNEL, TENSOR])
@pytest.mark.parametrize("search", [False, True])
def test_every_value_is_the_nearest_e4m3_number_under_its_scale(scheme: WeightScheme, search: bool) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 24)[:, None]
    made = METHOD.quantize(weight, scheme, search)
    scale = made.tensors["weight_scale"].double()
    assert made.tensors["weight"].dtype == torch.float8_e4m3fn
    quotient = weight.double() / scale[:, None]
    stored = made.tensors["weight"].double()
    nearest = (quotient[..., None] - e4m3_numbers()).abs().amin(dim=-1)
    torch.testing.assert_close((quotient - stored).abs(), nearest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.dequantized.double(), stored * scale[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_without_search_the_largest_weight_is_448_scales(granularity: str) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    scheme, note = Fp8(granularity).scheme(32, 64, True)  # type: ignore[arg-type]
    assert note is None
    made = METHOD.quantize(weight, scheme)
    largest = weight.abs().amax(dim=1) if granularity == "channel" else weight.abs().amax()[None]
    torch.testing.assert_close(made.tensors["weight_scale"], largest / 448)
    for suffix, (_, shape) in METHOD.tensors(scheme, 8, 32).items():
        assert tuple(made.tensors[suffix].shape) == shape


@pytest.mark.parametrize("scheme", [CHANNEL, TENSOR])
def test_the_search_never_loses_and_gains_on_some_row(scheme: WeightScheme) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    plain, searched = (
        (METHOD.quantize(weight, scheme, search).dequantized - weight).double().square().sum(dim=1)
        for search in (False, True)
    )
    if scheme is CHANNEL:
        assert bool((searched <= plain * (1 + 1e-6)).all())
    assert float(searched.sum()) < float(plain.sum())


@pytest.mark.parametrize("search", [False, True])
def test_zero_and_tiny_rows_stay_finite(search: bool) -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-44), torch.ones(16), torch.full((16,), 3e38)])
    made = METHOD.quantize(weight, CHANNEL, search)
    assert bool(torch.isfinite(made.dequantized).all())
    assert float(made.tensors["weight_scale"][0]) == 1.0 or search
    assert bool((made.dequantized[0] == 0).all())
    torch.testing.assert_close(made.dequantized[2:], weight[2:], rtol=0.07, atol=0)
