"""Weight-only products on tensor cores, against the twin in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support_gpu import (
    Guarded,
    among_poison,
    assert_refused,
    assert_repeats,
    assert_replays,
    gpu_examples,
    needs_gpu,
    with_row_gap,
)
from tests.support_weight_only import KINDS, made_weight
from tests.test_gpu_weight_only import activations, agrees

pytestmark = [pytest.mark.gpu, needs_gpu]
DTYPES = [torch.bfloat16, torch.float16]
PACKED = [kind for kind in KINDS if kind != "dense"]
#: the portable kernel, every tile of the persistent and of the split one, and the ways the latter splits
PORTABLE, PERSISTENT = 101, [102, 103, 104]
TILES = [4211, 5211, 6211, 4411, 5411, 6411, 7411]
CLUSTERS = [4212, 4213, 4214, 4218, 4416, 5213, 5216, 5417, 6212, 6215, 6418, 7412, 7413, 7418]


@pytest.fixture(autouse=True)
def _hopper_tactics(request: pytest.FixtureRequest) -> None:
    tactic = getattr(request.node, "callspec", None) and request.node.callspec.params.get("tactic", 0)
    if tactic and tactic > PORTABLE and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (520, 128), (1536, 2048)])
def test_products_agree_with_the_twin(dtype: torch.dtype, kind: str, n: int, k: int) -> None:
    weight = made_weight(kind, n, k, dtype)
    for m in (9, 33, 100, 300):
        agrees(activations(m, weight.k, dtype), weight)


@pytest.mark.parametrize("tactic", [PORTABLE, *PERSISTENT, *TILES])
@pytest.mark.parametrize("kind", ["int4 g128", "int4 g64", "int4 g32 zero", "int8", "fp8"])
def test_every_kernel_agrees(kind: str, tactic: int) -> None:
    for dtype in DTYPES:
        weight = made_weight(kind, 712, 1184, dtype)
        for m in (1, 70, 270):
            agrees(activations(m, weight.k, dtype), weight, tactic=tactic)


@pytest.mark.parametrize("tactic", CLUSTERS)
@pytest.mark.parametrize("kind", ["int4 g128 zero", "int4 g64", "int4 g32 zero", "int8"])
def test_every_cluster_agrees(kind: str, tactic: int) -> None:
    for n, k, m in ((1536, 4096, 40), (200, 1088, 130)):
        weight = made_weight(kind, n, k, torch.bfloat16)
        agrees(activations(m, weight.k, torch.bfloat16), weight, tactic=tactic)


@pytest.mark.parametrize("tactic", [PORTABLE, *PERSISTENT, 5414, 6212, 7412])
@pytest.mark.parametrize("gate", ["none", "silu", "gelu", "gelu_tanh"])
def test_bias_gate_and_residual(gate: str, tactic: int) -> None:
    for kind, m, n in (("int4 g32", 77, 1040), ("int8", 300, 784)):
        weight = made_weight(kind, n, 512, torch.bfloat16)
        width = n if gate == "none" else n // 2
        for gap in (0, 3, 8):  # rows that may, may not and may be accessed 16 bytes at a time
            agrees(
                with_row_gap(activations(m, 512, torch.bfloat16), 8),
                weight,
                bias=among_poison(activations(1, n, torch.bfloat16, 1)[0]),
                residual=with_row_gap(activations(m, width, torch.bfloat16, 2), gap),
                gate=gate,
                tactic=tactic,
            )


@gpu_examples
@given(
    m=st.integers(9, 600),
    n=st.integers(1, 900),
    k=st.integers(1, 1500),
    kind=st.sampled_from(PACKED),
    dtype=st.sampled_from(DTYPES),
    fused=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["none", "silu", "gelu"])),
    tactic=st.sampled_from([0, 0, 0, PORTABLE]),
    gap=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_with_anything_fused(
    m: int,
    n: int,
    k: int,
    kind: str,
    dtype: torch.dtype,
    fused: tuple[bool, bool, bool, str],
    tactic: int,
    gap: int,
    seed: int,
) -> None:
    bias, residual, norm, gate = fused
    if gate != "none":
        n = (n + 15) // 16 * 16
    weight = made_weight(kind, n, k, dtype, seed)
    width = n if gate == "none" else n // 2
    options: dict[str, Any] = {"gate": gate, "tactic": tactic}
    if bias:
        options["bias"] = among_poison(activations(1, n, dtype, seed + 1)[0])
    if residual:
        options["residual"] = with_row_gap(activations(m, width, dtype, seed + 2), gap)
    if norm:
        options["norm_weight"] = among_poison(activations(1, weight.k, dtype, seed + 3)[0])
    # rows of x a multiple of 8 elements apart, unless the norm makes a copy
    wanted = weight.k + gap if norm else (weight.k + gap + 7) // 8 * 8
    agrees(with_row_gap(activations(m, weight.k, dtype, seed), wanted - weight.k), weight, **options)


@pytest.mark.parametrize("tactic", [0, PORTABLE, *PERSISTENT])
@pytest.mark.parametrize("factor", [1e-8, 1e7])  # scales that float16 would lose
def test_huge_and_tiny_scales(factor: float, tactic: int) -> None:
    weight = made_weight("int4 g128", 256, 512, torch.bfloat16, factor=factor)
    assert weight.multiplier != 1.0
    agrees(activations(20, 512, torch.bfloat16), weight, tactic=tactic)


def test_act_order_is_gathered() -> None:
    weight = made_weight("int4 g64 zero", 512, 1024, torch.bfloat16, order=True)
    assert weight.order is not None
    agrees(activations(30, 1024, torch.bfloat16), weight)


@pytest.mark.parametrize("m", [16, 64, 200, 600])
@pytest.mark.parametrize("kind", ["int4 g32", "int8"])
def test_runs_repeat_bit_by_bit_and_replay(kind: str, m: int) -> None:
    from trtllm_cli.ops.cuda import weight_only

    weight = made_weight(kind, 1024, 8192, torch.float16)
    x, other = (activations(m, 8192, torch.float16, seed) for seed in (0, 1))
    assert_repeats(lambda: weight_only.linear(x, weight))
    assert_replays(lambda a: weight_only.linear(a, weight), [x], [other])


@pytest.mark.parametrize("m", [16, 150, 600])
def test_a_chain_with_programmatic_launch_gives_the_bits_of_one_without(m: int) -> None:
    from trtllm_cli.ops.cuda import weight_only

    weights = [made_weight("int4 g128", 2048, 2048, torch.bfloat16, i) for i in range(4)]

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for weight in weights:
            x = weight_only.linear(x, weight, residual=x, pdl=pdl)
        return x

    x = activations(m, 2048, torch.bfloat16)
    wanted = chain(x, False)
    for _ in range(5):
        assert torch.equal(chain(x, True), wanted)


@pytest.mark.parametrize("tactic", [0, PORTABLE, *PERSISTENT])
def test_an_output_between_canaries_that_is_its_residual(tactic: int) -> None:
    from trtllm_cli.ops.cuda import library, weight_only

    weight = made_weight("int8", 203, 320, torch.float16)
    x, residual = activations(50, 320, torch.float16), activations(50, 203, torch.float16, 1)
    out = Guarded((50, 203), torch.float16, strides=(209, 1))
    out.tensor.copy_(residual)
    params = weight_only.parameters(x, weight, out.tensor, residual=out.tensor, tactic=tactic)
    library.load().launch("weight_only_gemm", params)
    out.check()
    assert torch.equal(out.tensor, weight_only.linear(x, weight, residual=residual, tactic=tactic))


def test_refusals() -> None:
    from trtllm_cli.ops.cuda import weight_only

    weight = made_weight("int4 g128", 64, 256, torch.bfloat16)
    x = activations(20, 256, torch.bfloat16)
    assert_refused(lambda: weight_only.linear(x, weight, tactic=7211), "7211", "20 tokens")
    assert_refused(lambda: weight_only.linear(with_row_gap(x, 3), weight), "multiple of 8")
