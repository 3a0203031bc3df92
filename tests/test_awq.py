"""AWQ's scale and clip searches: exact errors in float64, and never worse than leaving things alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods import awq
from trtllm_cli.quantize.methods.int4_weight_only import METHOD

SYMMETRIC = WeightScheme(type="int4", granularity="group", group_size=32, symmetric=True, scale_dtype="float16")
ASYMMETRIC = SYMMETRIC.model_copy(update={"symmetric": False})


def rounding(scheme: WeightScheme) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: METHOD.quantize(rows, scheme).dequantized


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, -1])
def test_rounding_is_what_the_stored_weight_stands_for(symmetric: bool, size: int) -> None:
    scheme = SYMMETRIC.model_copy(update={"symmetric": symmetric, "group_size": size})
    w = torch.randn(50, 96, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 2, 50)[:, None]
    w[7, :32] = 0
    assert torch.equal(awq.rounding(scheme)(w), METHOD.quantize(w, scheme).dequantized)


def inputs(tokens: int = 400, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Correlated activations of which some channels are much larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5
    x[:, ::13] *= 12
    return x


def layer(*rows: int, width: int = 96, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) * 0.1 for n in rows]


def moment(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double() / len(x)).float()


def exact(x: torch.Tensor, w: torch.Tensor, made: torch.Tensor) -> float:
    """Mean squared output error a token, from the tokens themselves."""
    return float(((made.double() - w.double()) @ x.double().T).square().sum() / len(x))


def test_the_error_from_the_second_moment_is_that_of_the_tokens() -> None:
    x, (w,) = inputs(), layer(20)
    made = rounding(SYMMETRIC)(w)
    for fast, tolerance in ((False, 1e-4), (True, 2e-2)):
        ours = float(awq.output_error(made - w, moment(x), fast=fast).sum())
        assert ours == pytest.approx(exact(x, w, made), rel=tolerance)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_a_candidate_is_the_papers_formula(ratio: float) -> None:
    mean_abs = inputs().abs().mean(dim=0)
    paper = mean_abs.double() ** ratio
    paper = paper / (paper.max() * paper.min()).sqrt()
    torch.testing.assert_close(awq.candidate(mean_abs, ratio).double(), paper, rtol=1e-5, atol=0)


def test_dead_channels_keep_one_and_do_not_spoil_the_normalisation() -> None:
    mean_abs = torch.tensor([0.0, 1.0, 4.0])
    torch.testing.assert_close(awq.candidate(mean_abs, 0.5), torch.tensor([1.0, 0.5**0.5, 2**0.5]))
    assert bool((awq.candidate(torch.zeros(4), 0.5) == 1).all())


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("duo", [False, True])
def test_the_scale_search_reports_true_errors_and_gains(scheme: WeightScheme, duo: bool) -> None:
    x, ws, quantize = inputs(), layer(24, 8), rounding(scheme)
    w = torch.cat(ws)
    found = awq.search(ws, moment(x), x.abs().mean(dim=0), quantize, duo=duo)
    assert found.error == pytest.approx(exact(x, w, quantize(w * found.scales) / found.scales), rel=1e-3)
    assert found.error_without == pytest.approx(exact(x, w, quantize(w)), rel=1e-3)
    assert found.ratio is not None
    assert found.error < 0.8 * found.error_without


def test_the_search_finds_the_best_point_of_the_grid() -> None:
    x, (w,), quantize = inputs(), layer(24), rounding(SYMMETRIC)
    mean_abs = x.abs().mean(dim=0)
    found = awq.search([w], moment(x), mean_abs, quantize, 20)
    errors = []
    for point in range(21):
        s = awq.candidate(mean_abs, point / 20)
        errors.append(exact(x, w, quantize(w * s) / s))
    assert found.error <= min(errors) * 1.005


def test_the_search_is_never_worse_than_no_scaling() -> None:
    for seed in range(5):
        x, ws = torch.randn(200, 32, generator=torch.Generator().manual_seed(seed)), layer(6, width=32, seed=seed)
        found = awq.search(ws, moment(x), x.abs().mean(dim=0), rounding(SYMMETRIC))
        assert found.error <= found.error_without
        assert (found.ratio is None) == bool((found.scales == 1).all())


def test_exact_quantization_wants_no_scaling() -> None:
    x, ws = inputs(), layer(6)
    found = awq.search(ws, moment(x), x.abs().mean(dim=0), lambda rows: rows.clone())
    assert found.ratio is None
    assert found.error == found.error_without == 0


def test_realized_scales_are_the_ones_returned_and_measured() -> None:
    x, (w,), quantize = inputs(), layer(24), rounding(SYMMETRIC)

    def coarse(s: torch.Tensor) -> torch.Tensor:
        return torch.exp2(s.log2().round())

    found = awq.search([w], moment(x), x.abs().mean(dim=0), quantize, realize=coarse)
    assert bool((found.scales.log2() == found.scales.log2().round()).all())
    assert found.error == pytest.approx(exact(x, w, quantize(w * found.scales) / found.scales), rel=1e-3)


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_clipping_reports_true_errors_and_no_row_loses(scheme: WeightScheme) -> None:
    x, (w,), quantize = inputs(), layer(40), rounding(scheme)
    hessian = moment(x)
    found = awq.clip(w, hessian, quantize, 32)
    made = quantize(found.weight)
    assert found.error == pytest.approx(exact(x, w, made), rel=1e-3)
    assert found.error_without == pytest.approx(exact(x, w, quantize(w)), rel=1e-3)
    assert found.error < 0.95 * found.error_without
    before, after = (awq.output_error(q - w, hessian) for q in (quantize(w), made))
    assert bool((after <= before * (1 + 1e-4)).all())


def test_clipping_only_cuts() -> None:
    x, (w,) = inputs(), layer(16)
    clipped = awq.clip(w, moment(x), rounding(SYMMETRIC), 32).weight
    grouped, cut = w.view(16, 3, 32), clipped.view(16, 3, 32)
    assert bool((cut.abs() <= grouped.abs()).all())
    assert bool((cut.amax(dim=2) >= 0.549 * grouped.amax(dim=2)).all())
    inside = cut != grouped
    assert bool((cut[inside].sign() == grouped[inside].sign()).all())


def test_clipping_works_in_blocks_and_on_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (w,) = inputs(), layer(20)
    whole = awq.clip(w, moment(x), rounding(SYMMETRIC), 32)
    monkeypatch.setattr(awq, "_BLOCK", 96 * len(awq.SHRINK) * 3)
    blocks = awq.clip(w, moment(x), rounding(SYMMETRIC), 32)
    torch.testing.assert_close(blocks.weight, whole.weight)
    row = SYMMETRIC.model_copy(update={"group_size": -1})
    found = awq.clip(w, moment(x), rounding(row), -1)
    assert found.error <= found.error_without


def test_the_best_rows_come_from_the_smaller_error() -> None:
    x, (w,) = inputs(), layer(30)
    hessian = moment(x)
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(3)) * 0.01
    made = [METHOD.quantize(w, SYMMETRIC), METHOD.quantize(w + noise, SYMMETRIC)]
    best = awq.best_rows(w, hessian, made)
    errors = torch.stack([awq.output_error(m.dequantized - w, hessian) for m in made])
    assert 0 < int((errors[0] < errors[1]).sum()) < 30
    torch.testing.assert_close(awq.output_error(best.dequantized - w, hessian), errors.amin(dim=0))
    for row, choice in enumerate(errors.argmin(dim=0).tolist()):
        for suffix, tensor in best.tensors.items():
            assert torch.equal(tensor[row], made[choice].tensors[suffix][row])


def test_zero_weights_and_silent_inputs_are_left_alone() -> None:
    for w, x in ((torch.zeros(4, 32), inputs(width=32)), (layer(4, width=32)[0], torch.zeros(50, 32))):
        found = awq.search([w], moment(x), x.abs().mean(dim=0), rounding(SYMMETRIC))
        assert found.ratio is None
        clipped = awq.clip(w, moment(x), rounding(SYMMETRIC), 32)
        torch.testing.assert_close(clipped.weight, w)
