"""The checkpoints that figures are measured on: what they hold, that they run, and that they repeat."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.llama_shapes import FORMATS, SHAPES, make_checkpoint, shortened
from trtllm_cli.artifacts.store import problems
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.spec import RotarySpec
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.load import load_checkpoint

SMALL = shortened(SHAPES["llama-3.1-8b"], 2).model_copy(
    update={
        "vocab_size": 160,
        "hidden_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 384,
        "rotary": RotarySpec(theta=10000.0, dim=64),
    }
)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checkpoint_runs_and_its_logits_have_a_sensible_size(tmp_path, kind):
    made = make_checkpoint(tmp_path / "made", SMALL, kind)
    assert list(problems(made)) == []
    executor = load_checkpoint(made.path, 32, slots=1).executor
    logits = executor.forward([Segment(0, 0, np.arange(16), "all")])
    assert logits.shape == (16, 160)
    # a row of unit inputs times 256 weights of deviation 0.02; scales vary by a tenth
    assert 0.2 < logits.std() < 0.5


def test_formats_have_the_types_and_sizes_they_say(tmp_path):
    codes = {"bf16": "BF16", "fp16": "F16", "int8": "I8", "int4": "U8", "w8a8": "I8", "fp8": "F8_E4M3"}
    for kind in FORMATS:
        made = make_checkpoint(tmp_path / kind, SMALL, kind)
        store = TensorStore(made.path)
        assert store.entry("layers.1.mlp.down.weight").dtype == codes[kind]
        assert store.entry("embed.weight").dtype == ("F16" if kind == "fp16" else "BF16")
        assert made.checkpoint.weight_bytes == sum(store.entry(name).end - store.entry(name).begin for name in store)
        record = made.checkpoint.quantization
        if record is None:
            continue
        schemes = {layer.module: (layer.scheme, layer.activation) for layer in record.layers}
        assert set(schemes) == set(SMALL.linears())
        assert (schemes["lm_head"][0].type, schemes["lm_head"][1]) == ("int8", None)
        assert schemes["layers.0.attn.q"][0].group_size == (128 if kind == "int4" else None)
        assert (schemes["layers.0.attn.q"][1] is not None) == (kind in ("w8a8", "fp8"))


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first, again = (make_checkpoint(tmp_path / name, SMALL, "int4") for name in ("first", "again"))
    other = make_checkpoint(tmp_path / "other", SMALL, "int4", seed=1)
    assert first.id == again.id != other.id
    assert first.file("model.safetensors").read_bytes() == again.file("model.safetensors").read_bytes()
    assert first.file("model.safetensors").read_bytes() != other.file("model.safetensors").read_bytes()


def test_the_published_shapes_have_the_published_sizes():
    def parameters(name):
        return sum(int(np.prod(shape)) for shape in SHAPES[name].tensor_shapes().values())

    assert parameters("llama-3.1-8b") == 8_030_261_248
    assert parameters("llama-3.2-1b") == 1_235_814_400
    assert parameters("smollm2-135m") == 134_515_008
