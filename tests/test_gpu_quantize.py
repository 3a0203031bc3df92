"""Quantization on a GPU against the same on the CPU. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_artifacts import quantize_to
from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods import gptq as module
from trtllm_cli.runtime.executor import Segment
from trtllm_cli.runtime.load import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TEXT = "the sea rose over the wall and nobody in the village slept that night because the wind kept turning "


def problem(rows: int, inputs: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize("order", ["none", "static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "group"), [(70, 192, 64), (33, 320, 32), (40, 256, -1)])
def test_the_sweep_on_a_gpu_is_as_good_as_on_the_cpu(order, symmetric, rows, inputs, group):
    """Rounding differs in the last bit, so codes near a border may; the error reached must not."""
    weight, hessian = problem(rows, inputs)
    scheme = WeightScheme(
        type="int4", granularity="group", group_size=group, symmetric=symmetric, group_index=order == "dynamic"
    )
    cpu = module.gptq(weight, hessian, scheme, act_order=order)
    gpu = module.gptq(weight.cuda(), hessian.cuda(), scheme, act_order=order)
    assert float(gpu.loss.sum()) == pytest.approx(float(cpu.loss.sum()), rel=0.02)
    again = module.gptq(weight.cuda(), hessian.cuda(), scheme, act_order=order)
    for suffix, tensor in gpu.quantized.tensors.items():
        assert torch.equal(tensor, again.quantized.tensors[suffix]), "two runs differ"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "group_size": 32},
        {"method": "awq", "symmetric": False},
        {"method": "awq-gptq", "kv_cache": "fp8"},
        {"method": "smoothquant", "activations": "tensor"},
        {"method": "fp8", "activations": "tensor"},
    ],
    ids=lambda o: o["method"],
)
def test_the_stage_on_a_gpu_makes_what_the_cpu_makes(options, text_checkpoint, tmp_path):
    random = np.random.default_rng(0)
    words = TEXT.split()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.choice(words) + str(random.integers(1000)) for _ in range(3000)))
    common = {"calib": str(text), "calib_rows": 16, "calib_length": 64, "compute": "float32", **options}
    tokens = random.integers(5, 320, 48)
    found = {}
    for device in ("cpu", "cuda"):
        made = quantize_to(text_checkpoint.path, tmp_path / device, device=device, **common)
        executor = load_checkpoint(made.path, 64).executor
        found[device] = executor.forward([Segment(0, 0, tokens, "all")])
    before = load_checkpoint(text_checkpoint.path, 64).executor.forward([Segment(0, 0, tokens, "all")])
    loss = {device: np.linalg.norm(logits - before) / np.linalg.norm(before) for device, logits in found.items()}
    assert loss["cuda"] == pytest.approx(loss["cpu"], rel=0.25)
