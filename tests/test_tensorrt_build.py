"""Plans built on this machine: what they compiled to, what the artifact says, and every way a build is refused."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_tensorrt import FAMILIES, random_weights, small_spec, write_checkpoint
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt import build as trt_build
from trtllm_cli.build.tensorrt import module
from trtllm_cli.build.tensorrt.build import LAYERS, PLAN, build_plan
from trtllm_cli.build.tensorrt.errors import clean
from trtllm_cli.build.tensorrt.log import LogReader, PlanFacts
from trtllm_cli.build.tensorrt.network import Sizing, cache_names, new_definition, updated
from trtllm_cli.build.tensorrt.plan import read_header
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
from trtllm_cli.build.tensorrt.weights import Weight, cast
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError

SIZING = Sizing(context=128, concurrency=4)
NAMES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}


def build(tmp_path, family="llama", dtype="float16", weights=None, sizing=SIZING, target=()):
    spec = FAMILIES[family]
    return build_plan(spec, weights or random_weights(spec), dtype, sizing, target, tmp_path)


def options(**given):
    return configure(TensorRTOptions, [("command line", given)], "build --backend tensorrt")


# ---- what a plan compiles to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused_and_projections_are_merged_in_every_profile(tmp_path, family, dtype):
    built = build(tmp_path, family, dtype)
    assert [sizes.name for sizes in built.profiles] == ["context", "generation-1", "generation-4"]
    context, *generation = built.facts.profiles
    assert context.attention == {"_gemm_mha_v2": 2}
    assert [profile.attention for profile in generation] == [{"_gemv_mha_v1": 2}] * 2
    for profile in built.facts.profiles:
        gemms = [kernel for kernel in profile.kernels if kernel.type == "gemm"]
        assert all(kernel.inputs[0] == kernel.constants[0] == gemms[0].inputs[0] != "Float" for kernel in gemms)
        for parts in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
            holders = [
                {part for part in parts if f"layers.1.{part}" in kernel.sources}
                for kernel in profile.kernels
                if kernel.type in ("gemm", "runtime_fusion") or profile is generation[0]
            ]
            assert set(parts) in holders


def test_inputs_and_outputs_with_the_shapes_of_every_profile(tmp_path):
    facts = build(tmp_path).facts
    io = {tensor.name: tensor for tensor in facts.io}
    caches = [name for layer in range(2) for name in cache_names(layer)]
    assert set(io) == {"token_ids", "starts", "rows", "seen", "logits", *caches, *map(updated, caches)}
    one, few = ((1,), (1,), (1,)), ((2,), (4,), (4,))
    assert io["token_ids"].ranges == (((1, 1), (1, 128), (4, 128)), ((1, 1),) * 3, ((2, 1), (4, 1), (4, 1)))
    assert io["starts"].ranges == (((1,), (1,), (4,)), one, few)
    # prompts can return many rows of logits, to score a text; generation one a sequence
    assert io["rows"].ranges == (((1,), (1,), (128,)), one, few)
    assert io["seen"].ranges == (((1,), (128,), (128,)),) * 3
    assert (io["logits"].dtype, io["logits"].dimensions) == ("Float", (-1, 256))
    for name in caches:
        assert (io[name].direction, io[name].dtype, io[name].dimensions) == ("input", "Half", (-1, 2, 128, 32))
        assert [most for _, _, most in io[name].ranges] == [(batch, 2, 128, 32) for batch in (4, 1, 4)]
        assert io[updated(name)].direction == "output"


def test_caches_are_written_in_place(tmp_path):
    """Kernels see one tensor for a cache input and its output; a copy would read the input under its own name."""
    facts = build(tmp_path).facts
    for profile in facts.profiles:
        read = {name for kernel in profile.kernels for name in kernel.reads}
        written = {name for kernel in profile.kernels for name in kernel.writes}
        for name in (name for layer in range(2) for name in cache_names(layer)):
            assert updated(name) in read | written
            assert name not in read


def test_float32_builds_and_says_that_context_attention_is_not_fused(tmp_path):
    said: list[str] = []

    class Reporter:
        def say(self, text: str) -> None:
            said.append(text)

        def advance(self, label: str, done: float, total: float, unit: str) -> None:
            said.append(f"{label} {done}/{total} {unit}")

    spec = FAMILIES["qwen3"]
    built = build_plan(spec, random_weights(spec), "float32", SIZING, (), tmp_path, Reporter())
    assert {tensor.dtype for tensor in built.facts.io} == {"Float", "Int32"}
    assert any(line.startswith("context: ") and "attention 0/2 fused (none)" in line for line in said)
    assert "compiling 2/3 profiles" in said


def test_facts_of_a_build(tmp_path):
    spec = FAMILIES["llama"]
    built = build(tmp_path)
    header = read_header(tmp_path / PLAN)
    assert header.version == built.version
    assert header.size == built.plan.stat().st_size > built.weight_bytes
    parameters = sum(int(np.prod(shape)) for shape in spec.tensor_shapes().values())
    assert built.weight_bytes >= 2 * parameters
    assert (
        built.cache_bytes == 2 * 2 * 4 * 2 * 128 * 32 * 2
    )  # k and v, layers, sequences, heads, positions, size, bytes
    assert built.facts.scratch_bytes > 0
    assert PlanFacts.model_validate_json((tmp_path / LAYERS).read_bytes()) == built.facts
    assert built.targets == ("sm80", "sm86", "sm89", "sm120")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_missing_weight_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"], leave_out="layers.1.mlp.up.weight")
    with pytest.raises(BadInputError, match=r"has no tensor layers\.1\.mlp\.up\.weight") as caught:
        build_tensorrt_engine(checkpoint, tmp_path / "out", options())
    assert caught.value.code == "TENSOR_MISSING"
    assert not (tmp_path / "out").exists()


def test_a_misshapen_weight_is_named(tmp_path):
    source = random_weights(FAMILIES["llama"])

    def wrong(name):
        weight = source(name)
        return Weight(weight.bits[:-1], weight.dtype) if name == "layers.0.attn.o.weight" else weight

    with pytest.raises(BadInputError, match=r"layers\.0\.attn\.o\.weight has shape \(63, 128\).*\(64, 128\)"):
        build(tmp_path, weights=wrong)


def test_what_tensorrt_refuses_is_told_with_layer_operation_types_and_shapes():
    layers = new_definition(module.load()).layers
    api = layers.trt.api
    x = layers.input("x", api.float16, (-1, -1, 64))
    weight = layers.constant("layers.3.attn.q.weight", np.zeros((1, 32, 48), np.float16))
    none, transpose = api.MatrixOperation.NONE, api.MatrixOperation.TRANSPOSE
    with pytest.raises(UnsupportedError) as caught:
        layers.add("matrix_multiply", "layers.3.attn.q", x, none, weight, transpose)
    message = caught.value.message
    assert "matrix_multiply for layers.3.attn.q" in message
    assert "x: half (-1, -1, 64)" in message
    assert "layers.3.attn.q.weight: half (1, 32, 48)" in message
    assert "last dimension of input0 = 64 and last dimension of input1 = 48" in message
    assert "cudaError" not in message
    assert "/_src" not in message
    assert caught.value.hint
    # the network is usable afterwards: complaints do not leak into the next layer
    layers.add("matrix_multiply", "fine", x, none, layers.constant("w", np.zeros((1, 8, 64), np.float16)), transpose)


def test_recorded_messages_are_cleaned():
    text = (
        "ITensor::getDimensions: Error Code 4: API Usage Error (layers.0.attn.q: last dimension must match. "
        "In validate at /_src/optimizer/api/layers/matrixMultiplyLayer.cpp:251)"
    )
    assert clean(text) == "layers.0.attn.q: last dimension must match"
    assert clean("something (else) entirely.") == "something (else) entirely"


@pytest.mark.parametrize(
    ("target", "dtype", "code", "hint"),
    [
        (("sm75",), "bfloat16", "TARGET_LACKS_DTYPE", "--dtype float16, or --target sm80"),
        (("sm80", "sm90"), "float16", "TARGET_UNKNOWN", "leave --target out: a plan for the default targets runs"),
        (("sm80", "sm90"), "float16", "TARGET_UNKNOWN", ", or add --target sm89"),
        (("sm100",), "float16", "TARGET_UNKNOWN", "add --target sm89"),
    ],
)
def test_targets_that_cannot_be(tmp_path, target, dtype, code, hint):
    with pytest.raises(UnsupportedError) as caught:
        build(tmp_path, dtype=dtype, target=target)
    assert caught.value.code == code
    assert hint in caught.value.hint


def test_an_old_target_takes_float16(tmp_path):
    assert build(tmp_path, target=("sm75",)).targets == ("sm75",)


def test_a_context_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"context 129 is beyond the 128 positions") as caught:
        build(tmp_path, sizing=Sizing(context=129, concurrency=1))
    assert caught.value.hint == "add --context 128"


@pytest.mark.parametrize(
    "given", [{"concurrency": 0}, {"context": 0}, {"target": "h100"}, {"target": "sm80,sm80"}, {"dtype": "int8"}]
)
def test_senseless_options_are_refused(given):
    with pytest.raises(UsageError) as caught:
        options(**given)
    assert caught.value.code == "OPTION_INVALID"
    assert next(iter(given)) in caught.value.message


def test_a_build_that_fails_inside_tensorrt_is_our_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trt_build, "_FIRST", {})  # let bfloat16 reach a target that TensorRT itself refuses it on
    with pytest.raises(UnsupportedError, match=r"made no plan: .*Cannot compile for target\(s\) sm75") as caught:
        build(tmp_path, dtype="bfloat16", target=("sm75",))
    assert caught.value.code == "TENSORRT_BUILD_FAILED"
    assert "cudaError" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("tensorrt_of_nobody",))
    module.load.cache_clear()
    try:
        with pytest.raises(UnsupportedError) as caught:
            module.load()
    finally:
        module.load.cache_clear()
    assert caught.value.hint == "pip install 'trtllm-cli[tensorrt]'"


def test_a_full_disk_is_not_taken_for_a_plan(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    (tmp_path / PLAN).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path)
    assert not os.path.lexists(tmp_path / PLAN)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: data[:-1], "PLAN_DAMAGED"),
        (lambda data: b"GGUF" + data[4:], "PLAN_FOREIGN"),
        (lambda data: data[:10], "PLAN_FOREIGN"),
    ],
)
def test_damaged_plans_are_noticed_without_a_gpu(tmp_path, change, code):
    path = tmp_path / "engine.plan"
    path.write_bytes(change(b"vtrt" + bytes(12) + (40).to_bytes(8, "little") + bytes([1, 6, 1, 120]) + bytes(12)))
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert caught.value.code == code


def _interrupted(tmp_path, weights):
    spec = small_spec(num_layers=24, windows=(None,) * 24)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_plan(spec, weights(random_weights(spec)), "float16", SIZING, (), tmp_path)
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_the_build_and_leaves_no_plan(tmp_path):
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    _interrupted(tmp_path, lambda source: source)


def test_an_interrupt_ends_the_definition(tmp_path):
    read = []

    def source_of(source):
        def get(name):
            read.append(name)
            if len(read) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return source(name)

        return get

    _interrupted(tmp_path, source_of)
    assert len(read) == 20


@pytest.mark.parametrize("phase", ["first line", "compiling"])
def test_an_interrupt_while_tensorrt_calls_back_comes_out(tmp_path, monkeypatch, phase):
    heard = LogReader.hear
    sent = []

    def hear(self, message):
        if not sent and (phase == "first line" or message.startswith("Constructing optimization profile")):
            sent.append(message)
            os.kill(os.getpid(), signal.SIGINT)
        heard(self, message)

    monkeypatch.setattr(LogReader, "hear", hear)
    _interrupted(tmp_path, lambda source: source)
    assert sent


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_convert_as_torch_does():
    import torch

    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    values[:5] = torch.tensor([0.0, -0.0, 1e-40, float("inf"), float("nan")])
    bits = cast(Weight(values.numpy(), "float32"), "bfloat16", "w")
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16).nan_to_num(9), values.bfloat16().nan_to_num(9))
    back = cast(Weight(bits, "bfloat16"), "float16", "w")
    assert torch.equal(torch.from_numpy(back).nan_to_num(9), values.bfloat16().half().nan_to_num(9))
    assert cast(Weight(bits, "bfloat16"), "bfloat16", "w") is bits


def test_a_weight_that_overflows_float16_is_refused():
    with pytest.raises(BadInputError, match=r"tensor norm\.weight holds 70000, which does not fit float16"):
        cast(Weight(np.array([1.0, -70000.0], np.float32), "float32"), "float16", "norm.weight")


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_the_engine_artifact(tmp_path):
    spec = FAMILIES["qwen2"]
    checkpoint = write_checkpoint(tmp_path / "in", spec, dtype="bfloat16")
    engine = build_tensorrt_engine(checkpoint, tmp_path / "out", options(concurrency=2, target="sm89,sm120"))
    found = open_artifact(tmp_path / "out", "engine", full=True)
    assert found.manifest == engine.manifest
    body = found.engine
    assert (body.backend, body.executor, body.dtype, body.spec) == ("tensorrt", "tensorrt_rtx", "bfloat16", spec)
    assert (body.limits.context, body.limits.concurrency) == (128, 2)
    assert body.limits.cache_bytes == 2 * 2 * 2 * 2 * 128 * 32 * 2
    assert body.limits.scratch_bytes > 0
    needs = {need.name: need.value for need in body.requirements}
    assert needs["tensorrt_rtx"] == module.load().version
    assert needs["compute_capability"] == "8.9 12.0"
    assert set(needs) == {"tensorrt_rtx", "compute_capability"}
    found_tactics = tensorrt_tactics(body)
    assert [(sizes.name, sizes.batch, sizes.attention) for sizes in found_tactics.profiles] == [
        ("context", (1, 1, 2), {"_gemm_mha_v2": 2}),
        ("generation-1", (1, 1, 1), {"_gemv_mha_v1": 2}),
        ("generation-2", (2, 2, 2), {"_gemv_mha_v1": 2}),
    ]
    assert found_tactics.complete
    settings = {name: (setting.value, setting.origin) for name, setting in found.manifest.config.items()}
    assert settings == {
        "context": (128, "derived"),
        "concurrency": (2, "command line"),
        "dtype": ("bfloat16", "derived"),
        "target": (["sm89", "sm120"], "command line"),
        "generation_batches": ([1, 2], "derived"),
        "max_ram": (None, "default"),
        "weights_as_inputs": (False, "default"),
        "fp8_attention": (False, "default"),
    }
    assert found.manifest.versions["tensorrt_rtx"] == needs["tensorrt_rtx"]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert found.file(name).read_bytes() == checkpoint.file(name).read_bytes()
    assert json.loads(found.file(LAYERS).read_text())["profiles"]
    read_header(found.file(PLAN))


def test_building_again_is_up_to_date(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"])
    first = build_tensorrt_engine(checkpoint, tmp_path / "out", options())
    written = (tmp_path / "out" / PLAN).stat().st_mtime_ns
    again = build_tensorrt_engine(checkpoint, tmp_path / "out", options(context=128))
    assert again.id == first.id
    assert (tmp_path / "out" / PLAN).stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="concurrency"):
        build_tensorrt_engine(checkpoint, tmp_path / "out", options(concurrency=3))


def test_a_log_in_another_format_is_not_mistaken_for_facts():
    reader = LogReader()
    reader.hear("Name: something, LayerType: new\nI/O Tensors:\n Name: token_ids, Mode: In\n")
    facts = reader.facts()
    assert not facts.complete
    assert facts.profiles == facts.io == ()
