"""The functional API: the examples run, agree with oracles of other code, and the docs show what they are."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support_artifacts import REPOSITORY, raises
from trtllm_cli import functional
from trtllm_cli.build.tensorrt.plan import read_header
from trtllm_cli.functional import Model, Ops, Segment, decoder, random_tensors

EXAMPLES = ("custom_layer", "custom_decoder")
PROMPT = [5, 17, 230, 99, 42, 8]


def example(name: str) -> Any:
    path = REPOSITORY / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layer() -> Any:
    return example("custom_layer")


@pytest.fixture(scope="module")
def shared() -> Any:
    return example("custom_decoder")


def run(executor: Any) -> np.ndarray:
    """Logits of a prompt, of a second piece and of one token after it: [6, vocab]."""
    steps = [Segment(0, 0, PROMPT[:3], "all"), Segment(0, 3, PROMPT[3:5], "all"), Segment(0, 5, PROMPT[5:], "last")]
    return np.concatenate([executor.forward([step]) for step in steps])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---- what the examples compute ---------------------------------------------------------------------------------------


def test_adapters_equal_weights_with_the_adapters_merged(layer):
    """W + scale * B A in the package's own decoder, whose norm is not the example's."""
    made = layer.model(seed=3)
    spec = layer.SPEC
    merged = {name: array for name, array in made.tensors.items() if "lora" not in name}
    for name in (f"layers.{i}.attn.{part}" for i in range(spec.num_layers) for part in "qv"):
        low = made.tensors[f"{name}.lora_b.weight"] @ made.tensors[f"{name}.lora_a.weight"]
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + np.float32(spec.alpha / spec.rank) * low
    plain = functional.DecoderSpec(**{name: getattr(spec, name) for name in functional.DecoderSpec.model_fields})
    wanted = run(Model(plain, decoder, merged).torch(context=32))
    assert apart(run(made.torch(context=32)), wanted) < 1e-5
    without = {name: array * ("lora_b" not in name) for name, array in made.tensors.items()}
    assert apart(run(Model(spec, layer.lora_decoder, without).torch(context=32)), wanted) > 0.05


def test_the_norm_of_primitives_is_torchs(layer):
    from trtllm_cli.ops.torch_ops import TorchOps

    class Weights:
        kv_cache = None

        def dense(self, name: str) -> torch.Tensor:
            return weight.to(dtype)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, generator=generator)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(2, 5, 48, generator=generator).to(dtype)
        found = layer.rms_norm(TorchOps(Weights(), 8), x, "norm.weight", 1e-2)
        assert found.dtype == dtype
        wanted = torch.nn.functional.rms_norm(x.float(), (48,), weight.to(dtype).float(), 1e-2)
        assert apart(found.float().numpy(), wanted.numpy()) < tolerance


def test_shared_blocks_equal_layers_with_copies_of_their_weights(shared):
    made, spec = shared.model(seed=4), shared.SPEC
    plain = functional.DecoderSpec(**{name: getattr(spec, name) for name in functional.DecoderSpec.model_fields})
    copies = {}
    for name in plain.tensor_shapes():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) // spec.repeats)
        copies[name] = made.tensors[".".join(parts)]
    wanted = run(Model(plain, decoder, copies).torch(context=32))
    assert apart(run(made.torch(context=32)), wanted) < 1e-6
    assert len(made.tensors) < len(copies)


# ---- every backend ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
def test_the_network_agrees_with_torch(name, dtype, tolerance):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    made = example(name).model()
    found = run(made.network(context=32, dtype=dtype))
    assert found.shape == (6, 256)
    assert apart(found, run(made.torch(context=32))) < tolerance


def test_the_native_library_runs_a_decoder_of_coarse_operations(shared):
    made = shared.model()
    native = made.native(context=32, slots=2, threads=1)
    assert apart(run(native), run(made.torch(context=32))) < 1e-5
    native.close()


def test_the_native_library_names_the_operation_it_lacks(layer):
    with raises("PLAN_OPERATION", 4, "'float32'"):
        layer.model().native(context=32)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plan_is_built_and_attention_fused(name, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    module = example(name)
    built = module.model().build(tmp_path, context=64, dtype="float16")
    assert read_header(built.plan).size == built.plan.stat().st_size
    generation = built.facts.profiles[1]
    assert sum(generation.attention.values()) == module.SPEC.num_layers
    # a product for every linear that the spec names, and none that the build log does not know
    assert sum(built.linears[0].kinds.values()) == len(module.SPEC.linears())
    assert set(built.linears[0].kinds) == {"float16"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_a_program(name, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    command = [sys.executable, str(REPOSITORY / "examples" / f"{name}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    *agree, plan = done.stdout.splitlines()
    errors = [float(error) for line in agree for error in re.findall(r"\d\.\de[-+]\d\d", line)]
    assert len(agree) == 3 and len(errors) >= 3 and all(error < 4e-2 for error in errors)
    assert plan.startswith("plan: ") and (tmp_path / "engine.plan").is_file()


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_the_spec(shared):
    tensors = random_tensors(shared.SPEC)
    with raises("TENSOR_MISSING", 3, "norm.weight"):
        Model(shared.SPEC, decoder, {name: array for name, array in tensors.items() if name != "norm.weight"})
    with raises("TENSOR_UNKNOWN", 3, "layers.2.attn.q.weight"):
        Model(shared.SPEC, decoder, {**tensors, "layers.2.attn.q.weight": tensors["layers.0.attn.q.weight"]})
    with raises("TENSOR_SHAPE", 3, "norm.weight", "(3,)"):
        Model(shared.SPEC, decoder, {**tensors, "norm.weight": np.ones(3, np.float32)})
    with raises("TENSOR_SHAPE", 3, "float64"):
        Model(shared.SPEC, decoder, {**tensors, "norm.weight": np.ones(64)})


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_the_documentation_shows_the_examples_code():
    text = (REPOSITORY / "docs" / "functional-api.md").read_text()
    sources = [(REPOSITORY / "examples" / f"{name}.py").read_text() for name in EXAMPLES]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:  # a part of a function is shown without its indentation
        texts = (block.strip(), textwrap.indent(block, "    ").strip())
        assert any(text in source for source in sources for text in texts), block
    shown = "\n".join(blocks)
    for wanted in ("def rms_norm", "class LoraLinear", "class LoraSpec", "def shared_decoder", "class SharedSpec"):
        assert wanted in shown


def test_the_documentation_lists_every_operation():
    text = (REPOSITORY / "docs" / "functional-api.md").read_text()
    operations = [name for name in vars(Ops) if not name.startswith("_")]
    listed = re.findall(r"^\| `(\w+)", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(operations)
    for name in operations:
        assert getattr(Ops, name).__doc__, name


@pytest.mark.parametrize("name", ["lora_decoder", "shared_decoder"])
def test_a_forward_pass_is_thirty_lines(name):
    source = "".join((REPOSITORY / "examples" / f"{one}.py").read_text() for one in EXAMPLES)
    (found,) = [node for node in ast.walk(ast.parse(source.replace("from __future__ import annotations", ""))) if
                isinstance(node, ast.FunctionDef) and node.name == name]  # fmt: skip
    assert found.end_lineno - found.lineno + 1 <= 30


def test_the_public_names_exist():
    assert Path(functional.__file__).is_file()
    for name in functional.__all__:
        assert hasattr(functional, name)
