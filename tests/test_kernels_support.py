"""The helpers of the GPU tests notice what they are there for. On the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests import support_gpu as support
from trtllm_cli.errors import UnsupportedError

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.int64
]  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, support.needs_gpu])]
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("strides", [None, (9, 1), (1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_guarded_buffer_wants_every_element_and_nothing_else(device, dtype, strides):
    guarded = support.Guarded((3, 5), dtype, device=device, strides=strides)
    assert guarded.tensor.data_ptr() % (256 if device == "cuda" else 64) == 0
    with pytest.raises(AssertionError, match="15 of 15 elements .* not written"):
        guarded.check()
    guarded.check(written=False)
    guarded.tensor.copy_(torch.ones(3, 5))
    guarded.check()
    guarded.tensor[2, 4] = guarded._poison.view(dtype)[0]
    with pytest.raises(AssertionError, match="1 of 15 elements .* the first is number 14"):
        guarded.check()
    guarded.tensor.copy_(torch.ones(3, 5))
    start = guarded.tensor.storage_offset()
    for outside in (start - 1, start + 1000 // dtype.itemsize):
        guarded.tensor.as_strided((1,), (1,), outside).zero_()
        with pytest.raises(AssertionError, match="bytes outside a buffer"):
            guarded.check()
        guarded._bytes.copy_(torch.where(guarded._outside, guarded._before, guarded._bytes))


def test_the_gap_between_rows_is_guarded(device):
    guarded = support.Guarded((3, 5), torch.float16, device=device, strides=(8, 1))
    guarded.tensor.as_strided((3, 8), (8, 1)).zero_()
    with pytest.raises(AssertionError, match=r"bytes outside .*\+10 bytes from its start"):
        guarded.check()


def test_empty_buffers(device):
    for shape in ((0, 5), (3, 0)):
        support.Guarded(shape, torch.float16, device=device).check()


def test_allocations_in_the_block_are_guarded(device):
    with support.guarded_allocations() as made:
        one = torch.empty(3, 4, dtype=torch.float16, device=device).fill_(1)
        torch.empty_like(one, dtype=torch.int8).fill_(2)
        one.new_empty((2,)).fill_(0)
        torch.empty((2, 3), device=device).zero_()
    assert [(tuple(g.tensor.shape), g.tensor.dtype) for g in made] == [
        ((3, 4), torch.float16), ((3, 4), torch.int8), ((2,), torch.float16), ((2, 3), torch.float32)
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="not written"), support.guarded_allocations():
        torch.empty(3, device=device)
    with support.guarded_allocations(written=False):
        torch.empty(3, device=device)
    assert torch.empty(2).storage_offset() == 0, "outside the block memory is as ever"


def test_poison_surrounds_an_input(device):
    x = torch.arange(12.0, device=device).view(3, 4)
    held = support.among_poison(x)
    support.assert_same_bits(held, x)
    around = held.as_strided((14,), (1,), held.storage_offset() - 1)
    assert around[[0, -1]].isnan().all()
    gapped = support.with_row_gap(x, 2)
    assert gapped.stride() == (6, 1) and torch.equal(gapped, x)
    assert gapped.as_strided((1,), (1,), gapped.storage_offset() + 4).isnan().all()


def test_bits_that_differ_are_found(device):
    zero = torch.zeros(3, device=device)
    with pytest.raises(AssertionError, match="differ in 3 of 12 bytes"):
        support.assert_same_bits(zero, -zero)
    nan = torch.full((3,), float("nan"), device=device)
    support.assert_same_bits((nan, None), (nan.clone(), None))
    calls = iter([zero, zero, zero + 1])
    with pytest.raises(AssertionError, match="two runs differ"):
        support.assert_repeats(lambda: next(calls))


def test_a_refusal_must_say_what_and_what_to_do(device):
    def refused(hint: str = "use 64") -> None:
        raise UnsupportedError("KERNEL_REFUSED", "x takes head size 64, not 72", hint)

    support.assert_refused(refused, "head size", "use 64")
    with pytest.raises(AssertionError, match="'tokens' is not in"):
        support.assert_refused(refused, "tokens")
    with pytest.raises(AssertionError, match="no remedy"):
        support.assert_refused(lambda: refused(""))


@pytest.mark.gpu
@support.needs_gpu
def test_a_replay_that_differs_is_found(device):
    if device == "cpu":
        pytest.skip("there are no graphs on a CPU")
    first, second = torch.ones(8, device=device), torch.arange(8.0, device=device)
    support.assert_replays(lambda x: x * 2, [first], [second])
    support.assert_replays(lambda x: x.mul_(2), [first], [second])
    held = first.clone()
    with pytest.raises(AssertionError, match="replayed graph"):
        support.assert_replays(lambda x: held.add_(x).clone(), [first], [second])
