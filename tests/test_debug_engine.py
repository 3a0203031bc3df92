"""`debug engine`: faults planted in one layer are named, agreement is found where there is none, errors are said."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import convert_to, quantize_to, raises, save_folder, source_of, text_model
from tests.support_debug import engine_of, faulty_checkpoint
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import define, new_definition
from trtllm_cli.build.tensorrt.ops import TrtOps
from trtllm_cli.build.tensorrt.quantized import nothing
from trtllm_cli.build.tensorrt.weights import stored
from trtllm_cli.cli.main import invoke
from trtllm_cli.debug.capture import Marks, Names, ReferenceRun
from trtllm_cli.debug.compare import Captured, compare, departure, layer_of, rise
from trtllm_cli.debug.device import PlanRun
from trtllm_cli.debug.engine import DebugOptions, debug_engine
from trtllm_cli.debug.page import page, sentence
from trtllm_cli.debug.results import DebugResult, PointResult
from trtllm_cli.runtime.tensorrt.memory import Memory
from trtllm_cli.runtime.tensorrt.reference import ReferenceContext, ReferenceSession

PROMPT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def engine(tmp_path_factory, text_checkpoint) -> Artifact:
    """Of the shared float32 checkpoint."""
    return engine_of(text_checkpoint, tmp_path_factory.mktemp("debug") / "engine")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> tuple[Artifact, Artifact]:
    """:func:`faulty_checkpoint`, and an engine of it."""
    directory = tmp_path_factory.mktemp("faulty")
    checkpoint = faulty_checkpoint(directory)
    return checkpoint, engine_of(checkpoint, directory / "engine")


def compared(engine: Artifact, against: Artifact, checkpoint: Artifact | None = None, **options: object) -> DebugResult:
    given = DebugOptions(executor="reference", prompt=PROMPT, **options)
    return debug_engine(engine, against, given, checkpoint=checkpoint.path if checkpoint else None)


@pytest.mark.parametrize("phase", ["context", "generation"])
def test_an_engine_agrees_with_its_own_checkpoint(engine, text_checkpoint, phase):
    result = compared(engine, text_checkpoint, phase=phase)
    names = [point.name for point in result.points]
    inside = [
        "attn_norm", "attn.q", "attn.k", "attn.v", "attn.q/rotary", "attn.k/rotary", "attn", "attn.o",
        "attn.o/residual", "mlp_norm", "mlp.gate", "mlp.up", "mlp.gate/silu", "mlp.up/product", "mlp.down",
        "mlp.down/residual",
    ]  # fmt: skip
    assert names == ["embed", *(f"layers.{i}.{name}" for i in range(2) for name in inside), "norm", "logits"]
    assert result.departure is None
    assert all(point.relative_error < 1e-5 and point.cosine > 0.99999 for point in result.points)
    tokens = 1 if phase == "generation" else len(result.tokens)
    assert result.point("layers.1.mlp.down").shape == (tokens, 128)
    assert result.point("layers.0.attn.k/rotary").shape == (1, 2, tokens, 32)
    assert result.point("layers.1.mlp.up/product").inputs == ("layers.1.mlp.gate/silu", "layers.1.mlp.up")


@pytest.mark.parametrize("phase", ["context", "generation"])
def test_a_perturbed_weight_is_found_in_its_layer(faulty, text_checkpoint, phase):
    checkpoint, engine = faulty
    result = compared(engine, text_checkpoint, checkpoint, phase=phase)
    assert result.departure == result.rise == "layers.1.mlp.up"
    before = [point for point in result.points if point.layer == 0 or "attn" in point.name]
    assert before and all(point.relative_error < 1e-5 for point in before)
    assert (result.checkpoint, result.against) == (checkpoint.id, text_checkpoint.id)


def test_a_wrong_epsilon_is_found_at_its_norm(engine, text_checkpoint, monkeypatch):
    right = TrtOps.norm

    def wrong(self, x, module, spec):
        eps = 0.05 if module == "layers.1.mlp_norm" else spec.eps
        return right(self, x, module, spec.model_copy(update={"eps": eps}))

    monkeypatch.setattr(TrtOps, "norm", wrong)
    result = compared(engine, text_checkpoint)
    assert result.departure == "layers.1.mlp_norm"


def test_a_wrong_rotation_is_found_beneath_the_attention(engine, text_checkpoint, monkeypatch):
    right = TrtOps.rotary

    def wrong(self, x, positions, spec):
        theta = 5000.0 if x.name.startswith("layers.0.attn.") else spec.theta
        return right(self, x, positions, spec.model_copy(update={"theta": theta}))

    monkeypatch.setattr(TrtOps, "rotary", wrong)
    assert compared(engine, text_checkpoint).departure == "layers.0.attn.q/rotary"


def test_chosen_layers_only_and_their_nearest_inputs(faulty, text_checkpoint):
    checkpoint, engine = faulty
    result = compared(engine, text_checkpoint, checkpoint, layers=("layers.*.attn", "*.down/residual"))
    names = ["layers.0.attn", "layers.0.mlp.down/residual", "layers.1.attn", "layers.1.mlp.down/residual", "logits"]
    assert [point.name for point in result.points] == names
    assert result.departure == "layers.1.mlp.down/residual"
    # residual and attention of the same layer: what lies between is not compared
    assert result.point(result.departure).inputs == ("layers.0.mlp.down/residual", "layers.1.attn")


def test_a_quantized_engine_against_itself_and_its_source(tmp_path, text_checkpoint):
    checkpoint = quantize_to(text_checkpoint.path, tmp_path / "int4", method="int4-weight-only", group_size=64)
    engine = engine_of(checkpoint, tmp_path / "engine")
    assert compared(engine, checkpoint).departure is None
    against = compared(engine, text_checkpoint, checkpoint)
    # four bits show at the first product, not at the norm before it
    assert against.departure == "layers.0.attn.q"
    assert 0.02 < against.point("layers.0.attn.q").relative_error < 0.3


def test_an_engine_whose_weights_are_inputs(tmp_path, text_source):
    checkpoint = convert_to(text_source.path, tmp_path / "checkpoint", dtype="bfloat16")
    engine = engine_of(checkpoint, tmp_path / "engine", weights_as_inputs=True)
    assert compared(engine, checkpoint).departure is None


def test_attention_in_fp8_shows_at_the_first_attention(tmp_path, text_source):
    checkpoint = convert_to(text_source.path, tmp_path / "checkpoint", dtype="bfloat16")
    wide = compared(engine_of(checkpoint, tmp_path / "engine"), checkpoint)
    narrow = compared(engine_of(checkpoint, tmp_path / "fp8", fp8_attention=True), checkpoint, tolerance=0.02)
    assert narrow.departure == "layers.0.attn"
    assert narrow.point("layers.0.attn.k/rotary").relative_error < 0.01
    assert wide.point("layers.0.attn").relative_error < 0.01 < narrow.point("layers.0.attn").relative_error < 0.2


def test_16_bit_rounding_is_within_the_default_tolerance(tmp_path, text_source):
    for dtype in ("bfloat16", "float16"):
        checkpoint = convert_to(text_source.path, tmp_path / dtype, dtype=dtype)
        result = compared(engine_of(checkpoint, tmp_path / f"{dtype}-engine"), checkpoint)
        assert result.departure is None
        assert result.point("layers.0.attn.q").relative_error > 1e-5


class Shaped(ReferenceContext):
    """Tells the shapes of outputs as TensorRT does, by running the network on zeros."""

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        session = self._session
        zeros = {
            key: torch.zeros(self._shape(key), dtype=session.evaluator.torch_dtype(tensor.dtype))
            for key, tensor in session.inputs.items()
        }
        return tuple(session.evaluator.run(zeros)[name].shape)


@pytest.mark.parametrize("phase", ["context", "generation"])
def test_what_drives_a_gpu_reads_every_point_of_the_marked_network(engine, text_checkpoint, phase):
    """Through TensorRT's interface over the evaluator: shapes, addresses, aliases and profiles are the GPU's."""
    body, spec = engine.engine, engine.engine.spec
    marks, layers = Marks(Names(["*"])), new_definition(load()).layers
    define(layers, spec, stored(TensorStore(text_checkpoint.path)), "float32", 64, nothing, marks)
    session = ReferenceSession(layers, tensorrt_tactics(body))

    def context(profile: int) -> Shaped:
        made = Shaped(session)
        assert made.set_optimization_profile_async(profile, 0)
        return made

    session.context = context
    shape = (1, spec.num_kv_heads, 64, spec.head_dim)
    memory = Memory(torch.device("cpu"))
    device = PlanRun(session, memory, spec, shape, torch.float32, dict.fromkeys(marks.dtypes, torch.float32))
    plain = ReferenceRun(layers, spec, shape, torch.float32)
    steps = [([5, 9, 200, 31], 0)] + ([([17], 4)] if phase == "generation" else [])
    for tokens, start in steps:
        found, wanted = device.step(tokens, start), plain.step(tokens, start)
    assert set(found) == set(marks.tensors.values())
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_a_refused_step_says_why(engine, text_checkpoint):
    spec, layers = engine.engine.spec, new_definition(load()).layers
    define(layers, spec, stored(TensorStore(text_checkpoint.path)), "float32", 64)
    session = ReferenceSession(layers, tensorrt_tactics(engine.engine))
    shape = (1, spec.num_kv_heads, 64, spec.head_dim)
    device = PlanRun(session, Memory(torch.device("cpu")), spec, shape, torch.float32, {})
    with raises("ENGINE_REFUSED", 3, "shape (1, 65) for token_ids", "must lie in"):
        device.step([3] * 65, 0)
    with raises("ENGINE_REFUSED", 3, "no address is set for logits"):
        device.step([3, 4], 0)


def test_nan_is_a_departure():
    source = {"a": Captured(torch.ones(4), ()), "b": Captured(torch.ones(4), ("a",))}
    network = {"a": Captured(torch.ones(2, 2), ()), "b": Captured(torch.tensor([1.0, 1, 1, float("nan")]), ("a",))}
    points = compare(network, source)
    assert points[0].relative_error == 0.0 and points[0].cosine == pytest.approx(1.0)
    assert (points[1].relative_error, points[1].finite) == (None, False)
    assert departure(points, 1e9) == rise(points) == "b"
    with pytest.raises(ValueError, match="b has shape"):
        compare({"b": Captured(torch.ones(3), ())}, source)


def test_the_command_prints_a_table_and_writes_the_plot(faulty, text_checkpoint, tmp_path, capsys):
    checkpoint, engine = faulty
    given = [
        "debug", "engine", str(engine.path), "--against", str(text_checkpoint.path),
        "--checkpoint", str(checkpoint.path), "--executor", "reference", "--prompt", PROMPT,
    ]  # fmt: skip
    assert invoke([*given, "--plot", str(tmp_path / "plot.html")]) == 0
    printed = capsys.readouterr().out
    assert "The first departure is layers.1.mlp.up: relative error 0." in printed
    table = {line.split()[0]: line for line in printed.splitlines() if line.startswith("layers.")}
    assert len(table) == 32 and " 1 x 4 x " in table["layers.0.attn.q/rotary"]
    page = (tmp_path / "plot.html").read_text()
    assert "first departure: layers.1.mlp.up" in page
    assert page.count("<circle") == 35 and "<script" not in page and "http" not in page
    assert invoke([*given, "--plot", str(tmp_path / "plot.svg"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["departure"], result["version"]) == ("layers.1.mlp.up", 1)
    DebugResult.model_validate({key: value for key, value in result.items() if key != "plot"})
    assert (tmp_path / "plot.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_a_tolerance_is_a_gate(faulty, text_checkpoint, capsys):
    checkpoint, engine = faulty
    given = [
        "debug", "engine", str(engine.path), "--against", str(text_checkpoint.path), "--prompt", PROMPT,
        "--checkpoint", str(checkpoint.path), "--executor", "reference", "--layers", "*.mlp.*",
    ]  # fmt: skip
    assert invoke([*given, "--tolerance", "0.001"]) == 6
    assert "error[DEPARTURE]" in capsys.readouterr().err
    assert invoke([*given, "--tolerance", "2"]) == 0


def test_what_is_refused(engine, faulty, text_checkpoint, text_int8, native_engine, tmp_path):
    with raises("DEBUG_BACKEND", 4, "cpu engine"):
        compared(native_engine, text_checkpoint)
    with raises("CHECKPOINT_NEEDED", 2, text_checkpoint.id[:12]):
        compared(engine, text_int8)
    with raises("CHECKPOINT_OTHER", 2, text_checkpoint.id[:12], faulty[0].id[:12]):
        compared(engine, text_int8, faulty[0])
    with raises("LAYERS_UNKNOWN", 2, "layers.7.*"):
        compared(engine, text_checkpoint, layers=("layers.7.*",))
    with raises("CONTEXT_EXCEEDED", 5):
        debug_engine(engine, text_checkpoint, DebugOptions(prompt=PROMPT * 20, executor="reference"))
    with raises("PROMPT_SHORT", 2):
        debug_engine(engine, text_checkpoint, DebugOptions(prompt="", executor="reference"))
    small = convert_to(
        source_of(
            save_folder(text_model(num_hidden_layers=1), tmp_path / "published", tokenizer=True), tmp_path / "source"
        ).path,
        tmp_path / "small",
    )
    with raises("SPEC_DIFFERS", 4, "num_layers"):
        compared(engine, small, text_checkpoint)
    assert invoke(["debug", "engine", str(engine.path), "--against", str(small.path), "--plot", "plot.png"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_needs_a_gpu(engine, text_checkpoint):
    with raises("NO_GPU", 4):
        debug_engine(engine, text_checkpoint, DebugOptions(executor="tensorrt"))


def test_a_page_of_nan_and_of_agreement_to_the_last_bit():
    values = {"embed": 0.0, "layers.0.attn.q": 1e-6, "layers.1.attn.q": None, "logits": None}
    points = [
        PointResult(
            name=name, layer=layer_of(name), shape=(2, 4), relative_error=error, cosine=None, max_error=None,
            largest=1.0, finite=error is not None, inputs=(),
        )
        for name, error in values.items()
    ]  # fmt: skip
    given = {
        "engine": "0" * 64, "checkpoint": "1" * 64, "against": "1" * 64, "executor": "tensorrt", "phase": "context",
        "dtype": "float16", "tokens": (1, 2), "tolerance": 1e-2, "seconds": 0.1,
    }  # fmt: skip
    result = DebugResult(points=tuple(points), departure=departure(points, 1e-2), rise=rise(points), **given)
    assert (result.departure, result.rise) == ("layers.1.attn.q", "layers.1.attn.q")
    drawn = page(result, "<name>")
    heights = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', drawn)]
    # larger is higher: zero at the bottom, what is not finite at the top
    assert heights == sorted(heights, reverse=True) and heights[2] == heights[3] == min(heights)
    assert drawn.count('<circle class="two"') == 2 and "NaN or infinite" in drawn
    assert "&lt;name&gt;" in drawn and "<name>" not in drawn
    agreeing = result.model_copy(update={"points": tuple(points[:2]), "departure": None})
    assert "None of 2 points departs" in sentence(agreeing) and "first departure:" not in page(agreeing, "x")
