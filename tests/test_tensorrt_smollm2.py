"""A network of SmolLM2-135M's shape builds within the time and memory promised, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_tensorrt import small_spec, write_checkpoint
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.build.tensorrt.plan import read_header
from trtllm_cli.models.spec import RotarySpec

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_positions": 8192,
    "tie_embeddings": True,
    "rotary": RotarySpec(theta=100000.0, dim=64),
    "windows": (None,) * 30,
}
# VmHWM, not ru_maxrss: the latter keeps the peak of the process that started this one
BUILD = """
import json, pathlib, sys, time
started = time.monotonic()
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
given = {"context": 2048, "concurrency": 8}
config = configure(TensorRTOptions, [("command line", given)], "build")
build_tensorrt_engine(open_artifact(pathlib.Path(sys.argv[1]), "checkpoint"), pathlib.Path(sys.argv[2]), config)
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"wall": time.monotonic() - started, "cpu": time.process_time(), "peak_mib": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_smollm2_builds_in_twenty_seconds_and_two_gib(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", small_spec(**SMOLLM2))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    engine = open_artifact(tmp_path / "out", "engine").engine
    size = read_header(tmp_path / "out" / PLAN).size
    with capsys.disabled():
        print(
            f"\nSmolLM2 shape, float16, context 2048 x 8: {figures['wall']:.1f} s wall, {figures['cpu']:.1f} s cpu, "
            f"peak {figures['peak_mib']:.0f} MiB, plan {size / 2**20:.0f} MiB"
        )
    assert engine.tactics["context"]["attention"] == {"_gemm_mha_v2": 30}
    assert engine.tactics["generation"]["attention"] == {"_gemv_mha_v1": 30}
    assert figures["peak_mib"] < 2048
    # 20 s is promised on an idle machine of two cores; other work may share this one
    assert figures["wall"] < 40
