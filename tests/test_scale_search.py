"""The scale search against brute force in float64, and the grid's codes against the nearest value there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.quantize import methods
from trtllm_cli.quantize.methods import grid as grids

INT8 = WeightScheme(type="int8", granularity="channel")


def int4(group: int, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(type="int4", granularity="group", group_size=group, symmetric=symmetric, scale_dtype="float16")


SCHEMES = {"int4-symmetric": int4(32), "int4-asymmetric": int4(32, False), "int4-row": int4(-1), "int8": INT8}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def normal(seed: int, rows: int, inputs: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, (rows, inputs))).float()


def errors(w: torch.Tensor, grid: grids.Grid, importance: torch.Tensor | None = None) -> np.ndarray:
    """Weighted squared error of each group [N, G], float64."""
    off = (grids.decode(grids.encode(w, grid), grid).double() - w.double()) ** 2
    if importance is not None:
        off = off * importance.double()
    return off.view(*grid.scale.shape, -1).sum(dim=2).numpy()


def brute_force(group: np.ndarray, importance: np.ndarray, bits: int, symmetric: bool) -> float:
    """The least weighted squared error over 4000 scales of either sign (and all zero points)."""
    top = np.abs(group).max()
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    span = top / high if symmetric else (max(group.max(), 0) - min(group.min(), 0)) / 15
    best = np.inf
    scales = span * np.linspace(0.3, 1.2, 2000)
    for zero in [None] if symmetric else range(16):
        for scale in np.concatenate([scales, -scales]) if symmetric else scales:
            least, most = (low, high) if zero is None else (-zero, 15 - zero)
            value = np.clip(np.rint(group / scale), least, most) * scale
            best = min(best, float((importance * (group - value) ** 2).sum()))
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("scheme", "inputs"), [(int4(64), 64), (int4(64, False), 64), (INT8, 512)])
def test_the_search_comes_close_to_brute_force(scheme, inputs, weighted):
    w = normal(0, 12, inputs)
    importance = torch.rand(inputs, generator=torch.Generator().manual_seed(0)) ** 2 if weighted else torch.ones(inputs)
    found = errors(w, grids.fit(w, scheme, importance, True), importance)
    least = np.array(
        [brute_force(row, importance.numpy(), scheme.bits, scheme.symmetric) for row in w.double().numpy()]
    )
    assert found.sum() <= 1.05 * least.sum()


@each_scheme
def test_the_search_gains(scheme):
    w = normal(1, 64, 256)
    alike = torch.ones(256)
    plain = grids.fit(w, scheme, None, False)
    assert (
        errors(w, grids.fit(w, scheme, alike, True)).sum()
        < (0.95 if scheme.bits == 4 else 0.99) * errors(w, plain).sum()
    )


@each_scheme
def test_without_importance_large_weights_count_more(scheme):
    w = normal(8, 64, 256)
    squares = w.double().square()
    plain, alike, by_size = (
        grids.fit(w, scheme, importance, search)
        for importance, search in ((None, False), (torch.ones(256), True), (None, True))
    )
    off = [
        float(((grids.decode(grids.encode(w, g), g) - w).double().square() * squares).sum())
        for g in (plain, alike, by_size)
    ]
    assert off[2] < off[0]
    assert off[2] < off[1]


ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64])),
    elements=st.floats(-1e4, 1e4, width=32),
    fill=st.floats(-1, 1, width=32),
)


@settings(max_examples=150, deadline=None)
@given(w=ROWS, scheme=st.sampled_from(list(SCHEMES.values())), weighted=st.booleans())
@example(w=np.zeros((2, 32), np.float32), scheme=int4(32, False), weighted=False)
@example(w=np.full((1, 32), 1e-42, np.float32), scheme=INT8, weighted=False)
@example(w=np.full((1, 32), 1e-42, np.float32), scheme=int4(32), weighted=False)
@example(w=np.full((1, 32), -4.5e5, np.float32), scheme=int4(32), weighted=False)
@example(w=np.float32([[9e5, -1] * 16]), scheme=int4(32, False), weighted=True)
@example(w=np.float32([[3e38, -1e-38] * 16]), scheme=INT8, weighted=True)
def test_the_search_is_never_worse_and_always_storable(w, scheme, weighted):
    rows = torch.from_numpy(w)
    importance = torch.linspace(0, 1, w.shape[1]) if weighted else None
    searched = grids.fit(rows, scheme, importance, True)
    measure = torch.ones(w.shape[1]) if importance is None else importance
    before, after = (errors(rows, grids.fit(rows, scheme, measure, search), measure) for search in (False, True))
    assert (after <= before * (1 + 1e-5) + 1e-30).all() or not np.isfinite(before).all()
    assert bool(torch.isfinite(searched.scale).all())
    assert bool((searched.scale != 0).all())
    if scheme.scale_dtype == "float16":
        assert torch.equal(searched.scale.to(torch.float16).float(), searched.scale)
    if searched.zero is not None:
        assert bool(((searched.zero >= 0) & (searched.zero <= 15) & (searched.zero == searched.zero.round())).all())
    values = grids.decode(grids.encode(rows, searched), searched)
    assert bool((values[rows == 0] == 0).all()), "zero is not exact"


@each_scheme
def test_a_code_is_the_nearest_there_is(scheme):
    w = normal(2, 6, 64)
    grid = grids.fit(w, scheme, None, True)
    codes = grids.encode(w, grid)
    assert codes.dtype == torch.uint8
    width = w.shape[1] // grid.scale.shape[1]
    usable = np.arange(16) if scheme.bits == 4 else np.arange(1, 256)
    offset = grid.zero if grid.zero is not None else torch.full_like(grid.scale, 8.0 if scheme.bits == 4 else 128.0)
    scale, zero = (t.double().numpy().repeat(width, axis=1)[:, :, None] for t in (grid.scale, offset))
    distance = np.abs((usable - zero) * scale - w.double().numpy()[:, :, None])
    ours = np.abs((codes.double().numpy()[:, :, None] - zero) * scale - w.double().numpy()[:, :, None])[:, :, 0]
    assert ours == pytest.approx(distance.min(axis=2), rel=1e-5, abs=1e-7)


def test_one_sided_groups_use_the_code_that_has_no_opposite():
    # -8 .. 7 holds these exactly, with the sign of the scale that maps the largest magnitude to -8
    for sign in (1, -1):
        w = sign * torch.tensor([[8.0, 1, 2, 3, -7, 5, -6, 4] * 4])
        grid = grids.fit(w, int4(32), None, True)
        assert grid.scale.tolist() == [[-sign]]
        assert torch.equal(grids.decode(grids.encode(w, grid), grid), w)


def test_an_unimportant_outlier_does_not_set_the_scale():
    w = normal(3, 8, 32)
    w[:, 7] = 100
    importance = torch.ones(32)
    importance[7] = 0
    for scheme in (int4(32), int4(32, False), INT8):
        with_outlier = errors(w, grids.fit(w, scheme, importance, True), importance).sum()
        alike = errors(w, grids.fit(w, scheme, torch.ones(32), True), importance).sum()
        assert with_outlier < alike


def test_where_nothing_is_important_the_range_decides():
    w = normal(4, 8, 64)
    importance = torch.zeros(64)
    for scheme in SCHEMES.values():
        assert torch.equal(grids.fit(w, scheme, importance, True).scale, grids.fit(w, scheme, importance, False).scale)


@each_scheme
@pytest.mark.parametrize("search", [False, True])
def test_blocks_of_rows_leave_no_seam(scheme, search, monkeypatch):
    w = normal(5, 21, 64)
    importance = torch.linspace(0.1, 1, 64)
    whole = grids.fit(w, scheme, importance, search)
    monkeypatch.setattr(grids, "_CPU_BLOCK", 200)
    parts = grids.fit(w, scheme, importance, search)
    assert torch.equal(whole.scale, parts.scale)
    assert whole.zero is None or (parts.zero is not None and torch.equal(whole.zero, parts.zero))


@each_scheme
def test_what_is_packed_is_what_the_grid_says(scheme):
    w = normal(6, 5, 64)
    grid = grids.fit(w, scheme, None, True)
    codes = grids.encode(w, grid)
    assert torch.equal(grids.pack(codes, grid, scheme).dequantized, grids.decode(codes, grid))
    if scheme.type == "int4" and scheme.group_size == 32:
        group = torch.arange(64).flip(0) // 32
        made = grids.pack(codes, grid, scheme, group)
        assert torch.equal(made.dequantized, grids.decode(codes, grid, group))
        swapped = grids.Grid(grid.scale.flip(1), None if grid.zero is None else grid.zero.flip(1), 4)
        assert torch.equal(made.dequantized, grids.decode(codes, swapped))


@pytest.mark.parametrize("name", ["int4-weight-only", "int8-weight-only"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_only_methods_search_when_asked(name, symmetric):
    w = normal(7, 32, 128)
    method = methods.method(name)
    scheme, _ = method.scheme(128, 64, symmetric)
    plain, searched = (method.quantize(w, scheme, search) for search in (False, True))
    off = [float(((made.dequantized - w) * w).norm()) for made in (plain, searched)]
    assert off[1] < off[0]
    for made in (plain, searched):
        declared = method.tensors(scheme, 32, 128)
        assert {suffix: tuple(tensor.shape) for suffix, tensor in made.tensors.items()} == {
            suffix: shape for suffix, (_, shape) in declared.items()
        }


def test_a_scale_beyond_float16_is_refused_with_search_too():
    with pytest.raises(UnsupportedError, match="SCALE_RANGE"):
        grids.fit(torch.full((1, 32), 1e6), int4(32), None, True)
