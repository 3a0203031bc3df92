"""``run``, ``eval`` and ``bench`` of TensorRT engines on the command line, and what they say when they cannot run.

By the reference executor: everything but the kernels.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import CORPUS, build_to, copy_of
from tests.support_tensorrt_runtime import checkpoint_of, engine_of, family_model
from tests.test_cli import Ran, run  # noqa: F401 (run is a fixture)
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.build.tensorrt import module
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.runtime.tensorrt import compatible, driver, load

PROMPTS = [
    {"prompt": "The quick brown fox"},
    {"messages": [{"role": "user", "content": "Who sleeps?"}], "max_new_tokens": 9},
    {"prompt": "A clever fox reads the whole library, and", "max_new_tokens": 4},
    {"prompt": "jumps"},
    {"prompt": "Ein Bär läuft über die Straße"},
    {"prompt": "dog", "seed": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``checkpoint``, and beside it ``engine`` (TensorRT) and ``cpu`` (an engine of the torch executor)."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = checkpoint_of(family_model("qwen2"), folder)
    engine_of(checkpoint, folder / "engine")
    build_to(checkpoint.path, folder / "cpu", executor="torch", context=64)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return file


def test_run_prints_what_the_cpu_engine_prints(run, folder, prompts):  # noqa: F811
    options = ("--prompt-file", prompts, "--max-new-tokens", "12", "--threads", "1")
    ours = run("run", folder / "engine", "--executor", "reference", *options)
    theirs = run("run", folder / "cpu", *options)
    assert ours.code == 0, ours.err
    assert ours.out == theirs.out
    assert len(set(ours.out.splitlines())) > len(PROMPTS)
    sampled = ("--temperature", "0.9", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "5", "--json")
    ours = run("run", folder / "engine", "--executor", "reference", *options, *sampled)
    theirs = run("run", folder / "cpu", *options, *sampled)
    found, expected = ([one["tokens"] for one in ran.json["completions"]] for ran in (ours, theirs))
    assert found == expected
    assert "first after" in ours.err


def test_run_streams_and_stops_at_the_context(run, folder):  # noqa: F811
    options = ("--prompt", "The lazy dog", "--max-new-tokens", "100", "--ignore-eos", "--threads", "1")
    ours = run("run", folder / "engine", "--executor", "reference", "--stream", *options)
    assert ours.out == run("run", folder / "cpu", "--stream", *options).out
    assert "context of 64 tokens is full" in ours.err
    long = run("run", folder / "engine", "--executor", "reference", "--prompt", CORPUS)
    long.failed("PROMPT_TOO_LONG", 5, "64")


def test_eval_against_the_checkpoint(run, folder, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text(CORPUS)
    options = ("--text", text, "--context", "40", "--windows", "2", "--json")
    against = ("--against", folder / "checkpoint")
    ours = run("eval", folder / "engine", "--executor", "reference", *options, *against, "-o", tmp_path / "report")
    assert ours.code == 0, ours.err
    perplexity, divergence = ours.json["results"]
    assert perplexity["perplexity"] == pytest.approx(
        run("eval", folder / "cpu", *options).json["results"][0]["perplexity"], rel=1e-5
    )
    assert divergence["mean"] < 1e-8
    assert divergence["top1_agreement"] == 1.0
    report = open_artifact(tmp_path / "report", "report", full=True)
    assert report.manifest.identity["executor"] == "reference"


def test_eval_of_tasks(run, folder, tmp_path):  # noqa: F811
    tasks = tmp_path / "tasks.jsonl"
    rows = [
        {"query": "The lazy dog", "choices": [" sleeps", " reads", " jumps over"], "gold": 0},
        {"query": "A clever", "choices": [" fox", " dog"], "gold": 0},
        {"query": "The quick brown", "choices": [" library", " fox"], "gold": 1},
    ]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    ours = run("eval", folder / "engine", "--executor", "reference", "--tasks", tasks, "--json")
    assert ours.code == 0, ours.err
    assert ours.json["results"] == run("eval", folder / "cpu", "--tasks", tasks, "--json").json["results"]


def test_bench(run, folder):  # noqa: F811
    shape = ("--batch", "3", "--prompt-tokens", "9", "--new-tokens", "4", "--repetitions", "2", "--no-bandwidth")
    ours = run("bench", folder / "engine", "--executor", "reference", *shape, "--json")
    assert ours.code == 0, ours.err
    (result,) = ours.json["results"]
    assert result["decode_tokens_per_s"] > 0
    assert (result["batch"], result["gpu"]) == (3, None)
    too_many = ("--batch", "5", "--prompt-tokens", "9", "--new-tokens", "4", "--no-bandwidth")
    run("bench", folder / "engine", "--executor", "reference", *too_many).failed("BATCH_TOO_LARGE", 5, "5", "4")


# ---- where the weights of the reference come from --------------------------------------------------------------------


def test_the_reference_needs_the_checkpoint_the_engine_was_built_from(run, folder, tmp_path, text_checkpoint):  # noqa: F811
    alone = copy_of(open_artifact(folder / "engine"), tmp_path / "alone")
    prompt = ("--executor", "reference", "--prompt", "The", "--max-new-tokens", "3")
    identity = open_artifact(folder / "checkpoint").id
    run("run", alone, *prompt).failed("CHECKPOINT_NEEDED", 2, identity[:12], "--checkpoint")
    run("run", alone, *prompt, "--checkpoint", text_checkpoint.path).failed(
        "CHECKPOINT_OTHER", 2, identity[:12], text_checkpoint.id[:12]
    )
    found = run("run", alone, *prompt, "--checkpoint", folder / "checkpoint")
    assert found.code == 0
    assert found.out == run("run", folder / "engine", *prompt).out


@pytest.mark.parametrize(
    ("engine", "options", "needle"),
    [
        ("cpu", ("--executor", "reference"), "--executor"),
        ("cpu", ("--no-graphs",), "--no-graphs"),
        ("engine", ("--checkpoint", "somewhere"), "--checkpoint"),
        ("engine", ("--executor", "reference", "--no-graphs"), "--no-graphs"),
    ],
)
def test_an_option_without_effect_is_an_error(run, folder, engine, options, needle):  # noqa: F811
    run("run", folder / engine, "--prompt", "x", *options).failed("OPTION_UNUSED", 2, needle)


def test_an_unknown_executor(run, folder):  # noqa: F811
    run("run", folder / "engine", "--prompt", "x", "--executor", "gpu").failed("EXECUTOR_UNKNOWN", 2, "'gpu'")
    run("eval", folder / "checkpoint", "--text", "x", "--executor", "reference").failed("OPTION_UNUSED", 2)


# ---- machines and plans that do not go together ----------------------------------------------------------------------

on_gpu = ("--prompt", "x", "--max-new-tokens", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu(run, folder):  # noqa: F811
    run("run", folder / "engine", *on_gpu).failed("GPU_MISSING", 4, "--executor reference", "--backend cpu")
    run("bench", folder / "engine").failed("GPU_MISSING", 4)


def test_waking_the_driver_ends_and_tells_whether_there_is_a_gpu():
    driver.wake().join(timeout=60)
    assert driver._open() == torch.cuda.is_available()


def altered(folder: Path, to: Path, change) -> Path:
    engine = copy_of(open_artifact(folder / "engine"), to)
    content = bytearray((engine / PLAN).read_bytes())
    (engine / PLAN).write_bytes(change(content) or content)
    return engine


def test_a_truncated_plan(run, folder, tmp_path):  # noqa: F811
    engine = altered(folder, tmp_path / "engine", lambda content: content[:-100])
    run("run", engine, *on_gpu).failed("ARTIFACT_DAMAGED", 3, PLAN, "bytes")


def test_a_plan_that_is_none(run, folder, tmp_path):  # noqa: F811
    engine = altered(folder, tmp_path / "engine", lambda content: bytes(len(content)))
    run("run", engine, *on_gpu).failed("PLAN_FOREIGN", 3, "vtrt")


def test_a_plan_whose_header_gives_another_size(run, folder, tmp_path):  # noqa: F811
    def change(content: bytearray) -> None:
        struct.pack_into("<Q", content, 16, len(content) + 1)

    run("run", altered(folder, tmp_path / "engine", change), *on_gpu).failed("PLAN_DAMAGED", 3, "header")


def test_a_plan_of_another_version(run, folder, tmp_path):  # noqa: F811
    def change(content: bytearray) -> None:
        content[24:28] = bytes([1, 7, 1, 116])

    ran = run("run", altered(folder, tmp_path / "engine", change), *on_gpu)
    ran.failed("PLAN_VERSION", 4, "1.7.1.116", module.load().version, "pip install tensorrt-rtx-cu13==1.7.1.116")


def test_a_machine_without_the_package(run, folder, monkeypatch):  # noqa: F811
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    version = module.load().version if module.load.cache_info().currsize else ""
    ran = run("run", folder / "engine", *on_gpu)
    ran.failed("TENSORRT_MISSING", 4, "tensorrt_rtx", f"pip install tensorrt-rtx-cu13=={version}")


def test_an_engine_of_an_earlier_version(run, folder, tmp_path):  # noqa: F811
    engine = copy_of(open_artifact(folder / "engine"), tmp_path / "engine")
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["body"]["tactics"] = {"network_layers": 7, "complete": True, "context": {}, "generation": {}}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    run("run", engine, *on_gpu, "--executor", "reference").failed("TACTICS_UNREADABLE", 3, "--force")


GPU = compatible.Gpu("Some GPU", "7.5", 8 << 30, 6 << 30)


def refused(call, *arguments) -> tuple[str, int, str]:
    with pytest.raises(compatible.UserError) as caught:
        call(*arguments)
    assert caught.value.hint
    return caught.value.code, caught.value.exit_code, str(caught.value)


def test_a_gpu_that_the_plan_was_not_compiled_for(folder):
    engine, path = open_artifact(folder / "engine").engine, folder / "engine"
    code, exit_code, text = refused(compatible.require_target, path, engine, GPU)
    assert (code, exit_code) == ("GPU_OLDER_THAN_TARGETS", 4)
    assert "8.0, 8.6, 8.9, 12.0" in text
    assert "Some GPU (compute capability 7.5)" in text
    assert "--target sm75" in text
    newer = compatible.Gpu("Other GPU", "9.0", 1, 1)
    assert "not for this Other GPU" in (compatible.require_target(path, engine, newer) or "")
    assert compatible.require_target(path, engine, compatible.Gpu("Right GPU", "8.9", 1, 1)) is None


def test_a_gpu_with_too_little_memory(folder):
    engine, path = open_artifact(folder / "engine").engine, folder / "engine"
    compatible.require_memory(path, engine, GPU)
    small = compatible.Gpu("Small GPU", "8.9", 1 << 30, 1 << 10)
    code, exit_code, text = refused(compatible.require_memory, path, engine, small)
    assert (code, exit_code) == ("GPU_MEMORY", 5)
    assert "0 of 1024 MiB are free on this Small GPU" in text


@pytest.mark.parametrize(
    ("reasons", "code", "exit_code", "needle"),
    [
        ({"MALFORMED_ENGINE", "CUDA_ERROR"}, "PLAN_DAMAGED", 3, "trtllm-cli verify"),
        ({"VERSION_MISMATCH"}, "PLAN_VERSION", 4, "another version"),
        ({"UNSUPPORTED_CC"}, "GPU_UNSUPPORTED", 4, "Some GPU (compute capability 7.5)"),
        ({"OLD_CUDA_DRIVER"}, "CUDA_TOO_OLD", 4, "driver"),
        ({"INSUFFICIENT_GPU_MEMORY"}, "GPU_MEMORY", 5, "6144 MiB of 8192 MiB"),
        ({"CUDA_ERROR"}, "PLAN_REFUSED", 4, "CUDA_ERROR"),
        (set(), "PLAN_REFUSED", 4, "no reason given"),
    ],
)
def test_each_reason_of_the_runtime_in_words(reasons, code, exit_code, needle):
    problem = compatible.refusal(Path("engine"), module.load(), GPU, reasons)
    assert (problem.code, problem.exit_code) == (code, exit_code)
    assert needle in str(problem)
    assert problem.hint


def test_the_reasons_are_the_runtime_s_own():
    """The bits of the real package, asked about a plan on a machine whose answer does not matter."""
    trt = module.load()
    names = set(trt.api.EngineInvalidityDiagnostics.__members__)
    assert {"MALFORMED_ENGINE", "VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER"} <= names
    runtime = trt.api.Runtime(compatible_logger(trt))
    code, _, _ = refused(compatible.require_valid, Path("engine"), trt, runtime, b"x" * 64, GPU)
    assert code == "PLAN_DAMAGED"


class Answers:
    """A runtime that answers a plan with the given reasons."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons

    def get_engine_validity(self, header: bytes) -> tuple:
        api = module.load().api
        bits = sum(int(api.EngineInvalidityDiagnostics.__members__[name]) for name in self.reasons)
        return (api.EngineValidity.INVALID if self.reasons else api.EngineValidity.VALID), bits


def test_a_gpu_that_is_not_listed_is_tried():
    """The runtime calls a GPU unsupported on which it works, so that only an attempt can tell."""
    trt = module.load()
    assert compatible.require_valid(Path("engine"), trt, Answers(), b"", GPU) is None
    note = compatible.require_valid(Path("engine"), trt, Answers("UNSUPPORTED_CC"), b"", GPU)
    assert note is not None
    assert "7.5 (Some GPU)" in note
    asked = (Path("engine"), trt, Answers("UNSUPPORTED_CC", "OLD_CUDA_DRIVER"), b"", GPU)
    assert refused(compatible.require_valid, *asked)[0] == "GPU_UNSUPPORTED"


def compatible_logger(trt):
    from trtllm_cli.build.tensorrt.errors import logger

    return logger(trt)


def test_the_checkpoint_is_found_among_other_things(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "manifest.json").write_text("not a manifest")
    engine = open_artifact(folder / "engine")
    assert load.find_checkpoint(engine, None).path.resolve() == (folder / "checkpoint").resolve()
