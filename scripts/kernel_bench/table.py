"""The table a run prints, and the summary: every bound the kernels were built for, reached or not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_CASE = 50


@dataclass(frozen=True)
class Bound:
    """What all cases of ``family`` with a goal of this kind (regular expression) and number must reach."""

    family: str
    goal: str
    number: float
    sentence: str


BOUNDS = (
    Bound("weight_only", "read", 0.80, "M 1..8, 28672x4096 and 4096x14336: share of read bandwidth"),
    Bound("weight_only", "read", 0.65, "M 1..8, 4096x4096 and 6144x4096: share of read bandwidth"),
    Bound("weight_only", "read", 0.60, "M 16..64: share of read bandwidth"),
    Bound("weight_only", "over:.*|bf16", 0.85, "M 512 and more: of cuBLAS bf16's FLOP/s"),
    Bound("w8a8", "over:.*_int_mm.*", 1.25, "INT8 8192 cubed: over torch._int_mm"),
    Bound("w8a8", "over:.*_scaled_mm.*", 1.0, "FP8 8192 cubed: over torch._scaled_mm, row-wise"),
    Bound("w8a8", "read", 0.60, "M 1..64: share of read bandwidth"),
    Bound("fmha", "over:.*", 1.3, "D 128, S 4096 and more: over torch's FA2"),
    Bound("mmha", "read", 0.80, "batch 64, context 2k..8k, bf16 cache: share of read bandwidth"),
    Bound("mmha", "read", 0.70, "batch 64, context 2k..8k, int8 and fp8 cache: share of read bandwidth"),
    Bound("mmha", "read", 0.60, "batch 1, context 8k..32k: share of read bandwidth"),
    Bound("mmha", "us", 6.0, "batch 1, context 512, 32/8 heads of 128: microseconds"),
    Bound("decode_layer", "over:five launches", 1.0, "four layers in one launch: over five launches a layer"),
    Bound("pointwise", "copy|read", 0.85, "large: share of bandwidth"),
    Bound("pointwise", "us", 3.0, "one token: microseconds"),
    Bound("sampling", "copy|read", 0.85, "large: share of bandwidth"),
    Bound("sampling", "us", 3.0, "one token: microseconds"),
)


def header(family: str) -> str:
    """Above a family's rows."""
    columns = f"{'ours us':>9} {'spread':>6}  {'rate':>9} {'share':>12}  {'best peer':22} {'us':>9} {'ratio':>6}  error"
    return f"\n{family:{_CASE}} {columns}"


def line(row: dict[str, Any]) -> str:
    """One case: our time, its spread, rate and share of the ceiling; the fastest peer; the goals."""
    variants = row["variants"]
    ours = variants.get("ours", {})
    parts = [f"{row['case'][:_CASE]:{_CASE}}"]
    if "us" in ours:
        spread = (ours["greatest"] - ours["least"]) / ours["us"]
        part = row.get("share")
        shown = f"{part['value']:6.1%} {part['of']}" if part else ""
        parts.append(f"{ours['us']:9.2f} {spread:6.1%}  {_rate(ours, part):>9} {shown:>12}")
    else:
        parts.append(f"FAILED: {ours.get('problem', 'no variant named ours')}")
    peers = {name: one["us"] for name, one in variants.items() if name != "ours" and "us" in one}
    if peers and "us" in ours:
        best = min(peers, key=peers.__getitem__)
        parts.append(f" {best[:22]:22} {peers[best]:9.2f} {peers[best] / ours['us']:5.2f}x")
    else:
        parts.append(f" {'-':22} {'':9} {'':6}")
    parts.append(
        " " + ("-" if row["error"] is None else f"{row['error']:.0e}") + (" WRONG" if row.get("wrong") else "")
    )
    parts += [" " + _goal(goal) for goal in row["goals"]]
    text = " ".join(parts).rstrip()
    for name, one in variants.items():
        if name != "ours" and "us" not in one:
            text += f"\n{'':{_CASE}}   {name}: {one['problem']}"
    return text


