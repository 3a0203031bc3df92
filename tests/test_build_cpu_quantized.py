"""Building CPU engines from quantized checkpoints: what is chosen, what is recorded, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.support_artifacts import build_to, raises, snapshot
from tests.support_models import tiny_model
from tests.support_quantized import Choice, tiny_checkpoint, write_quantized
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorFile
from trtllm_cli.ops.native import library
from trtllm_cli.ops.native.groups import input_order, reorder
from trtllm_cli.ops.native.packing import PackedModule
from trtllm_cli.ops.quantized import dequantize_int4
from trtllm_cli.runtime.load import _native

pytestmark = pytest.mark.skipif(library.find_problem() is not None, reason=str(library.find_problem()))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_checkpoint(tiny_model("llama-gqa"), tmp_path_factory.mktemp("parent"))


def nothing(module: str) -> None:
    return None


def int8(module: str) -> Choice | None:
    return None if module == "embed" else Choice("int8", activation="tensor")


def shuffled(module: str) -> Choice | None:
    return None if module == "embed" else Choice("int4", shuffle=1)


def modules_of(engine: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.file("modules.json").read_bytes())
    return found


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_the_cache_is_of_the_checkpoints_type(parent: Artifact, tmp_path: Path, kv: Any) -> None:
    checkpoint = write_quantized(parent, tmp_path / "q", nothing, kv=kv)
    engine = build_to(checkpoint.path, tmp_path / "auto", context=32)
    assert engine.engine.tactics["cache"] == kv
    assert engine.manifest.config["cache"].value == kv and engine.manifest.config["cache"].origin == "derived"
    # the weights are float32 and stay exact
    assert engine.engine.tactics["products"] == "float32"
    executor = _native(engine, 1)
    assert executor.describe()["cache"] == kv
    executor.close()
    half = build_to(checkpoint.path, tmp_path / "half", context=32, cache="float16")
    assert half.engine.tactics["cache"] == "float16" and half.manifest.config["cache"].origin == "command line"
    assert half.engine.limits.cache_bytes == 2 * engine.engine.limits.cache_bytes
    assert not [name for name in TensorFile(half.file("model.safetensors")).entries if name.endswith("k_scale")]


def test_a_quantized_cache_needs_its_scales(parent: Artifact, tmp_path: Path) -> None:
    with raises("CACHE_SCALES_MISSING", 4, "int8 cache", "no scales") as caught:
        build_to(parent.path, tmp_path / "engine", cache="int8")
    assert "--kv-cache int8" in caught.value.hint
    checkpoint = write_quantized(parent, tmp_path / "q", nothing, kv="int8")
    with raises("CACHE_SCALES_MISSING", 4, "fp8 cache", "int8 cache only"):
        build_to(checkpoint.path, tmp_path / "engine", cache="fp8")
    assert not (tmp_path / "engine").exists()


def test_the_torch_executor_keeps_the_checkpoints_cache(parent: Artifact, tmp_path: Path) -> None:
    checkpoint = write_quantized(parent, tmp_path / "q", int8, kv="int8")
    engine = build_to(checkpoint.path, tmp_path / "engine", executor="torch", cache="int8")
    assert engine.engine.tactics["cache"] == "int8" and engine.engine.tactics["products"] == "float32"
    with raises("OPTION_UNUSED", 2, "--cache", "int8"):
        build_to(checkpoint.path, tmp_path / "other", executor="torch", cache="float16")


def test_building_twice_gives_the_same_bytes(parent: Artifact, tmp_path: Path) -> None:
    checkpoint = write_quantized(parent, tmp_path / "q", shuffled, kv="fp8")
    first, second = (build_to(checkpoint.path, tmp_path / name) for name in ("a", "b"))
    assert snapshot(first.path) == snapshot(second.path)


def test_modules_describe_their_inputs(parent: Artifact, tmp_path: Path) -> None:
    engine = build_to(write_quantized(parent, tmp_path / "q", int8).path, tmp_path / "e")
    found = modules_of(engine)["layers.1.mlp.up"]
    assert found["format"] == "int8_dot" and found["activation"] == "int8"
    assert np.float32(found["input_scale"]) == np.float32(0.03)
    assert modules_of(engine)["embed"]["activation"] is None


def test_modules_of_one_order_share_it(parent: Artifact, tmp_path: Path) -> None:
    engine = build_to(write_quantized(parent, tmp_path / "q", shuffled).path, tmp_path / "e")
    modules = modules_of(engine)
    hidden = {modules[f"layers.{i}.{m}"]["order"] for i in range(3) for m in ("attn.q", "attn.v", "mlp.gate", "mlp.up")}
    assert hidden == {"layers.0.attn.q.order"}
    names = [name for name in TensorFile(engine.file("model.safetensors")).entries if name.endswith(".order")]
    # the down projection has more inputs, hence an order of its own
    assert names == ["layers.0.attn.q.order", "layers.0.mlp.down.order"]


def test_regrouping_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (9, 30), generator=generator, dtype=torch.uint8)
    scale = torch.rand(9, 4, generator=generator)
    group = (torch.arange(60) // 15)[torch.randperm(60, generator=generator)].to(torch.int32)
    order = input_order("m", group.numpy(), 60, 4)
    assert order is not None
    consecutive = torch.from_numpy(reorder(packed.numpy(), order))
    whole = dequantize_int4(packed, scale, None, group)
    assert torch.equal(dequantize_int4(consecutive, scale, None), whole[:, order.astype(np.int64)])
    assert input_order("m", np.repeat(np.arange(4), 15).astype(np.int32), 60, 4) is None


def set_to(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def remove(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def not_a_number(tensors: Tensors) -> None:
    tensors["layers.0.attn.o.weight"].view(torch.uint8)[3, 3] = 0xFF


def fp8_output(module: str) -> Choice | None:
    return Choice("fp8") if module.endswith("attn.o") else None


GROUP, SCALE, KV = "layers.0.attn.q.weight_group", "layers.1.mlp.up.input_scale", "layers.1.attn.v_scale"


@pytest.mark.parametrize(
    "choose,change,code,needle",
    [
        (shuffled, set_to(GROUP, torch.zeros(48, dtype=torch.int32)), "GROUP_INDEX", "layers.0.attn.q"),
        (shuffled, set_to(GROUP, torch.full((48,), 2, dtype=torch.int32)), "GROUP_INDEX", "one of 2 groups"),
        (shuffled, set_to(GROUP, torch.full((48,), -1, dtype=torch.int32)), "GROUP_INDEX", "one of 2 groups"),
        (shuffled, set_to(GROUP, torch.zeros(47, dtype=torch.int32)), "GROUP_INDEX", "each of 48 inputs"),
        (shuffled, remove(GROUP), "CHECKPOINT_TENSOR", "is missing"),
        (int8, set_to(SCALE, torch.tensor([0.0])), "CHECKPOINT_TENSOR", SCALE),
        (int8, set_to(SCALE, torch.tensor([float("nan")])), "CHECKPOINT_TENSOR", SCALE),
        (int8, set_to(SCALE, torch.ones(2)), "CHECKPOINT_TENSOR", SCALE),
        (int8, remove(SCALE), "CHECKPOINT_TENSOR", "is missing"),
        (int8, set_to(KV, torch.tensor([1.0, 0.0])), "CHECKPOINT_TENSOR", KV),
        (int8, set_to(KV, torch.tensor([1.0, float("inf")])), "CHECKPOINT_TENSOR", KV),
        (int8, set_to(KV, torch.ones(3)), "CHECKPOINT_TENSOR", "each of 2 heads"),
        (int8, remove(KV), "CHECKPOINT_TENSOR", "is missing"),
        (fp8_output, not_a_number, "PACKING_SHAPE", "not a number"),
    ],
)
def test_damaged_checkpoints_are_refused(
    parent: Artifact, tmp_path: Path, choose: Any, change: Any, code: str, needle: str
) -> None:
    checkpoint = write_quantized(parent, tmp_path / "q", choose, kv="int8", change=change)
    with raises(code, 3, needle):
        build_to(checkpoint.path, tmp_path / "e", executor="native")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "module,changes",
    [
        ("layers.0.attn.q", {"format": "int8"}),
        ("layers.0.attn.q", {"activation": None}),
        ("layers.0.attn.q", {"input_scale": -1.0}),
        ("layers.0.attn.q", {"order": "layers.0.attn.q.order"}),
        ("embed", {"activation": "fp8"}),
        ("embed", {"input_scale": 1.0}),
    ],
)
def test_modules_that_contradict_themselves_are_refused(
    parent: Artifact, tmp_path: Path, module: str, changes: dict[str, Any]
) -> None:
    described = modules_of(build_to(write_quantized(parent, tmp_path / "q", int8).path, tmp_path / "e"))[module]
    assert PackedModule.model_validate(described).n > 0
    with pytest.raises(ValidationError):
        PackedModule.model_validate({**described, **changes})
