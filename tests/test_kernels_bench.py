"""The pure parts of the benchmark: how many input sets, goals, the table, and receipts that gather runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_kernels
from scripts.kernel_bench import harness, receipt, table
from scripts.kernel_bench.harness import Case, Ceilings

CEILINGS = Ceilings(read=3e12, copy=2.4e12, bf16=700e12, int8=900e12, fp8=1300e12)


def case(name: str = "one", **more: Any) -> Case:
    return Case(name, lambda i: i, {"ours": print, "peer": print}, **{"set_bytes": 2**20, **more})


def row_of(one: Case, ours: float | None = 2.0, peer: float | None = 3.0, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"family": "mmha", "case": one.name, "error": 1e-3, "sets": 2, "variants": {}, **more}
    for name, us in (("ours", ours), ("peer", peer)):
        row["variants"][name] = {"problem": "cannot"} if us is None else harness.figures(one, [us, us * 0.9, us * 1.1])
    row["share"] = harness.share(one, row, CEILINGS)
    row["goals"] = [harness.goal(kind, bound, row, CEILINGS) for kind, bound in one.bounds]
    return row


@pytest.mark.parametrize(
    "set_bytes, bounds, free, sets",
    [
        (10 * 2**20, [], 1e12, 15),
        (2**40, [], 1e15, 2),
        (2**40, [], 1e12, 1),  # one fits, and is larger than any cache
        (2**10, [], 1e12, 64),
        (2**20, [("read", 0.8)], 1e12, 150),
        (2**10, [("read", 0.8)], 1e12, 256),
        (10 * 2**20, [], 60 * 2**20, 3),
    ],
)
def test_sets_fill_three_caches_and_half_the_memory_at_most(set_bytes, bounds, free, sets):
    assert harness.cycled(case(set_bytes=set_bytes, bounds=bounds), free) == sets


def test_figures_are_of_the_median():
    found = harness.figures(case(bytes=6_000_000, flops=1_000_000), [3.0, 1.0, 2.0])
    assert found == {"us": 2.0, "least": 1.0, "greatest": 3.0, "bytes_per_s": 3e12, "flops_per_s": 5e11}
    assert "bytes_per_s" not in harness.figures(case(), [1.0])


@pytest.mark.parametrize(
    "bound, reached, met",
    [
        (("us", 2.0), 2.0, True),
        (("us", 1.9), 2.0, False),
        (("over:peer", 1.5), 1.5, True),
        (("over:peer", 1.51), 1.5, False),
        (("over:absent", 1.0), None, False),
        (("read", 0.8), 1.0, True),
        (("copy", 1.3), 1.25, False),
        (("bf16", 0.01), 0.01, True),
    ],
)
def test_goals(bound, reached, met):
    row = row_of(case(bytes=6_000_000, flops=14_000_000, bounds=[bound]))
    assert row["goals"] == [
        {"goal": bound[0], "bound": bound[1], "reached": reached and pytest.approx(reached), "met": met}
    ]
    wrong = row_of(case(bytes=6_000_000, flops=14_000_000, bounds=[bound]), wrong=True)
    assert not wrong["goals"][0]["met"], "a wrong result meets nothing"
    assert not row_of(case(bounds=[bound]), ours=None)["goals"][0]["met"]


def test_the_share_is_of_the_ceiling_that_counts():
    assert row_of(case(bytes=6_000_000))["share"] == {"of": "read", "value": pytest.approx(1.0)}
    assert row_of(case(flops=700_000_000))["share"] == {"of": "bf16", "value": pytest.approx(0.5)}
    assert row_of(case(flops=700_000_000, ceiling="fp8"))["share"]["of"] == "fp8"
    assert row_of(case(bytes=1, flops=1, bounds=[("us", 2), ("copy", 0.8)]))["share"]["of"] == "copy"
    assert row_of(case())["share"] is None
    assert row_of(case(bytes=1), ours=None)["share"] is None


def test_a_line_says_time_share_peer_and_goals():
    text = table.line(row_of(case("decode", bytes=6_000_000, bounds=[("read", 0.8), ("us", 1.0)])))
    for part in ("decode", "2.00", "20.0%", "3.00 TB/s", "100.0% read", "peer", "1.50x", "1e-03"):
        assert part in text
    assert "[read 1.00 >= 0.8 ok]" in text and "[us 2.00 <= 1 MISSED]" in text
    failed = table.line(row_of(case("decode"), ours=None, peer=None))
    assert "FAILED: cannot" in failed and "peer: cannot" in failed
    assert "WRONG" in table.line(row_of(case(), wrong=True))


def test_the_summary_has_every_bound_and_what_misses():
    rows = [
        row_of(case("good", bytes=6_000_000, bounds=[("read", 0.8)])),
        row_of(case("bad", bytes=3_000_000, bounds=[("read", 0.8)])),
        row_of(case("odd", bounds=[("us", 1.0)])),
    ]
    text = table.summary(rows)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    found = lines["mmha: batch 64, context 2k..8k, bf16 cache: share of read bandwidth >= 0.8"]
    assert "1/2" in found and "0.50" in found and found.endswith("bad   MISSED")
    assert text.count("NO CASE") == len(table.BOUNDS) - 1
    assert "odd: [us 2.00 <= 1 MISSED] (a goal of its own)" in text
    assert "mmha: bad: [read 0.50 >= 0.8 MISSED]" in text
    (shown,) = table.markdown(rows).splitlines()[2:]
    assert shown == (
        "| `mmha` | batch 64, context 2k..8k, bf16 cache: share of read bandwidth >= 0.8 | 1 of 2 | 0.50 | 1.00 |"
    )


def test_large_products_count_for_the_bounds_of_their_family():
    row = row_of(case("one", bytes=6_000_000, bounds=[("read", 0.6)]), family="weight_only_large")
    assert "goal of its own" not in table.summary([row])
    assert "| `weight_only` | M 16..64: share of read bandwidth >= 0.6 | 1 of 1 |" in table.markdown([row])


def test_a_run_replaces_its_own_rows_and_keeps_the_others(tmp_path: Path):
    path = tmp_path / "receipt.json"
    rows = [{"family": "a", "case": "1"}, {"family": "a", "case": "2"}, {"family": "b", "case": "1"}]
    receipt.write(path, receipt.merge(receipt.read(path), "t1", {"commit": "x"}, rows, {"a", "b"}))
    again = receipt.merge(receipt.read(path), "t2", {"commit": "y"}, [{"family": "a", "case": "2", "new": 1}])
    assert [(r["family"], r["case"], r["run"]) for r in again["rows"]] == [
        ("a", "1", "t1"), ("a", "2", "t2"), ("b", "1", "t1")
    ]  # fmt: skip
    assert again["runs"] == {"t1": {"commit": "x"}, "t2": {"commit": "y"}}
    whole = receipt.merge(again, "t3", {"commit": "z"}, [{"family": "a", "case": "3"}], {"a"})
    assert [(r["family"], r["case"], r["run"]) for r in whole["rows"]] == [("a", "3", "t3"), ("b", "1", "t1")]
    assert sorted(whole["runs"]) == ["t1", "t3"], "a run without rows is forgotten"


def test_receipts_join_by_the_later_run():
    empty = {"receipt": 1, "runs": {}, "rows": []}
    first = receipt.merge(empty, "t2", {}, [{"family": "a", "case": "1"}, {"family": "a", "case": "2"}])
    other = receipt.merge(empty, "t1", {}, [{"family": "a", "case": "1"}])
    other = receipt.merge(other, "t3", {}, [{"family": "a", "case": "2"}, {"family": "b", "case": "9"}])
    joined = receipt.join(first, other)
    assert {(r["family"], r["case"]): r["run"] for r in joined["rows"]} == {
        ("a", "1"): "t2", ("a", "2"): "t3", ("b", "9"): "t3"
    }  # fmt: skip
    assert {json.dumps(r) for r in receipt.join(other, first)["rows"]} == {json.dumps(r) for r in joined["rows"]}


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H200", "kernels_h200.json"),
        ("NVIDIA H100 80GB HBM3", "kernels_h100.json"),
        ("NVIDIA A100-SXM4-40GB", "kernels_a100.json"),
        ("NVIDIA GeForce RTX 4090", "kernels_rtx_4090.json"),
        ("NVIDIA L40S", "kernels_l40s.json"),
    ],
)
def test_a_receipt_is_named_after_its_gpu(gpu: str, name: str):
    assert receipt.file_name(gpu) == name


def test_figures_are_written_with_six_digits(tmp_path: Path):
    path = tmp_path / "receipt.json"
    receipt.write(path, {"receipt": 1, "runs": {}, "rows": [{"us": 12.3456789, "sets": 12345678, "least": None}]})
    assert receipt.read(path)["rows"] == [{"us": 12.3457, "sets": 12345678, "least": None}]


def test_an_unfinished_write_leaves_the_receipt(tmp_path: Path):
    path = tmp_path / "receipt.json"
    receipt.write(path, {"receipt": 1, "runs": {}, "rows": []})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        receipt.write(path, {"receipt": 1, "rows": [object()]})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a receipt"):
        receipt.read(path)


def test_summary_and_merge_need_no_gpu(tmp_path: Path, monkeypatch, capsys):
    row = row_of(case("good", bytes=6_000_000, bounds=[("read", 0.8)]))
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    receipt.write(two, receipt.merge(receipt.read(two), "t1", {"commit": "x"}, [row]))
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(one), "--merge", str(two)])
    assert bench_kernels.main() == 0
    assert json.loads(one.read_text())["rows"][0]["run"] == "t1"
    monkeypatch.setattr("sys.argv", ["bench", "--summary", str(one)])
    assert bench_kernels.main() == 0
    assert "1/1" in capsys.readouterr().out