def summary(rows: list[dict[str, Any]]) -> str:
    """Every bound with how many cases meet it and the one furthest from it, then the cases that miss theirs."""
    lines = [f"{'bound':78} {'cases met':>9}  {'worst':>6}  at"]
    missed: list[str] = []
    counted: set[tuple[str, str, int]] = set()
    for bound in BOUNDS:
        found = _meant(bound, rows)
        counted.update((row["family"], row["case"], row["goals"].index(goal)) for row, goal in found)
        lines.append(_bound_line(bound, found))
    for row in rows:
        for i, goal in enumerate(row["goals"]):
            if not goal["met"]:
                missed.append(f"  {row['family']}: {row['case']}: {_goal(goal)}")
            if (row["family"], row["case"], i) not in counted:
                lines.append(f"{row['family']}: {row['case']}: {_goal(goal)} (a goal of its own)")
    wrong = [f"  {row['family']}: {row['case']}: error {row['error']:.1e}" for row in rows if row.get("wrong")]
    failed = [
        f"  {row['family']}: {row['case']}: {row['variants'].get('ours', {}).get('problem')}"
        for row in rows
        if "us" not in row["variants"].get("ours", {})
    ]
    for title, listed in (("missed:", missed), ("WRONG:", wrong), ("FAILED:", failed)):
        lines += ["", title, *listed] if listed else []
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The bounds that cases were measured for, as a table for the documentation."""
    lines = ["| kernel | bound | cases met | worst | best |", "|---|---|---|---|---|"]
    for bound in BOUNDS:
        found = sorted(_meant(bound, rows), key=lambda pair: _margin(pair[1]))
        if not found:
            continue
        met = sum(goal["met"] for _, goal in found)
        ends = ["none" if goal["reached"] is None else f"{goal['reached']:.2f}" for _, goal in (found[0], found[-1])]
        cells = [f"`{bound.family}`", _sentence(bound), f"{met} of {len(found)}", *ends]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _meant(bound: Bound, rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows a bound is for, each with its goal. A family's large products are cases of a module of their own."""
    return [
        (row, goal)
        for row in rows
        for goal in row["goals"]
        if row["family"].removesuffix("_large") == bound.family
        and re.fullmatch(bound.goal, goal["goal"])
        and math.isclose(goal["bound"], bound.number)
    ]


def _sentence(bound: Bound) -> str:
    return f"{bound.sentence} {'<=' if bound.goal == 'us' else '>='} {bound.number:g}"


def _bound_line(bound: Bound, found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    text = f"{bound.family}: {_sentence(bound)}"
    if not found:
        return f"{text:78} {'NO CASE':>9}"
    met = sum(goal["met"] for _, goal in found)
    row, goal = min(found, key=lambda pair: _margin(pair[1]))
    worst = "none" if goal["reached"] is None else f"{goal['reached']:.2f}"
    return f"{text:78} {met:>4}/{len(found):<4} {worst:>7}  {row['case']}{'' if met == len(found) else '   MISSED'}"


def _margin(goal: dict[str, Any]) -> float:
    if goal["reached"] is None:
        return -math.inf
    ratio = goal["reached"] / goal["bound"]
    return -ratio if goal["goal"] == "us" else ratio


def _goal(goal: dict[str, Any]) -> str:
    sign = "<=" if goal["goal"] == "us" else ">="
    reached = "none" if goal["reached"] is None else f"{goal['reached']:.2f}"
    return f"[{goal['goal']} {reached} {sign} {goal['bound']:g} {'ok' if goal['met'] else 'MISSED'}]"


def _rate(ours: dict[str, Any], share: dict[str, Any] | None) -> str:
    moved = share is None or share["of"] in ("read", "copy")
    rate = ours.get("bytes_per_s") if moved else ours.get("flops_per_s")
    if rate is None:
        return ""
    return f"{rate / 1e12:.2f} TB/s" if moved else f"{rate / 1e12:.0f} TF/s"
