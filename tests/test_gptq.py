"""GPTQ against the paper's equations in numpy float64, and against what no better code may exist for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.quantized import dequantize_8bit, dequantize_int4, unpack_int4
from trtllm_cli.quantize.methods import grid as grids
from trtllm_cli.quantize.methods.gptq import GptqResult, gptq

INT8 = WeightScheme(type="int8", granularity="channel")


def int4(group: int, symmetric: bool = True, index: bool = False) -> WeightScheme:
    return WeightScheme(
        type="int4",
        granularity="group",
        group_size=group,
        symmetric=symmetric,
        scale_dtype="float16",
        group_index=index,
    )


def layer(seed: int, rows: int, inputs: int, tokens: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((inputs, inputs)) / np.sqrt(inputs) + 0.5 * np.eye(inputs)
    x = rng.standard_normal((tokens, inputs)) @ mixing * np.exp(rng.standard_normal(inputs))
    w = rng.standard_t(4, (rows, inputs))
    return torch.from_numpy(w).float(), torch.from_numpy(x.T @ x / tokens).float()


def power(rows: np.ndarray, hessian: torch.Tensor) -> np.ndarray:
    return np.einsum("nk,kl,nl->n", rows, hessian.double().numpy(), rows)


# ---- the paper's algorithm, one input at a time, with the inverse itself ----


def naive_range(group: np.ndarray, scheme: WeightScheme) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) of each row of a group by the documented formulas; zero is what is added to make a code."""
    if scheme.symmetric:
        scale = np.abs(group).max(axis=1) / (7 if scheme.bits == 4 else 127)
        zero = np.full(scale.shape, 8.0 if scheme.bits == 4 else 128.0)
    else:
        low, high = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
        scale = (high - low) / 15
        zero = np.round(-low / scale.astype(np.float16).astype(float))
    stored = np.float16 if scheme.scale_dtype == "float16" else np.float32
    return scale.astype(stored).astype(float), zero


