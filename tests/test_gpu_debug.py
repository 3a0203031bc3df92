"""`debug engine` through TensorRT on a GPU: marked plans are built, run, agree, and show a planted fault."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import convert_to, quantize_to
from tests.support_debug import engine_of, faulty_checkpoint
from tests.support_gpu import needs_gpu
from trtllm_cli.debug.engine import DebugOptions, debug_engine

pytestmark = [pytest.mark.gpu, needs_gpu]

PROMPT = "The quick brown fox jumps over the lazy dog."


def compared(engine, against, checkpoint=None, **options):
    given = DebugOptions(executor="tensorrt", prompt=PROMPT, **options)
    result = debug_engine(engine, against, given, checkpoint=checkpoint.path if checkpoint else None)
    assert result.executor == "tensorrt"
    worst = max(result.points, key=lambda point: point.relative_error or 0)
    print(f"\n{engine.engine.dtype} {result.phase}: {len(result.points)} points, departure {result.departure}, "
          f"rise {result.rise}, worst {worst.name} {worst.relative_error:.2e}, {result.seconds} s")  # fmt: skip
    return result


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_plan_agrees_with_its_checkpoint_at_every_point(tmp_path, text_source, dtype):
    checkpoint = convert_to(text_source.path, tmp_path / "checkpoint", dtype=dtype)
    engine = engine_of(checkpoint, tmp_path / "engine")
    for phase in ("context", "generation"):
        result = compared(engine, checkpoint, phase=phase)
        assert result.departure is None
        assert len(result.points) == 35
        assert result.points[-1].name == "logits" and result.points[-1].relative_error > 1e-5


def test_a_perturbed_weight_is_found_on_the_gpu(tmp_path, text_source):
    right = convert_to(text_source.path, tmp_path / "right", dtype="float16")
    wrong = faulty_checkpoint(tmp_path / "wrong", dtype="float16")
    engine = engine_of(wrong, tmp_path / "engine")
    for phase in ("context", "generation"):
        result = compared(engine, right, wrong, phase=phase)
        assert result.departure == result.rise == "layers.1.mlp.up"


def test_a_quantized_plan_agrees_with_its_checkpoint(tmp_path, text_source):
    checkpoint = convert_to(text_source.path, tmp_path / "checkpoint", dtype="bfloat16")
    int8 = quantize_to(checkpoint.path, tmp_path / "int8", method="int8-weight-only")
    engine = engine_of(int8, tmp_path / "engine")
    assert compared(engine, int8).departure is None
    assert compared(engine, checkpoint, int8, layers=("*.attn.q",), tolerance=1e-4).departure == "layers.0.attn.q"
