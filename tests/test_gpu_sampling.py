"""The sampling kernel on a GPU: the very tokens of its twin."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support_gpu import (
    assert_refused,
    assert_repeats,
    assert_replays,
    guarded_allocations,
    needs_gpu,
    with_row_gap,
)

pytestmark = [pytest.mark.gpu, needs_gpu]

ROWS = 24


def requests(rows: int, vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """Each filter on and off in every combination, on the GPU."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    made = {
        "temperature": pick([0.0, 0.1, 0.7, 1.0, 1.0, 2.5]),
        "top_k": pick([0, 0, 1, 5, 50, 700, vocab]).int(),
        "top_p": pick([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
        "min_p": pick([0.0, 0.0, 0.02, 0.5]),
        "repetition": pick([1.0, 1.3, 0.8]),
        "frequency": pick([0.0, 0.0, 0.4]),
        "presence": pick([0.0, 0.0, -0.7]),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "steps": torch.randint(0, 2**31 - 1, (rows,), generator=generator, dtype=torch.int32),
    }
    return {name: x.cuda() for name, x in made.items()}


def seen(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Counts of prompts and of generated tokens, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-1, 3, (rows, vocab), generator=generator).clamp(min=0).short()
    prompt = torch.rand(rows, vocab, generator=generator) < 0.2
    return torch.where(prompt, counts - 2**15, counts).short().cuda()


def on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def assert_as_twin(logits: Tensor, **arguments: Any) -> None:
    """The same tokens, steps and counts as the operator on the CPU."""
    from trtllm_cli.ops.cuda import sampling

    twin = on_cpu(arguments) | {"cluster": 0}
    with guarded_allocations():
        found = sampling.sample(logits, **arguments)
    wanted = sampling.sample(logits.cpu(), **twin)
    differ = (found.cpu() != wanted).nonzero()[:, 0].tolist()
    details = [
        {name: x[i].item() for name, x in twin.items() if isinstance(x, Tensor) and x.dim() == 1} for i in differ[:3]
    ]
    assert not differ, f"rows {differ}: {found[differ].tolist()} and not {wanted[differ].tolist()}, {details}"
    for name in ("steps", "counts"):
        if isinstance(arguments.get(name), Tensor):
            assert torch.equal(arguments[name].cpu(), twin[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 4097, 32000, 50257])
def test_tokens_are_those_of_the_twin(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(ROWS, vocab, device="cuda") * 3).to(dtype)
    if vocab > 7:
        logits = with_row_gap(logits, 3)
    assert_as_twin(logits, **requests(ROWS, vocab), counts=seen(ROWS, vocab), advance=True)


def skip_where_refused(cluster: int) -> None:
    from trtllm_cli.ops.cuda import library, sampling

    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    params = sampling.SamplingParams(batch=1, vocab=8, dtype=library.FLOAT32, cluster=cluster)
    if refusal := library.load().supports("sampling", params, capability):
        pytest.skip(refusal)


@pytest.mark.parametrize("cluster", [0, 1, 2, 4, 8, 16])
def test_a_large_vocabulary_spread_over_any_number_of_blocks(cluster: int) -> None:
    skip_where_refused(cluster)
    torch.manual_seed(1)
    logits = torch.randn(12, 128256, device="cuda") * 3
    assert_as_twin(logits, **requests(12, 128256, cluster), counts=seen(12, 128256), cluster=cluster)


def test_a_vocabulary_too_large_to_be_kept() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 500000, device="cuda").half()
    assert_as_twin(logits, **requests(6, 500000, 5), counts=seen(6, 500000), advance=True)


@pytest.mark.parametrize("shape", ["equal", "masked", "steep", "flat", "ladder", "few values", "outlier", "denormal"])
def test_strange_distributions(shape: str) -> None:
    torch.manual_seed(3)
    vocab = 40000
    x = torch.randn(ROWS, vocab, device="cuda")
    if shape == "equal":
        x = torch.full_like(x, -1.5)
    elif shape == "masked":
        x[:, torch.randperm(vocab)[: vocab - 20]] = -torch.inf
    elif shape == "steep":
        x *= 1000
    elif shape == "flat":
        x *= 1e-3
    elif shape == "ladder":
        x = -torch.exp2(torch.arange(vocab, device="cuda") % 250 - 125.0).expand(ROWS, vocab).contiguous()
    elif shape == "few values":
        x = (x * 2).round() / 2
    elif shape == "outlier":
        x[:, 77] = -3e38
        x[:, 78] = 3e38
    elif shape == "denormal":
        x *= 1e-41
    settings = requests(ROWS, vocab, 9)
    for name in ("repetition", "frequency", "presence"):
        del settings[name]
    assert_as_twin(x, **settings)


