"""What tests of CUDA kernels share. The helpers work on CPU tensors too, where they check the twin behind the operator.

@gpu_examples                                  # hypothesis: few examples, the same ones every run
@given(tokens=st.integers(1, 70), ...)
def test_x(tokens): ...

with guarded_allocations():                    # every torch.empty inside: poisoned, with canaries around it
    y = pointwise.gated(...)                   # on leaving: canaries must be intact and no element of the poison left

out = Guarded((3, 5), torch.float16)           # the same for a caller's own buffer: out.tensor; then out.check()
x = among_poison(x)                            # the same values amid NaN: an out-of-bounds read shows in the result
x = with_row_gap(x, 8)                         # the same values, rows 8 elements further apart, NaN in the gaps
assert_repeats(lambda: op(x))                  # bit-identical, three calls
assert_replays(op, [x1], [x2])                 # captured on x1, replayed on x2's values: the bits of op(x2)
assert_refused(lambda: op(bad), "head size", "use 128")        # UnsupportedError KERNEL_REFUSED, sentence has both
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from trtllm_cli.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here")

#: |found - wanted| / |wanted| that rounding alone explains
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}

#: decorator of hypothesis tests on a GPU: examples are launches, cheap but for the float64 oracle
gpu_examples = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

_GUARD_BYTES = 4096  # keeps any alignment a launcher asks for
_POISONS = {torch.int8: -128, torch.uint8: 255, torch.int32: -(2**31), torch.int64: -(2**63), torch.bool: True}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """``wanted`` in float64; the bound is on the norm of the difference, every element must be finite."""
    assert found.shape == wanted.shape
    assert bool(torch.isfinite(found).all()), "some elements are not finite"
    allowed = TOLERANCES[found.dtype] if tolerance is None else tolerance
    error = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error <= allowed, f"relative error {error:.2e} above {allowed:.0e}"


def bits(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor``, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(found: Any, wanted: Any, what: str = "two runs") -> None:
    """Tensors, or tuples and lists of tensors and None, equal bit by bit."""
    if found is None or wanted is None:
        assert found is wanted
        return
    if not isinstance(found, Tensor):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert_same_bits(one, other, what)
        return
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    differ = int((bits(found) != bits(wanted)).sum())
    assert differ == 0, f"{what} differ in {differ} of {found.numel() * found.element_size()} bytes"


def assert_repeats(call: Callable[[], Any], times: int = 3) -> Any:
    """``call`` gives the same bits each time; the result. Let it return clones of what it changes in place."""
    first = _kept(call())
    for _ in range(times - 1):
        assert_same_bits(call(), first)
    return first


def assert_replays(call: Callable[..., Any], first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    """A CUDA graph of ``call(*first)``, replayed after ``second`` was copied in, gives the bits of ``call(*second)``.

    ``call`` may change its inputs, when it returns what it changed. Without a GPU nothing is checked.
    """
    if not torch.cuda.is_available():
        return
    wanted = _kept(call(*[_kept(x) for x in second]))
    inputs = [_kept(x) for x in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*[_kept(x) for x in first])  # first use: module load, attributes, workspaces
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(*inputs)
    for _ in range(2):
        for held, new in zip(inputs, second):
            if held is not None and new is not None:
                held.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(found, wanted, "a replayed graph and a direct call")


def assert_refused(call: Callable[[], Any], *parts: str, code: str = "KERNEL_REFUSED") -> str:
    """``call`` raises a user error of that code whose sentence and remedy contain every one of ``parts``; its text."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code
    text = f"{caught.value.message} | {caught.value.hint}"
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
    assert caught.value.hint, "no remedy"
    return text


