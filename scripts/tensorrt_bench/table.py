"""A receipt for people: what was promised and reached, speeds beside the peer, and where the time goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from scripts.tensorrt_bench.speed import beside_peer, extrapolate
from scripts.tensorrt_bench.texts import EQUAL, NEW

#: engines of the shapes: 8b-FORMAT-LAYERS, of a model of so many layers
_SHAPES = re.compile(r"^8b-(?P<form>.+)-(?P<layers>\d+)$")
ALL_LAYERS = 32


def line(row: dict[str, Any]) -> str:
    """One row as it is measured."""
    begin = f"{row['family']} {row['case']}: "
    if "problem" in row:
        return f"{begin}FAILED, {row['problem']}"
    if row["family"] == "quality":
        greedy = row["greedy"]
        told = (
            f"perplexity {row['perplexity']:.3f}, reference {row['reference_perplexity']:.3f} ({row['change']:+.2%}), "
            f"{greedy[f'equal_for_{EQUAL}_of_{NEW}']} of {greedy['prompts']} texts equal, "
            f"{greedy['part_at_a_tie']} part at a tie, {greedy['part_elsewhere']} elsewhere"
        )
        if "crowd" in row:
            told += f"; in a crowd {row['crowd']['equal']} of {row['crowd']['requests']} as alone"
        return begin + told
    if row["family"] == "speed":
        return begin + ", ".join(f"B={one['batch']} {one['decode_tokens_per_s']:.0f} tokens/s" for one in row["rows"])
    if row["family"] == "layers":
        return begin + ", ".join(f"{name} {part['share']:.0%}" for name, part in list(row["parts"].items())[:4])
    later = max(row["later"], key=lambda one: float(one["wall_s"]))
    return (
        f"{begin}first {row['first']['wall_s']:.1f} s, later {later['wall_s']:.1f} s (bound {row['bound_s']:.0f} s "
        f"{'kept' if row['met'] else 'MISSED'}), of which engine to first token {later['engine_s']:.1f} s; importing "
        f"torch and opening the GPU alone {row['bare_s']:.1f} s"
    )


def tables(receipt: dict[str, Any]) -> str:
    """All tables of a receipt, those without rows left out."""
    rows = receipt["rows"]
    of = {
        family: [row for row in rows if row["family"] == family] for family in ("quality", "speed", "layers", "start")
    }
    parts = [_quality(of["quality"]), _speed(receipt, of["speed"]), _layers(of["layers"])]
    parts += [line(row) for row in of["start"]]
    failed = [line(row) for row in rows if "problem" in row and row["family"] != "start"]
    return "\n\n".join(filter(None, [*parts, "\n".join(failed)]))


def _quality(rows: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in rows if "problem" not in row]
    if not rows:
        return ""
    lines = [
        f"| format | perplexity | reference | change | bound | texts equal for {EQUAL} of {NEW} | part at a tie |"
        " elsewhere | equal positions | alone = in a crowd |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        greedy, crowd = row["greedy"], row.get("crowd")
        told = f"{crowd['equal']} of {crowd['requests']}, {crowd['part_at_a_tie']} at a tie" if crowd else ""
        lines.append(
            f"| {row['case']} | {row['perplexity']:.3f} | {row['reference_perplexity']:.3f} | {row['change']:+.2%} | "
            f"{row['tolerance']:.1%} {'kept' if row['within_tolerance'] else 'MISSED'} | "
            f"{greedy[f'equal_for_{EQUAL}_of_{NEW}']} of {greedy['prompts']} | {greedy['part_at_a_tie']} | "
            f"{greedy['part_elsewhere']} | {greedy['agreeing_positions']:.1%} | {told} |"
        )
    return "\n".join(lines)


def _speed(receipt: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in rows if "problem" not in row]
    if not rows:
        return ""
    lines = [
        "| engine | batch | tokens/s (range) | step ms | first token ms | of read bandwidth | peer tokens/s |"
        " peer's share | share, ours over theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    short: dict[str, list[dict[str, Any]]] = {}
    whole: list[str] = []
    for row in rows:
        lines += [_measured(row["case"], one) for one in row["rows"]]
        match = _SHAPES.match(row["case"])
        if match and int(match["layers"]) == ALL_LAYERS:
            whole += [_beside(match["form"], one, "measured") for one in row["rows"]]
        elif match:
            short.setdefault(match["form"], []).append(row)
    lines += whole
    for form, found in short.items():
        read = receipt["runs"][found[-1]["run"]]["read_gb_per_s"]
        for one in extrapolate([point for row in found for point in row["rows"]], ALL_LAYERS, read):
            few, more = one["extrapolated"]
            lines.append(_beside(form, one, f"extrapolated from {few} and {more}"))
    return "\n".join(lines)


def _measured(case: str, one: dict[str, Any]) -> str:
    slowest, fastest = one["decode_range"]
    return (
        f"| {case} | {one['batch']} | {one['decode_tokens_per_s']:.0f} ({slowest:.0f}..{fastest:.0f}) | "
        f"{one['step_ms']:.3f} | {one['first_token_ms']:.1f} | {one['share_of_read_bandwidth']:.0%} | | | |"
    )


def _beside(form: str, one: dict[str, Any], how: str) -> str:
    """All layers of a model of the 8B shapes, beside the peer."""
    peer = beside_peer(form, one)
    theirs = (
        f"{peer['tokens_per_s']:.0f} | {peer['share_of_read_bandwidth']:.0%} | {peer['share_ours_over_theirs']:.2f}"
        if peer
        else " | | "
    )
    return (
        f"| 8B {form}, {one['layers']} layers, {how} | {one['batch']} | "
        f"{one['decode_tokens_per_s']:.0f} | {one['step_ms']:.3f} | {one['first_token_ms']:.1f} | "
        f"{one['share_of_read_bandwidth']:.0%} | {theirs} |"
    )


def _layers(rows: Sequence[dict[str, Any]]) -> str:
    found = []
    for row in rows:
        if "problem" not in row:
            found.append(
                f"{row['case']} (profile {row['profile']}, {row['kernels']} kernels, {row['sum_ms']:.2f} ms bracketed):"
            )
            found += [
                f"  {part['share']:6.1%}  {part['ms']:8.3f} ms  {part['kernels']:4d} kernels  {name}"
                for name, part in row["parts"].items()
            ]
    return "\n".join(found)
