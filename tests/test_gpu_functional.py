"""The examples' models as TensorRT plans on a GPU, beside torch on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_gpu import needs_gpu
from tests.test_functional import apart, example, run
from trtllm_cli.functional import Segment

pytestmark = [pytest.mark.gpu, needs_gpu]


# a plan takes some seconds to build and some to compile its kernels: each example in one type
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("custom_layer", "float16", 5e-3), ("custom_decoder", "bfloat16", 4e-2)]
)
def test_an_examples_plan_agrees_with_torch(name, dtype, tolerance, tmp_path):
    made = example(name).model()
    built = made.build(tmp_path, context=64, concurrency=2, dtype=dtype)
    gpu = made.tensorrt(built, context=64, slots=2)
    found, wanted = run(gpu), run(made.torch(context=64))
    print(f"\n{name} {dtype}: relative error {apart(found, wanted):.1e}")
    assert apart(found, wanted) < tolerance
    # two sequences at once, each in its slot
    batch = [Segment(0, 6, [9], "last"), Segment(1, 0, [3, 4], "last")]
    both = gpu.forward(batch)
    assert both.shape == (2, 256) and np.isfinite(both).all()
    assert apart(both[1:], made.torch(context=64).forward([Segment(0, 0, [3, 4], "last")])) < tolerance
    gpu.close()