class Guarded:
    """A buffer for a kernel's output: poison where it must write, canaries before, behind and in the gaps between rows.

    ``strides`` in elements (default: contiguous). The poison is NaN; for integers the least value, which saturating
    kernels do not write (pass ``poison`` where a result may hold it).
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cuda",
        strides: Sequence[int] | None = None,
        poison: float | None = None,
    ) -> None:
        shape = tuple(shape)
        if strides is None:
            strides = tuple(math.prod(s or 1 for s in shape[i + 1 :]) for i in range(len(shape)))
        extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        size = torch.empty((), dtype=dtype).element_size()
        total = 2 * _GUARD_BYTES + -(-extent * size // _GUARD_BYTES) * _GUARD_BYTES
        # no two neighbouring words alike, and never the pattern of a poison
        self._bytes = (torch.arange(total, device=device) * 37 % 199 + 23).to(torch.uint8)
        self.tensor = self._view(self._bytes, dtype, shape, strides, size)
        if poison is None:
            poison = _POISONS.get(dtype, math.nan)
        self._poison = bits(
            torch.full((1,), poison, device=device).to(dtype)
            if math.isnan(poison)
            else torch.full((1,), poison, dtype=dtype, device=device)
        )
        self.tensor.copy_(self._poison.view(dtype).expand(shape) if shape else self._poison.view(dtype)[0])
        self._before = self._bytes.clone()
        inside = torch.zeros(total, dtype=torch.uint8, device=device)
        self._view(inside, torch.uint8, (*shape, size), (*[s * size for s in strides], 1), 1).fill_(1)
        self._outside = inside == 0

    @staticmethod
    def _view(raw: Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], size: int) -> Tensor:
        return raw.view(dtype).as_strided(tuple(shape), tuple(strides), _GUARD_BYTES // size)

    def check(self, written: bool = True) -> Tensor:
        """Canaries are intact and, with ``written``, no element still holds the poison. The tensor."""
        if self.tensor.is_cuda:
            torch.cuda.synchronize()
        touched = ((self._bytes != self._before) & self._outside).nonzero().reshape(-1)
        assert len(touched) == 0, (
            f"{len(touched)} bytes outside a buffer of shape {tuple(self.tensor.shape)} {self.tensor.dtype} were "
            f"written, the first {int(touched[0]) - _GUARD_BYTES:+d} bytes from its start"
        )
        if written and self.tensor.numel():
            held = bits(self.tensor).view(-1, self._poison.numel())
            left = (held == self._poison).all(dim=1).nonzero().reshape(-1)
            assert len(left) == 0, (
                f"{len(left)} of {self.tensor.numel()} elements of a buffer of shape {tuple(self.tensor.shape)} were "
                f"not written, the first is number {int(left[0])}"
            )
        return self.tensor


@contextlib.contextmanager
def guarded_allocations(written: bool = True, least_bytes: int = 0) -> Iterator[list[Guarded]]:
    """Every ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` in the block gives a `Guarded` buffer,
    checked at its end. ``written=False`` leaves out the check that everything was written (a workspace need not be);
    buffers below ``least_bytes`` are not checked for it either."""
    made: list[Guarded] = []
    real_empty, real_like, real_new = torch.empty, torch.empty_like, Tensor.new_empty

    def give(shape: Sequence[int], dtype: torch.dtype | None, device: Any) -> Tensor:
        with _patched(real_empty, real_like, real_new):
            made.append(Guarded(shape, dtype or torch.get_default_dtype(), device=device or torch.get_default_device()))
        return made[-1].tensor

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return give(size[0] if size and not isinstance(size[0], int) else size, dtype, device)

    def empty_like(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return give(x.shape, dtype or x.dtype, device or x.device)

    def new_empty(x: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    with _patched(empty, empty_like, new_empty):
        yield made
    for one in made:
        # a workspace is raw bytes, and any byte may be part of what a kernel keeps there
        raw = one.tensor.dtype == torch.uint8
        one.check(written and not raw and one.tensor.nbytes >= least_bytes)


@contextlib.contextmanager
def _patched(empty: Any, empty_like: Any, new_empty: Any) -> Iterator[None]:
    before = torch.empty, torch.empty_like, Tensor.new_empty
    torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = before  # type: ignore[method-assign]


def among_poison(tensor: Tensor) -> Tensor:
    """The same values, type and strides, in a buffer with poison before, behind and in the gaps: what is read out of
    bounds and used makes the result NaN (integers: the greatest value)."""
    elements = _GUARD_BYTES // tensor.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    total = 2 * elements + extent
    if tensor.dtype.is_floating_point:
        raw = torch.full((total,), math.nan, device=tensor.device).to(tensor.dtype)
    else:
        value = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
        raw = torch.full((total,), value, dtype=tensor.dtype, device=tensor.device)
    held = raw.as_strided(tuple(tensor.shape), tensor.stride(), elements)
    held.copy_(tensor)
    return held


def with_row_gap(tensor: Tensor, gap: int) -> Tensor:
    """The same values with the rows of the last axis ``gap`` elements further apart, poison between them."""
    rows = tensor.shape[:-1]
    wide = torch.empty(*rows, tensor.shape[-1] + gap, dtype=tensor.dtype, device=tensor.device)
    return among_poison(wide[..., : tensor.shape[-1]].copy_(tensor))


def _kept(value: Any) -> Any:
    """A copy that later calls cannot change; strides stay."""
    if isinstance(value, Tensor):
        return among_poison(value) if value.numel() and not value.is_contiguous() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_kept(one) for one in value)
    return value
