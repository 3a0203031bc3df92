"""The TensorRT benchmark: what it concludes from numbers, and the whole of it on a tiny model without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.tensorrt_bench import layers, speed, table, texts, turns
from scripts.tensorrt_bench.cases import PEERS
from scripts.tensorrt_bench.texts import Parting, Text
from tests.support_artifacts import CORPUS, convert_to, save_folder, source_of, text_model
from tests.support_tensorrt import small_spec
from trtllm_cli.build.tensorrt.log import Kernel, PlanFacts, ProfileFacts

ROOT = Path(__file__).parents[1]


def text(tokens: tuple[int, ...] = (1, 2, 3), lead: float = 2.0) -> Text:
    """At each position the chosen token leads token 7 by ``lead``."""
    return Text(prompt=(5,), tokens=tokens, best=tuple(((token, 9.0), (7, 9.0 - lead)) for token in tokens))


def logits(*choices: int) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[list(choices)]


@pytest.mark.parametrize(
    "tokens, choices, expected",
    [
        ((1, 2, 3), (1, 2, 3), Parting(same=3, agree=3)),
        ((1, 7, 3), (1, 7, 3), Parting(same=1, gap=2.0, agree=2, worst=2.0)),
        ((1, 8, 3), (1, 8, 3), Parting(same=1, gap=None, agree=2, unlisted=1)),
        ((1, 7, 9), (7, 7, 3), Parting(same=1, gap=2.0, agree=1, worst=2.0)),
    ],
)
def test_a_parting_has_the_gap_of_the_reference(tokens, choices, expected):
    assert texts.compare(text(), tokens, logits(*choices)) == expected


def test_only_ties_excuse_an_early_parting():
    long, tied = Parting(same=62, gap=3.0, agree=63), Parting(same=4, gap=0.1, agree=60, worst=0.1)
    found = texts.verdict([long, tied])
    assert (found["equal_for_60_of_64"], found["part_at_a_tie"], found["part_elsewhere"]) == (1, 1, 0)
    assert found["met"]
    for wrong in (Parting(same=4, gap=0.6, agree=60), Parting(same=4, gap=None, agree=60)):
        assert not texts.verdict([long, wrong])["met"]


def row(layers: int, step_ms: float, batch: int = 8) -> dict[str, Any]:
    return {
        "batch": batch, "layers": layers, "step_ms": step_ms, "first_token_ms": 4 + layers,
        "weight_bytes": 1e9 * layers,
        "decode_tokens_per_s": batch / step_ms * 1e3, "decode_range": [1.0, 2.0], "share_of_read_bandwidth": 0.5,
    }  # fmt: skip


def test_a_line_through_two_depths_is_followed_to_the_whole_model():
    # 0.5 ms outside of the layers, 0.25 ms each
    found = speed.extrapolate([row(2, 1.0), row(6, 2.0), row(2, 1.0, batch=1)], 32, read_gb_per_s=4000)
    assert [one["batch"] for one in found] == [8], "a batch of one depth only gives nothing"
    (one,) = found
    assert one["step_ms"] == pytest.approx(0.5 + 0.25 * 32)
    assert one["decode_tokens_per_s"] == pytest.approx(8 / 8.5e-3)
    assert one["first_token_ms"] == pytest.approx(36)
    assert one["share_of_read_bandwidth"] == pytest.approx(32e9 / 8.5e-3 / 4e12)
    assert one["extrapolated"] == [2, 6]
    beside = speed.beside_peer("bf16", one)
    assert beside is not None
    assert beside["ours_over_theirs"] == pytest.approx(8 / 8.5e-3 / 1207)
    assert speed.beside_peer("fp16", one) is None


def test_the_peer_reads_three_quarters_of_the_bandwidth_in_bf16():
    assert PEERS["bf16"].share(1) == pytest.approx(0.75, abs=0.01)
    assert PEERS["int8"].share(1) == pytest.approx(0.5, abs=0.01)


def test_profiled_kernels_are_put_together_by_what_they_do():
    spec = small_spec()

    def kernel(name: str, type: str, *sources: str) -> Kernel:
        return Kernel(name=name, type=type, inputs=(), constants=(), outputs=(), sources=sources)

    kernels = (
        kernel("_gemm_1_myl1_3", "gemm", "layers.0.attn.q+layers.0.attn.k", "layers.0.attn.v#2"),
        kernel("_gemm_2_myl1_7", "gemm", "lm_head"),
        kernel("_gemv_mha_v1_myl1_5", "gemm"),
        kernel("norm_myl1_2", "kgen", "layers.0.attn_norm", "layers.0.attn.o/residual"),
        kernel("write_myl1_4", "kgen", "layers.0.k_cache/update"),
    )
    facts = PlanFacts(
        profiles=(ProfileFacts(kernels=(), scratch_bytes=0), ProfileFacts(kernels=kernels, scratch_bytes=0)),
        io=(),
        weight_bytes=1,
    )
    times = {f"{kernel.name} [profile 1]": float(2**index) for index, kernel in enumerate(kernels)}
    found = layers.summary({**times, "something else": 32.0}, facts, 1, spec)
    assert {name: part["ms"] for name, part in found["parts"].items()} == {
        "product k+q+v": 1.0, "head": 2.0, "attention": 4.0, "norms, rotary, activation and the like": 8.0,
        "cache update": 16.0, "kernels unknown to the build log": 32.0,
    }  # fmt: skip
    assert found["sum_ms"] == 63.0
    assert found["slowest"][0] == {"name": "something else", "ms": 32.0}


def test_a_reference_that_reads_otherwise_than_it_wrote_is_counted():
    best = (((5, 2.0), (6, 1.5)), ((7, 3.0), (8, 1.0)), ((9, 4.0), (1, 0.5)))
    agreeing, parting = (Text(prompt=(1,), tokens=tokens, best=best) for tokens in ((5, 7, 9), (6, 7, 2)))
    assert texts.itself([agreeing]) == {"positions": 3, "others": 0, "largest_gap": 0.0}
    # 6 is half a logit behind; 2 is not among the best, and at least as far behind as the last of them
    assert texts.itself([agreeing, parting]) == {"positions": 6, "others": 2, "largest_gap": 3.5}


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    from scripts import bench_tensorrt

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench_tensorrt.py", *words])
        return bench_tensorrt.main()

    return run


def test_the_script_runs_whole_on_the_reference_executor(script, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    folder = save_folder(text_model(max_position_embeddings=1024), tmp_path / "published", tokenizer=True)
    source = convert_to(source_of(folder, tmp_path / "source").path, tmp_path / "bf16" / "checkpoint", dtype="bfloat16")
    corpus = tmp_path / "text.txt"
    corpus.write_text(CORPUS * 24)
    work = tmp_path / "work"
    sizes = ("--windows", "2", "--prompts", "3", "--format", "bf16", "--format", "int8", "--jobs", "2")
    assert script("prepare", "--work", str(work), "--source", str(source.path), "--text", str(corpus), *sizes) == 0
    out = tmp_path / "receipt.json"
    measured = (
        "measure",
        "--work",
        str(work),
        "--text",
        str(corpus),
        "--out",
        str(out),
        "--commit",
        "none",
        "--crowd",
        "10",
    )
    code = script(*measured, "--only", "quality", "--executor", "reference")
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"bf16", "int8"}
    for row in rows.values():
        assert "problem" not in row, row
        assert abs(row["change"]) < 0.02
        assert row["greedy"]["prompts"] == 3
        assert row["reference_of_the_same_weights"]
        assert row["greedy"]["agreeing_positions"] > 0.5
    assert rows["bf16"]["crowd"]["requests"] == 10
    assert "crowd" not in rows["int8"]
    assert code == (0 if all(row["met"] for row in rows.values()) else 1)
    assert "| bf16 |" in capsys.readouterr().out
    # the process of an engine that is timed in turns, with sizes for a processor
    small = "from pathlib import Path; from scripts.tensorrt_bench import speed, turns; turns.BATCHES = (1, 2)"
    small += "; turns.PROMPT, turns.NEW = speed.PROMPT, speed.NEW = 8, 4"
    place = work / "int8"
    serve = f"{small}; turns.serve(Path({str(place / 'engine')!r}), 'reference', Path({str(place / 'checkpoint')!r}))"
    turn = turns.Turn([sys.executable, "-c", serve])
    try:
        assert turn.ready(200.0) > 0
        first, second = turn.order({"speed": {"repetitions": 1, "read_gb_per_s": 100.0}})["rows"]
        assert (first["batch"], second["batch"]) == (1, 2)
        assert first["profiles"] == ["context", "generation-8", "generation-64"]
        with pytest.raises(RuntimeError, match="unknown|GPU|NVIDIA|CUDA"):
            turn.order({"layers": 1})  # which only TensorRT itself can
    finally:
        turn.end()


def test_an_engine_that_is_not_there_is_a_row_with_the_problem(script, tmp_path):
    (tmp_path / "bf16" / "engine").mkdir(parents=True)
    out = tmp_path / "receipt.json"
    words = ("measure", "--work", str(tmp_path), "--out", str(out), "--commit", "none", "--executor", "reference")
    assert script(*words, "--only", "speed", "--together", "100") == 1
    (found,) = json.loads(out.read_text())["rows"]
    assert found["family"] == "speed"
    assert "manifest" in found["problem"]


def test_a_process_that_keeps_still_or_ends_is_said_to():
    turn = turns.Turn([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(RuntimeError, match="no answer within"):
        turn.ready(0.2)
    turn.end()
    turn = turns.Turn([sys.executable, "-c", "print('{\"ready\": 1.5}'); raise SystemExit(3)"])
    assert turn.ready(30.0) == 1.5
    with pytest.raises(RuntimeError, match="ended with 3|is gone"):
        turn.order({"layers": 1})


def test_receipts_made_side_by_side_are_merged_and_shown(script, tmp_path, capsys):
    def written(name: str, case: str, rows: list[dict[str, Any]]) -> str:
        measured = {"family": "speed", "case": case, "run": name, "rows": rows}
        content = {"receipt": 1, "runs": {name: {"read_gb_per_s": 4000}}, "rows": [measured]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path / f"{name}.json")

    out = tmp_path / "all.json"
    others = [
        written("1", "int8", [row(30, 1.0)]),
        written("2", "int4", [row(30, 4.0)]),
        written("3", "int8", [row(30, 2.0)]),
    ]
    assert script("merge", str(out), *others) == 0
    assert script("summary", str(out)) == 0
    rows = {one["case"]: one for one in json.loads(out.read_text())["rows"]}
    assert (rows["int8"]["run"], rows["int4"]["run"]) == ("3", "2")
    shown = capsys.readouterr().out
    assert shown.count("| int8 | 8 | 4000 (1..2) | 2.000 |") == 2, shown


def test_what_measure_runs_in_a_process_of_its_own_is_a_command(tmp_path):
    """Without an engine there it fails by itself, not for an unknown command."""
    words = [sys.executable, str(ROOT / "scripts" / "bench_tensorrt.py"), "profile", str(tmp_path), "--batch", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}" in done.stderr


def test_a_table_says_what_failed_and_what_was_missed():
    failed = {"family": "speed", "case": "int4", "problem": "RuntimeError: no", "run": "r"}
    measured = [
        {"family": "speed", "case": f"8b-int8-{depth}", "run": "r", "rows": [row(depth, 1 + 0.1 * depth)]}
        for depth in (2, 6)
    ]
    start = {
        "family": "start", "case": "bf16", "run": "r", "first": {"wall_s": 20.0, "engine_s": 16.0}, "bound_s": 5.0,
        "later": [{"wall_s": 4.0, "engine_s": 1.0}, {"wall_s": 6.0, "engine_s": 1.5}], "bare_s": 3.5, "met": False,
    }  # fmt: skip
    shown = table.tables({"rows": [failed, *measured, start], "runs": {"r": {"read_gb_per_s": 4000}}})
    assert "speed int4: FAILED, RuntimeError: no" in shown
    assert "8B int8, 32 layers, extrapolated from 2 and 6" in shown
    assert "later 6.0 s (bound 5 s MISSED), of which engine to first token 1.5 s" in shown
