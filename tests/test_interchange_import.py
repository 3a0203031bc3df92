"""Importing quantized checkpoints: interrupted, resumed, and in little memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_artifacts import convert_to, python, snapshot, source_of
from tests.support_interchange import small_spec
from tests.support_published import Published, Random, gptq_tensors

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def whole_gptq(spec=None, seed: int = 13) -> Published:
    published, random = Published(spec), Random(seed)
    for module, (n, k) in published.linears().items():
        made = random.int4(n, k, 32, True)
        published.replace(module, gptq_tensors(made, 1), made["dense"])
    return published


def test_an_interrupted_import_resumes_with_the_same_bytes(tmp_path):
    spec = small_spec(hidden_size=256, intermediate_size=1024, vocab_size=4096)
    folder = whole_gptq(spec).write(tmp_path / "published", GPTQ)
    source = source_of(folder, tmp_path / "source").path

    class Stop:
        def say(self, text: str) -> None:
            pass

        def advance(self, label: str, done: float, total: float, unit: str) -> None:
            if done > 0.7 * total:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to(source, tmp_path / "out", max_shard_mib=1, report=Stop())
    finished = {file.name: file.stat().st_ino for file in (tmp_path / ".out.partial").glob("model-*.safetensors")}
    assert finished
    made = convert_to(source, tmp_path / "out", max_shard_mib=1)
    assert {name: (made.path / name).stat().st_ino for name in finished} == finished
    whole = convert_to(source, tmp_path / "whole", max_shard_mib=1)
    assert snapshot(made.path) == snapshot(whole.path)


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from tests.support_artifacts import convert_to
from trtllm_cli.artifacts.memory import anonymous_mib
torch.set_num_threads(1)
peak, stop = 0.0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous_mib())
        time.sleep(0.002)
import trtllm_cli.convert.stage, trtllm_cli.models.families.llama, safetensors, trtllm_cli.ops.quantized
import trtllm_cli.quantize.interchange.awq, trtllm_cli.quantize.interchange.plan
baseline = anonymous_mib()
thread = threading.Thread(target=watch)
thread.start()
convert_to(Path(sys.argv[1]), Path(sys.argv[2]))
stop = True
thread.join()
print(peak - baseline)
"""


def test_import_memory_stays_near_one_tensor(tmp_path):
    """AWQ, which takes the most work to repack: 36 MiB a weight in float32, 250 MiB in all."""
    spec = small_spec(hidden_size=1024, intermediate_size=9216, num_heads=16, num_kv_heads=4, head_dim=64)
    published = Published(spec)
    rng = np.random.default_rng(14)
    for module, (n, k) in published.linears().items():
        tensors = {
            "qweight": torch.from_numpy(rng.integers(-(2**31), 2**31, (k, n // 8)).astype(np.int32)),
            "qzeros": torch.from_numpy(rng.integers(-(2**31), 2**31, (k // 64, n // 8)).astype(np.int32)),
            "scales": torch.full((k // 64, n), 0.01, dtype=torch.float16),
        }
        published.replace(module, tensors, np.ones(1))
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    source = source_of(published.write(tmp_path / "published", config), tmp_path / "source")
    done = python(MEMORY, source.path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.5 * 36 + 20, done.stdout