@pytest.mark.parametrize("shape", ["random", "falling", "rising", "few values", "flat"])
def test_few_and_many_candidates(shape: str) -> None:
    """What top-k and min-p leave is few enough for one block to decide alone, or not, by number, ties and places; and
    top-p throws away few draws or many."""
    torch.manual_seed(7)
    rows, vocab = 48, 128256
    x = torch.randn(rows, vocab, device="cuda") * 2.5
    if shape in ("falling", "rising"):
        x = x.sort(dim=1, descending=shape == "falling").values
    elif shape == "few values":
        x = x.round()
    elif shape == "flat":
        x = (x * 1e-3).bfloat16().float()
    top_k = torch.tensor([0, 0, 1, 2, 50, 64, 127, 128, 129, 250, 1000, 70000], device="cuda").repeat(rows // 12)
    top_p = torch.tensor([1.0, 0.9, 0.2, 1e-6], device="cuda").repeat_interleave(rows // 4)
    min_p = torch.tensor([0.0, 0.05, 1.0], device="cuda").repeat(rows // 3)
    for rolled in range(2):
        assert_as_twin(
            x,
            temperature=torch.linspace(0.2, 1.6, rows, device="cuda"),
            top_k=top_k.roll(rolled * 5).int(),
            top_p=top_p,
            min_p=min_p.roll(rolled),
            seeds=torch.arange(rows, device="cuda"),
        )


@pytest.mark.parametrize("rows", [1, 8, 9, 33, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(10)
    logits = (torch.randn(rows, 32768, device="cuda") * 3).to(dtype)
    assert_as_twin(logits, **requests(rows, 32768, rows), counts=seen(rows, 32768), advance=True)


def test_rows_without_a_largest_logit_are_marked() -> None:
    from trtllm_cli.ops.cuda import sampling

    x = torch.zeros(5, 20000, device="cuda")
    x[0, 19999] = torch.nan
    x[1, 3] = torch.inf
    x[2] = -torch.inf
    x[3, 1:] = -torch.inf
    steps = torch.zeros(5, dtype=torch.int32, device="cuda")
    found = sampling.sample(x, temperature=torch.ones(5, device="cuda"), steps=steps, advance=True).tolist()
    assert found[:4] == [-1, -1, -1, 0] and found[4] >= 0
    assert steps.tolist() == [0, 0, 0, 1, 1]
    assert sampling.argmax(x).tolist() == [-1, -1, -1, 0, 0]


def test_argmax_takes_the_first_of_equals() -> None:
    from trtllm_cli.ops.cuda import sampling

    torch.manual_seed(4)
    for dtype, rows in ((torch.bfloat16, 200), (torch.float32, 200), (torch.bfloat16, 50), (torch.float32, 50)):
        x = torch.randn(rows, 128256, device="cuda").to(dtype)
        top = x.max(dim=1, keepdim=True).values
        assert torch.equal(sampling.argmax(x).long(), (x == top).int().argmax(dim=1))


@pytest.mark.parametrize("cluster", [0, 1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("copies", [1, 5])
def test_argmax_of_odd_rows_and_what_marks_them(copies: int, dtype: torch.dtype, cluster: int) -> None:
    from trtllm_cli.ops.cuda import sampling

    skip_where_refused(cluster)
    torch.manual_seed(8)
    for vocab in (1, 3, 8, 9, 1000, 4097, 50257):
        x = torch.randn(9, vocab, device="cuda").to(dtype)
        x[0] = -torch.inf
        x[1, -1], x[2, 0], x[3, vocab // 2], x[4, vocab // 3] = torch.nan, torch.inf, torch.nan, torch.finfo(dtype).min
        x[5] = -torch.inf
        x[5, -1] = torch.finfo(dtype).min
        x[6] = 0.0
        x[6, : vocab // 2] = -0.0
        x = with_row_gap(x.repeat(copies, 1), 3)
        steps = torch.zeros(9 * copies, dtype=torch.int32, device="cuda")
        counts = torch.zeros(9 * copies, vocab, dtype=torch.int16, device="cuda")
        with guarded_allocations():
            found = sampling.sample(x, counts, steps=steps, advance=True, cluster=cluster)
        wanted = (x == x.max(dim=1, keepdim=True).values).int().argmax(dim=1)
        wanted.view(copies, 9)[:, :4] = -1
        assert found.tolist() == wanted.tolist()
        assert steps.tolist() == (wanted >= 0).int().tolist()
        assert counts.nonzero().tolist() == [[i, token] for i, token in enumerate(found.tolist()) if token >= 0]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    from trtllm_cli.ops.cuda import sampling

    torch.manual_seed(5)
    rows, draws = 1024, 16
    x = torch.randn(8, device="cuda")
    x = torch.cat([x, torch.full((20000,), -torch.inf, device="cuda")])
    steps = torch.zeros(rows, dtype=torch.int32, device="cuda")
    arguments = {"temperature": torch.ones(rows, device="cuda"), "seeds": torch.arange(rows, device="cuda")}
    logits = x.expand(rows, -1).contiguous()
    found = torch.cat([sampling.sample(logits, **arguments, steps=steps, advance=True) for _ in range(draws)])
    expected = x[:8].softmax(0).double() * rows * draws
    chi2 = ((torch.bincount(found, minlength=8)[:8] - expected) ** 2 / expected).sum()
    assert float(chi2) < 24.3  # 7 degrees of freedom, one in a thousand


@pytest.mark.parametrize("pdl", [0, 1])
def test_repeats_and_replays(pdl: int) -> None:
    from trtllm_cli.ops.cuda import sampling

    torch.manual_seed(6)
    first, second = (torch.randn(9, 50000, device="cuda") for _ in range(2))
    arguments = requests(9, 50000, 3)
    for name in ("repetition", "frequency", "presence"):
        del arguments[name]
    assert_repeats(lambda: sampling.sample(first, **arguments, pdl=pdl))
    assert_replays(lambda x: sampling.sample(x, **arguments, pdl=pdl), [first], [second])


def test_the_mirror_of_the_struct_and_refusals() -> None:
    from trtllm_cli.ops.cuda import library, sampling

    kernels = library.load()
    assert kernels.struct_size("trtllm_sampling_params") == ctypes.sizeof(sampling.SamplingParams)
    x = torch.zeros(2, 100, device="cuda")
    assert_refused(lambda: sampling.sample(x, cluster=3), "not over 3")
    assert_refused(lambda: sampling.sample(torch.zeros(1, 2**22 + 1, device="cuda")), "4194305")
    params = sampling.SamplingParams(batch=1, vocab=8, cluster=8)
    assert "8.9" in (kernels.supports("sampling", params, 89) or "")
    assert kernels.supports("sampling", sampling.SamplingParams(batch=1, vocab=8), 80) is None
