"""Tokens per second through the code of ``trtllm-cli bench``, beside the measured bandwidth and a peer.

A model of many equal layers takes as long as its layers times one layer, plus what stands outside of them (embedding,
head, choosing a token, the host). So engines of a few layers say what one of all layers would take, and figures got
this way are marked ``extrapolated``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.tensorrt_bench.cases import NEW, PEERS, PROMPT
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.evaluate.bench import bench
from trtllm_cli.evaluate.stage import decode_weight_bytes
from trtllm_cli.runtime.load import Loaded


def speed(
    model: Loaded, batches: Sequence[int], repetitions: int, read_gb_per_s: float, warm_ups: int = 1
) -> list[dict[str, Any]]:
    """A row a batch."""
    size = decode_weight_bytes(model)
    profiles = [profile.name for profile in tensorrt_tactics(model.artifact.engine).profiles]
    rows = []
    for batch in batches:
        found = bench(
            model.executor, model.load_seconds, size, PROMPT, NEW, batch, repetitions,
            warm_ups=warm_ups, bandwidth_gb_per_s=read_gb_per_s,
        )  # fmt: skip
        slowest, fastest = found.decode_range
        rows.append(
            {
                "batch": batch,
                "layers": model.artifact.engine.spec.num_layers,
                "decode_tokens_per_s": found.decode_tokens_per_s,
                "decode_range": [slowest, fastest],
                "step_ms": batch / found.decode_tokens_per_s * 1e3,
                "first_token_ms": found.first_token_s * 1e3,
                "weight_bytes": size,
                "share_of_read_bandwidth": found.weight_read_gb_per_s / read_gb_per_s,
                "repetitions": repetitions,
                "profiles": profiles,
                "load_s": model.load_seconds,
            }
        )
    return rows


def extrapolate(rows: Sequence[dict[str, Any]], layers: int, read_gb_per_s: float) -> list[dict[str, Any]]:
    """Rows of a model of ``layers`` layers, from rows of two shorter ones: a straight line through both, per batch.

    Nothing comes of batches that only one of them has.
    """
    found = []
    for batch in sorted({row["batch"] for row in rows}):
        points = sorted((row for row in rows if row["batch"] == batch), key=lambda row: int(row["layers"]))
        if len(points) < 2 or points[0]["layers"] == points[-1]["layers"]:
            continue
        step_ms, first_ms, size = (
            _line(points[0], points[-1], what, layers) for what in ("step_ms", "first_token_ms", "weight_bytes")
        )
        found.append(
            {
                "batch": batch,
                "layers": layers,
                "extrapolated": [points[0]["layers"], points[-1]["layers"]],
                "decode_tokens_per_s": batch / step_ms * 1e3,
                "step_ms": step_ms,
                "step_ms_a_layer": _slope(points[0], points[-1], "step_ms"),
                "first_token_ms": first_ms,
                "weight_bytes": round(size),
                "share_of_read_bandwidth": size / step_ms * 1e3 / 1e9 / read_gb_per_s,
            }
        )
    return found


def beside_peer(form: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """How a row of the 8B shapes compares with the peer's figure; None where there is none."""
    peer = PEERS.get(form)
    if peer is None or row["batch"] not in peer.tokens_per_s:
        return None
    theirs = peer.tokens_per_s[row["batch"]]
    return {
        "what": peer.what,
        "tokens_per_s": theirs,
        "share_of_read_bandwidth": peer.share(row["batch"]),
        "ours_over_theirs": row["decode_tokens_per_s"] / theirs,
        "share_ours_over_theirs": row["share_of_read_bandwidth"] / peer.share(row["batch"]),
    }


def _slope(short: dict[str, Any], long: dict[str, Any], what: str) -> float:
    return float((long[what] - short[what]) / (long["layers"] - short["layers"]))


def _line(short: dict[str, Any], long: dict[str, Any], what: str, layers: int) -> float:
    return float(long[what] + _slope(short, long, what) * (layers - long["layers"]))
