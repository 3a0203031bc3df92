"""Plans of quantized checkpoints: the kernels each product compiled to, what the engine says, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from scripts.llama_shapes import SHAPES, make_checkpoint
from tests.support_artifacts import Said, raises
from tests.support_quantized import Choice, write_quantized
from tests.support_tensorrt_quantized import Checkpoints
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.schema import CALIBRATION_SKETCH, LayerQuantization, WeightScheme
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.build import LAYERS
from trtllm_cli.build.tensorrt.linears import census
from trtllm_cli.build.tensorrt.log import Kernel, PlanFacts, ProfileFacts
from trtllm_cli.build.tensorrt.quantized import scale_bits
from trtllm_cli.build.tensorrt.quantized_ops import QuantizedOps
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
from trtllm_cli.errors import BadInputError


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return Checkpoints(tmp_path_factory)


def build(checkpoint, output, report=None, **given):
    given.setdefault("dtype", "bfloat16")
    config = configure(TensorRTOptions, [("command line", {"concurrency": 4, **given})], "build --backend tensorrt")
    return build_tensorrt_engine(checkpoint, output, config, report=report)


#: scheme, compute type, tied -> kernels of the 14 products of two layers and of the head
BUILDS = [
    ("int8", "float16", False, {"int8 weights": 15}),
    ("int8", "bfloat16", True, {"int8 weights": 15}),
    ("int4-g64", "float16", True, {"int4 weights": 14, "int8 weights": 1}),
    ("int4-g128", "bfloat16", False, {"int4 weights": 14, "int8 weights": 1}),
    ("int4-g32", "float16", False, {"int4 weights": 14, "int8 weights": 1}),
    ("int4-rows", "bfloat16", False, {"int4 weights": 14, "int8 weights": 1}),
    ("int4-everywhere", "bfloat16", False, {"int4 weights": 15}),
    ("gptq-by-activation", "float16", False, {"int4 weights": 14, "int8 weights": 1}),
    ("fp8-static", "float16", False, {"fp8 products": 14, "int8 weights": 1}),
    ("fp8-static", "bfloat16", True, {"fp8 products": 14, "int8 weights": 1}),
    ("fp8-static-rows", "bfloat16", False, {"fp8 products": 14, "int8 weights": 1}),
    ("fp8-token", "bfloat16", False, {"fp8 products": 14, "int8 weights": 1}),
    ("w8a8-static", "bfloat16", False, {"int8 products": 14, "int8 weights": 1}),
    ("w8a8-token", "bfloat16", True, {"int8 products": 14, "int8 weights": 1}),
    ("mixed", "bfloat16", False, {"int4 weights": 6, "int8 weights": 4, "fp8 products": 2, "bfloat16": 3}),
]


@pytest.mark.parametrize(("scheme", "dtype", "tied", "products"), BUILDS)
def test_every_product_becomes_the_intended_kernel_and_attention_is_fused(
    quantized, tmp_path, scheme, dtype, tied, products
):
    engine = build(quantized(scheme, tied), tmp_path / "out", dtype=dtype).engine
    profiles = tensorrt_tactics(engine).profiles
    weights_only = scheme.startswith(("int", "gptq", "mixed"))
    assert [one.batch for one in profiles[1:]] == ([(1, 1, 4)] if weights_only else [(1, 1, 1), (2, 4, 4)])
    for profile in profiles:
        assert profile.products == products, profile.fallbacks
        assert profile.fallbacks == {}
        assert profile.attention == ({"_gemm_mha_v2": 2} if profile.name == "context" else {"_gemv_mha_v1": 2})
    assert engine.quantization == quantized(scheme, tied).checkpoint.quantization
    facts = PlanFacts.model_validate_json((tmp_path / "out" / LAYERS).read_bytes())
    for profile in facts.profiles:
        assert all(kernel.sources for kernel in profile.kernels if kernel.type in ("gemm", "runtime_fusion"))


@pytest.mark.parametrize("scheme", ["int8", "fp8-static", "fp8-static-rows", "fp8-token", "w8a8-static"])
def test_products_of_one_input_are_one_kernel_and_q_and_k_are_turned_by_one(quantized, tmp_path, scheme):
    build(quantized(scheme), tmp_path / "out")
    facts = PlanFacts.model_validate_json((tmp_path / "out" / LAYERS).read_bytes())
    inputs = ({f"layers.0.attn.{part}" for part in "qkv"}, {"layers.0.mlp.gate", "layers.0.mlp.up"})
    for profile in facts.profiles:
        products = [kernel for kernel in profile.kernels if kernel.type in ("gemm", "runtime_fusion")]
        named = [{part for source in kernel.sources for part in source.split("+")} for kernel in products]
        for modules in inputs:
            assert [modules <= names for names in named if modules & names] == [True], modules
        turning = [set(kernel.sources) for kernel in profile.kernels if "layers.0.attn.qkv/rotary" in kernel.sources]
        assert len(turning) == 1
        caches = {"layers.0.k_cache/update", "layers.0.v_cache/update"}
        assert profile is facts.profiles[0] or caches <= turning[0]


def test_without_a_quantization_products_count_as_the_compute_type(quantized, tmp_path):
    said = Said()
    engine = build(quantized.dense(), tmp_path / "out", said, dtype="float16").engine
    assert engine.quantization is None
    assert [profile.products for profile in tensorrt_tactics(engine).profiles] == [{"float16": 15}] * 3
    assert any(line.startswith("context: ") and line.endswith("products: 15 float16") for line in said.lines)


def test_a_product_that_fell_back_is_told_and_recorded(quantized, tmp_path, monkeypatch):
    """Without what holds the reshape before attn.o, TensorRT dequantizes that weight in memory first."""
    plain = QuantizedOps.linear

    def linear(self, x, module):
        self._reshaped.clear()
        return plain(self, x, module)

    monkeypatch.setattr(QuantizedOps, "linear", linear)
    said = Said()
    engine = build(quantized("int8"), tmp_path / "out", said).engine
    modules = ["layers.0.attn.o", "layers.1.attn.o"]
    for profile in tensorrt_tactics(engine).profiles:
        assert profile.products == {"bfloat16": 2, "int8 weights": 13}
        assert profile.fallbacks == dict.fromkeys(modules, "bfloat16 instead of int8 weights")
        line = f"{profile.name}: 2 modules fell back to bfloat16 instead of int8 weights: {', '.join(modules)}"
        assert line in said.lines
    assert open_artifact(tmp_path / "out", "engine").engine.tactics == engine.tactics


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_profile_of_wide_low_bit_weights_falls_back(tmp_path, kind):
    """Wider int8 weights are dequantized first where the batch is fixed at 1, and an int8 head where its rows are."""
    spec = SHAPES["smollm2-135m"].model_copy(
        update={"num_layers": 1, "windows": (None,), "vocab_size": 4096, "tie_embeddings": False}
    )
    checkpoint = make_checkpoint(tmp_path / "in", spec, kind)
    low = {"int8": {"int8 weights": 8}, "int4": {"int4 weights": 7, "int8 weights": 1}}[kind]
    found = tensorrt_tactics(build(checkpoint, tmp_path / "out", context=256).engine)
    assert [(profile.products, profile.fallbacks) for profile in found.profiles] == [(low, {})] * 2
    assert found.profiles[1].batch == (1, 1, 4)
    alone = tensorrt_tactics(build(checkpoint, tmp_path / "alone", context=256, concurrency=1).engine)
    assert [(profile.products, profile.fallbacks) for profile in alone.profiles] == [(low, {})] * 2


def test_a_profile_of_ones_own_choice_that_falls_back_is_told(tmp_path):
    spec = SHAPES["smollm2-135m"].model_copy(update={"num_layers": 1, "windows": (None,), "vocab_size": 4096})
    said = Said()
    engine = build(make_checkpoint(tmp_path / "in", spec, "int8"), tmp_path / "out", said, generation_batches="1,4")
    _, one, few = tensorrt_tactics(engine.engine).profiles
    assert "bfloat16 instead of int8 weights" in one.fallbacks.values()
    assert few.fallbacks == {}
    assert any(line.startswith("generation-1: ") and "fell back" in line for line in said.lines)


def test_an_embedding_of_its_own_is_read_in_its_low_bit_form(quantized, tmp_path):
    """Rows are gathered from the int8 table, not from one that was dequantized."""
    build(quantized("int8"), tmp_path / "out")
    facts = PlanFacts.model_validate_json((tmp_path / "out" / LAYERS).read_bytes())
    for profile in facts.profiles:
        gathers = [kernel for kernel in profile.kernels if "embed/rows" in kernel.sources]
        assert [("Int8" in kernel.constants, kernel.outputs[0]) for kernel in gathers] == [(True, "BFloat16")]


def test_a_calibrated_engine_carries_the_sketch_of_its_calibration(quantized, tmp_path):
    build(quantized("w8a8-static"), tmp_path / "out")
    ours, theirs = (artifact.path / CALIBRATION_SKETCH for artifact in _both(quantized("w8a8-static"), tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()


def _both(checkpoint, tmp_path):
    return open_artifact(tmp_path / "out", "engine"), checkpoint


def test_the_target_must_have_the_type_of_the_weights(quantized, tmp_path):
    for scheme, target, kind in (("fp8-token", "sm86", "fp8"), ("int4-g64", "sm75", "int4")):
        with raises("TARGET_LACKS_DTYPE", 4, f"target {target} has no {kind} arithmetic") as caught:
            build(quantized(scheme), tmp_path / "out", target=target, dtype="float32")
        assert "--target sm8" in caught.value.hint
        assert "--dtype" not in caught.value.hint
    engine = build(quantized("fp8-static"), tmp_path / "out")
    assert engine.manifest.config["target"].value == ["sm89", "sm120"]


# ---- refusals --------------------------------------------------------------------------------------------------------


def linears(choice):
    return lambda module: choice if module.startswith("layers.") else None


@pytest.mark.parametrize(
    ("choice", "kv", "dtype", "code", "needle", "hint"),
    [
        (None, "int8", "bfloat16", "TENSORRT_KV_QUANTIZED", "has an int8 cache", "without --kv-cache"),
        (None, "fp8", "bfloat16", "TENSORRT_KV_QUANTIZED", "has an fp8 cache", "--backend cpu"),
        (
            Choice("int4", "group", symmetric=False),
            None,
            "bfloat16",
            "TENSORRT_ASYMMETRIC",
            "zero points",
            "--symmetric",
        ),
        (Choice("fp8"), None, "bfloat16", "TENSORRT_FP8_WEIGHTS", "nothing would be gained", "--activations token"),
        (
            Choice("int8", activation="tensor"),
            None,
            "float16",
            "TENSORRT_FLOAT16_OVERFLOW",
            "infinity",
            "--dtype bfloat16",
        ),
        (Choice("int8", activation="token"), None, "float16", "TENSORRT_FLOAT16_OVERFLOW", "int8 by int8", "bfloat16"),
        (Choice("fp8", activation="token"), None, "float16", "TENSORRT_FLOAT16_OVERFLOW", "fp8 by fp8", "bfloat16"),
        (
            Choice("fp8", "channel", activation="tensor"),
            None,
            "float16",
            "TENSORRT_FLOAT16_OVERFLOW",
            "layers.0.attn.q and 13 more modules",
            "--dtype bfloat16",
        ),
        (
            Choice("int4", "group", groups=4, shuffle=1),
            None,
            "bfloat16",
            "TENSORRT_GROUPS_UNEVEN",
            "layers.0.attn.q has groups of",
            "--act-order static",
        ),
    ],
)
def test_what_tensorrt_does_not_take_is_refused_with_the_nearest_that_it_takes(
    quantized, tmp_path, choice, kv, dtype, code, needle, hint
):
    change = None
    if code == "TENSORRT_GROUPS_UNEVEN":

        def change(tensors):
            tensors["layers.0.attn.q.weight_group"][tensors["layers.0.attn.q.weight_group"] == 3] = 2
            tensors["layers.0.attn.q.weight_group"][0] = 3

    checkpoint = write_quantized(quantized.dense(), tmp_path / "in", linears(choice), kv=kv, change=change)
    with raises(code, 4, needle) as caught:
        build(checkpoint, tmp_path / "out", dtype=dtype)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("weight_scale", None, "TENSOR_MISSING"),
        ("weight_scale", lambda scale: scale[:-1], "TENSOR_SHAPE"),
        ("weight", lambda weight: weight.float(), "TENSOR_TYPE"),
        ("weight", lambda weight: weight[:, :-1].contiguous(), "TENSOR_SHAPE"),
        ("input_scale", lambda scale: scale * 0, "TENSOR_SHAPE"),
        ("weight_scale", lambda scale: scale * 1e-9, "SCALE_RANGE"),
    ],
)
def test_tensors_that_do_not_fit_the_record_are_named(quantized, tmp_path, name, change, code):
    tensor = f"layers.1.mlp.up.{name}"

    def damage(tensors):
        found = tensors.pop(tensor)
        if change is not None:
            tensors[tensor] = change(found)

    choice = Choice("int8", activation="tensor" if name == "input_scale" else None)
    checkpoint = write_quantized(quantized.dense(), tmp_path / "in", linears(choice), change=damage)
    with raises(code, 3, "layers.1.mlp.up"):
        build(checkpoint, tmp_path / "out", dtype="bfloat16" if name == "input_scale" else "float16")
    assert not (tmp_path / "out").exists()


def test_a_scale_below_the_compute_type_is_refused():
    scale = np.array([0.01, 1e-9], np.float32)
    with pytest.raises(BadInputError, match=r"layers\.0\.attn\.q has a scale of 1e-09, which does not fit float16"):
        scale_bits(scale, "float16", "layers.0.attn.q")
    assert scale_bits(scale, "bfloat16", "q").shape == (2,)
    assert scale_bits(np.array(0.5, np.float32), "float16", "q").shape == ()


# ---- reading kernels -------------------------------------------------------------------------------------------------


def test_kernels_are_judged_by_what_they_read():
    from tests.support_tensorrt import small_spec

    spec = small_spec(num_layers=1, windows=(None,))
    layer = {
        module: LayerQuantization(module=module, scheme=WeightScheme(type="int8", granularity="channel"))
        for module in spec.linears()
    }

    def kernel(module, kind, inputs, constants):
        return Kernel(
            name=module, type=kind, inputs=inputs, constants=constants, outputs=("Half",), sources=(module, "x")
        )

    kernels = [
        kernel("layers.0.attn.q", "runtime_fusion", ("Half",), ("Half", "Int8")),
        kernel("layers.0.attn.k", "gemm", ("Half", "Half"), ("Float", "Float")),
        kernel("layers.0.attn.v", "gemm", ("Int8",), ("Int8", "Float")),
        kernel("layers.0.attn.o", "gemm", ("Half",), ("Half", "Float")),
        kernel("layers.0.mlp.gate#2", "runtime_fusion", ("Half",), ("Int8",)),
        kernel("layers.0.attn", "kgen", ("Half",), ()).model_copy(update={"name": "_gemm_mha_v2_myl0_1"}),
    ]
    found = census(ProfileFacts(kernels=tuple(kernels), scratch_bytes=0), spec, layer, "float16")
    unknown = "kernels unknown to this version"
    assert found.kinds == {"float16": 2, "int8 products": 1, "int8 weights": 2, unknown: 3}
    assert found.fallbacks == {
        "layers.0.attn.k": "float16 instead of int8 weights",
        "layers.0.attn.v": "int8 products instead of int8 weights",
        "layers.0.attn.o": "float16 instead of int8 weights",
        **dict.fromkeys(("layers.0.mlp.up", "layers.0.mlp.down", "lm_head"), f"{unknown} instead of int8 weights"),
    }


def test_generated_kernels_are_judged_too():
    """A generated kernel (kgen) is the product where no other is, reads several weights, and floats of the norm."""
    from tests.support_tensorrt import small_spec

    spec = small_spec(num_layers=1, windows=(None,))
    int8 = WeightScheme(type="int8", granularity="channel")
    int4 = WeightScheme(type="int4", granularity="group", group_size=32)
    schemes = {"attn.q": int8, "attn.v": int8, "attn.o": int8, "mlp.gate": int8, "mlp.up": int4, "mlp.down": int8}
    layer = {
        f"layers.0.{name}": LayerQuantization(module=f"layers.0.{name}", scheme=it) for name, it in schemes.items()
    }

    def kernel(kind, inputs, constants, *sources):
        sources = tuple(source if source == "lm_head" else f"layers.0.{source}" for source in sources)
        return Kernel(name="k", type=kind, inputs=inputs, constants=constants, outputs=("Half",), sources=sources)

    kernels = [
        # what follows a product holds its name too, but a kernel of the library decides
        kernel("kgen", ("Half",), ("Half",), "attn.q", "attn.q/rotary"),
        kernel("gemm", ("Half",), ("Int8",), "attn.q"),
        # k is not quantized: the int8 constant is v's
        kernel("kgen", ("Float",), ("Half", "Int8"), "attn_norm", "attn.k", "attn.v/weight", "attn.v"),
        # o's weight was dequantized by a kernel of its own
        kernel("kgen", (), ("Int8",), "attn.o/weight"),
        kernel("kgen", ("Half", "Half"), (), "attn.o"),
        kernel("kgen", ("Float",), ("Int4", "Int8"), "mlp.gate", "mlp.up"),
        # down reads an int4 constant that nothing explains
        kernel("kgen", ("Half",), ("Int4",), "mlp.down"),
        kernel("kgen", ("Int32", "Float"), ("Half",), "lm_head"),
    ]
    fused = kernel("kgen", ("FP8", "FP8", "FP8", "Bool"), (), "attn").model_copy(update={"name": "_gemv_mha_v1_myl1_9"})
    kernels.append(fused)
    found = census(ProfileFacts(kernels=tuple(kernels), scratch_bytes=0), spec, layer, "float16")
    assert found.fallbacks == {
        "layers.0.attn.o": "float16 instead of int8 weights",
        "layers.0.mlp.down": "int4 weights instead of int8 weights",
    }
    assert found.kinds == {"int8 weights": 3, "float16": 3, "int4 weights": 2}


def _attention_of(found):
    return {module: what for module, what in found.fallbacks.items() if module.endswith(".attn")}


def test_attention_is_judged_by_its_kernel():
    from tests.support_tensorrt import small_spec

    spec = small_spec(num_layers=3, windows=(None,) * 3)

    def profile(*kernels):
        made = (
            Kernel(name=name, type="kgen", inputs=inputs, constants=(), outputs=("Half",), sources=(source,))
            for name, inputs, source in kernels
        )
        return ProfileFacts(kernels=tuple(made), scratch_bytes=0)

    fp8, half = ("FP8", "FP8", "FP8", "Bool"), ("Half", "Half", "Half", "Bool")
    mixed = profile(
        ("_gemm_mha_v2_myl0_1", fp8, "layers.0.attn"),
        ("_gemm_mha_v2_myl0_2", half, "layers.1.attn"),
        ("__myl_MulMaxExp_myl0_3", half, "layers.2.attn"),
    )
    assert mixed.attention == {"_gemm_mha_v2 fp8": 1, "_gemm_mha_v2": 1}
    apart = {"layers.2.attn": "several kernels instead of a fused one"}
    assert _attention_of(census(mixed, spec, {}, "float16")) == apart
    wide = {"layers.1.attn": "attention in the compute type instead of fp8"}
    assert _attention_of(census(mixed, spec, {}, "float16", fp8_attention=True)) == wide | apart