def naive(w: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, act_order: str, damping: float):
    """(codes [N, K], dequantized [N, K]) by equations 2 and 3 of the paper (those of OBQ), in float64."""
    weight, metric = w.double().numpy().copy(), hessian.double().numpy()
    inputs = weight.shape[1]
    width = inputs if scheme.group_size in (None, -1) else scheme.group_size
    order = np.arange(inputs) if act_order == "none" else np.argsort(-np.diag(metric), kind="stable")
    first = [naive_range(weight[:, at : at + width], scheme) for at in range(0, inputs, width)]
    inverse = np.linalg.inv(metric + damping * np.diag(metric).mean() * np.eye(inputs))
    codes, values = np.zeros_like(weight), np.zeros_like(weight)
    lowest, highest = (0, 15) if scheme.bits == 4 else (1, 255)
    for position, i in enumerate(order):
        if act_order == "static":
            scale, zero = first[i // width]
        elif position % width == 0:
            scale, zero = naive_range(weight[:, order[position : position + width]], scheme)
        codes[:, i] = np.clip(np.rint(weight[:, i] / scale) + zero, lowest, highest)
        values[:, i] = (codes[:, i] - zero) * scale
        left = order[position:]
        error = (weight[:, i] - values[:, i]) / inverse[i, i]
        weight[:, left] -= np.outer(error, inverse[i, left])
        inverse -= np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return codes, values


def codes_of(made: GptqResult) -> np.ndarray:
    stored = made.quantized.tensors["weight"]
    return stored.short().numpy() + 128 if stored.dtype == torch.int8 else unpack_int4(stored).short().numpy()


@pytest.mark.parametrize("act_order", ["none", "static", "dynamic"])
@pytest.mark.parametrize(
    ("group", "symmetric", "inputs", "block"),
    [(32, True, 96, 128), (32, False, 160, 64), (64, True, 192, 32), (128, False, 256, 48), (-1, False, 100, 16)],
)
def test_the_sweep_is_the_papers(act_order, group, symmetric, inputs, block):
    w, hessian = layer(inputs, 12, inputs)
    scheme = int4(group, symmetric, act_order == "dynamic")
    made = gptq(w, hessian, scheme, act_order=act_order, search=False, passes=0, block=block)
    codes, values = naive(w, hessian, scheme, act_order, 0.01)
    assert np.array_equal(codes_of(made), codes)
    assert made.quantized.dequantized.numpy() == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert (made.damping, made.note) == (0.01, None)


@pytest.mark.parametrize("act_order", ["none", "static"])
def test_int8_per_channel_is_the_papers(act_order):
    w, hessian = layer(1, 12, 96)
    made = gptq(w, hessian, INT8, act_order=act_order, search=False, passes=0)
    codes, values = naive(w, hessian, INT8, act_order, 0.01)
    assert np.array_equal(codes_of(made), codes)
    assert made.quantized.dequantized.numpy() == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_a_given_damping_is_the_one_used():
    w, hessian = layer(2, 8, 64)
    made = gptq(w, hessian, int4(32), damping=0.3, search=False, passes=0)
    assert made.damping == 0.3
    assert np.array_equal(codes_of(made), naive(w, hessian, int4(32), "static", 0.3)[0])


# ---- what is stored ----


def stored_values(made: GptqResult) -> torch.Tensor:
    t = made.quantized.tensors
    if t["weight"].dtype == torch.int8:
        return dequantize_8bit(t["weight"], t["weight_scale"])
    return dequantize_int4(t["weight"], t["weight_scale"], t.get("weight_zero"), t.get("weight_group"))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    shape=st.sampled_from([(32, 32), (96, 32), (128, 64), (256, 128), (50, -1), (72, 24)]),
    symmetric=st.booleans(),
    act_order=st.sampled_from(["none", "static", "dynamic"]),
    search=st.booleans(),
    block=st.sampled_from([1, 7, 32, 128]),
    passes=st.integers(0, 2),
)
def test_what_is_stored_is_what_is_reported(seed, rows, shape, symmetric, act_order, search, block, passes):
    inputs, group = shape
    w, hessian = layer(seed, rows, inputs, 300)
    given = w.clone(), hessian.clone()
    scheme = int4(group, symmetric, act_order == "dynamic")
    made = gptq(w, hessian, scheme, act_order=act_order, search=search, block=block, passes=passes)
    assert torch.equal(w, given[0])
    assert torch.equal(hessian, given[1])
    assert torch.equal(stored_values(made), made.quantized.dequantized)
    difference = (made.quantized.dequantized.double() - w.double()).numpy()
    assert made.loss.numpy() == pytest.approx(power(difference, hessian), rel=1e-3, abs=1e-9)
    tensors = made.quantized.tensors
    width = inputs if group == -1 else group
    assert tensors["weight_scale"].shape == (rows, inputs // width)
    assert tensors["weight_scale"].dtype == torch.float16
    assert ("weight_zero" in tensors) == (not symmetric)
    assert ("weight_group" in tensors) == (act_order == "dynamic")
    if act_order == "dynamic":
        index = tensors["weight_group"]
        assert index.dtype == torch.int32
        assert torch.bincount(index).tolist() == [width] * (inputs // width)
        largest_first = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        assert torch.equal(index[largest_first], torch.arange(inputs, dtype=torch.int32) // width)
    again = gptq(w, hessian, scheme, act_order=act_order, search=search, block=block, passes=passes)
    assert all(torch.equal(tensor, again.quantized.tensors[name]) for name, tensor in tensors.items())


def test_modules_that_share_an_input_can_be_stacked():
    w, hessian = layer(3, 40, 128)
    whole = gptq(w, hessian, int4(32, False))
    parts = [gptq(part, hessian, int4(32, False)) for part in (w[:13], w[13:])]
    for name, tensor in whole.quantized.tensors.items():
        assert torch.equal(tensor, torch.cat([part.quantized.tensors[name] for part in parts]))


# ---- how good it is ----


def rounded(w: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Rounded to nearest by the weight-only formulas."""
    fitted = grids.fit(w, scheme, None, False)
    return grids.decode(grids.encode(w, fitted), fitted)


@pytest.mark.parametrize("scheme", [int4(32), int4(64, False), int4(-1), INT8], ids=["g32s", "g64a", "row", "int8"])
def test_without_correlations_it_is_round_to_nearest(scheme):
    w, _ = layer(4, 16, 128)
    diagonal = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.1)
    for act_order in ("none", "static"):
        made = gptq(w, diagonal, scheme, act_order=act_order, search=False, passes=0)
        assert torch.equal(made.quantized.dequantized, rounded(w, scheme))
    if scheme.type == "int4":
        dynamic = scheme.model_copy(update={"group_index": True})
        order = torch.argsort(diagonal.diagonal(), descending=True)
        made = gptq(w, diagonal, dynamic, act_order="dynamic", search=False, passes=0)
        assert torch.equal(made.quantized.dequantized[:, order], rounded(w[:, order], scheme))


@pytest.mark.parametrize("scheme", [int4(32), int4(32, False), int4(-1), INT8], ids=["g32s", "g32a", "row", "int8"])
def test_each_refinement_lowers_the_error(scheme):
    w, hessian = layer(5, 64, 256)
    nearest = power((rounded(w, scheme) - w).double().numpy(), hessian).sum()
    plain = float(gptq(w, hessian, scheme, search=False, passes=0).loss.sum())
    searched = float(gptq(w, hessian, scheme, passes=0).loss.sum())
    losses = [float(gptq(w, hessian, scheme, passes=passes).loss.sum()) for passes in (1, 3, 10)]
    assert plain < 0.6 * nearest
    assert searched < plain
    assert searched > losses[0] > losses[1] > losses[2]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scheme=st.sampled_from([int4(32), int4(32, False), int4(64), int4(-1, False), INT8]),
    search=st.booleans(),
)
def test_a_pass_of_descent_raises_the_error_of_no_row(seed, scheme, search):
    w, hessian = layer(seed, 6, 64, 200)
    before = gptq(w, hessian, scheme, search=search, passes=0, block=32).loss
    after = gptq(w, hessian, scheme, search=search, passes=1, block=32).loss
    assert bool((after <= before * (1 + 1e-4) + 1e-7).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_the_end_no_single_code_can_be_improved(symmetric):
    w, hessian = layer(6, 6, 64)
    made = gptq(w, hessian, int4(32, symmetric), passes=60)
    metric = hessian.double().numpy()
    scale = made.quantized.tensors["weight_scale"].double().numpy().repeat(32, axis=1)
    error = made.quantized.dequantized.double().numpy() - w.double().numpy()
    codes = codes_of(made)
    for step in (-1, 1):
        change = 2 * step * scale * (error @ metric) + scale**2 * np.diag(metric)
        allowed = (codes + step >= 0) & (codes + step <= 15)
        assert change[allowed].min() > -1e-5 * made.loss.mean().item()


# ---- Hessians that are hardly usable ----


def with_nan(hessian: torch.Tensor) -> torch.Tensor:
    broken = hessian.clone()
    broken[3, 5] = float("nan")
    return broken


def with_infinity(hessian: torch.Tensor) -> torch.Tensor:
    broken = hessian.clone()
    broken[0, 0] = float("inf")
    return broken


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (with_nan, "NaN"),
        (with_infinity, "infinite"),
        (torch.zeros_like, "every calibration input is zero"),
        (lambda hessian: hessian - 40 * hessian.diagonal().mean() * torch.ones(64, 64).triu(1), "positive definite"),
        (lambda hessian: -hessian, "every calibration input is zero"),
    ],
    ids=["nan", "infinity", "zero", "indefinite", "negative"],
)
@pytest.mark.parametrize("act_order", ["static", "dynamic"])
def test_an_unusable_hessian_rounds_to_nearest_and_says_why(broken, reason, act_order):
    w, hessian = layer(7, 8, 64)
    hessian = broken(hessian)
    hessian = torch.triu(hessian) + torch.triu(hessian, 1).T
    scheme = int4(32, index=act_order == "dynamic")
    made = gptq(w, hessian, scheme, act_order=act_order, search=False)
    assert made.damping == 0
    assert made.note is not None
    assert made.note.startswith("rounded to nearest: ")
    assert reason in made.note
    assert torch.equal(made.quantized.dequantized, rounded(w, int4(32)))
    assert torch.equal(stored_values(made), made.quantized.dequantized)


def test_damping_rises_until_the_factorization_succeeds():
    w, hessian = layer(8, 8, 64)
    values, vectors = torch.linalg.eigh(hessian.double())
    # one direction of negative power, as rounding in half precision can leave it
    values[0] = -0.05 * float(hessian.diagonal().double().mean())
    bent = (vectors * values @ vectors.T).float()
    made = gptq(w, bent, int4(32), search=False)
    assert (made.damping, made.note) == (0.1, None)
    stuck = gptq(w, bent, int4(32), damping=0.01, search=False)
    assert stuck.note is not None
    assert "damping 0.01" in stuck.note
    assert gptq(w, bent, int4(32), damping=0.06, search=False).note is None


def test_fewer_tokens_than_inputs_are_enough():
    w, hessian = layer(9, 8, 128, tokens=20)
    made = gptq(w, hessian, int4(32))
    assert made.note is None
    nearest = power((rounded(w, int4(32)) - w).double().numpy(), hessian).sum()
    assert float(made.loss.sum()) < 0.2 * nearest
    # what the tokens do not show keeps its value
    assert float((made.quantized.dequantized - w).norm() / w.norm()) < 0.25


@pytest.mark.parametrize("passes", [0, 3])
def test_an_input_that_was_always_zero_is_rounded_to_nearest(passes):
    w, hessian = layer(10, 8, 96)
    dead = torch.tensor([0, 40, 41, 95])
    hessian[dead] = 0
    hessian[:, dead] = 0
    made = gptq(w, hessian, int4(32), search=False, passes=passes)
    assert made.note is None
    scale = made.quantized.tensors["weight_scale"].float().repeat_interleave(32, dim=1)
    off = (made.quantized.dequantized - w).abs() / scale
    clipped = (w / scale).abs() > 7
    assert bool((off[:, dead][~clipped[:, dead]] <= 0.5 + 1e-4).all())
    live = torch.tensor([i for i in range(96) if i not in dead.tolist()])
    if passes == 0:
        # the others fare as if it were not there
        without = gptq(w * (hessian.diagonal() > 0), hessian, int4(32), search=False, passes=0)
        fair = made.quantized.tensors["weight_scale"] == without.quantized.tensors["weight_scale"]
        same = fair.repeat_interleave(32, dim=1).all(dim=1)
        assert bool(same.any())
        assert torch.equal(made.quantized.dequantized[same][:, live], without.quantized.dequantized[same][:, live])


def test_rows_and_groups_of_zeros_stay_zero():
    w, hessian = layer(11, 8, 96)
    w[1] = 0
    for symmetric in (True, False):
        made = gptq(w, hessian, int4(32, symmetric))
        assert not made.quantized.dequantized[1].any()
        assert bool(torch.isfinite(made.quantized.dequantized).all())


def test_what_does_not_fit_together_is_refused():
    w, hessian = layer(12, 4, 64)
    with pytest.raises(ValueError, match="64 inputs"):
        gptq(w, hessian[:32, :32], int4(32))
    with pytest.raises(ValueError, match="dynamic"):
        gptq(w, hessian, int4(32), act_order="dynamic")
    with pytest.raises(ValueError, match="group_index"):
        gptq(w, hessian, int4(32, index=True), act_order="static")
    with pytest.raises(ValueError, match="48"):
        gptq(w, hessian, int4(48))
    with pytest.raises(ValueError, match="fp8"):
        gptq(w, hessian, WeightScheme(type="fp8", granularity="channel"))
    with pytest.raises(UnsupportedError, match="SCALE_RANGE"):
        gptq(w * 1e6, hessian, int4(32))
