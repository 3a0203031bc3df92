"""Where a figure was measured (hardware, clocks, versions, commit), and the receipt that gathers runs.

A receipt holds the newest row of every case and, under ``runs``, the circumstances of each run a row comes from, so
that families can be measured in pieces.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
_NEWEST = 1


def environment(commit: str | None = None) -> dict[str, Any]:
    """``commit`` stands in for git's answer where the sources were copied without their history."""
    import torch

    answer = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader").splitlines()[:1] or [""]
    return {
        "gpu": dict(zip(_QUERY.split(","), answer[0].split(", "), strict=False)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": commit or _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
    }


def file_name(gpu: str) -> str:
    """The receipt of a GPU by its marketing name: maker, memory size and form factor are left out of it."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    left_out = re.compile(r"nvidia|geforce|tesla|\d+gb|hbm\d\w*|sxm\d*|pcie|nvl")
    return f"kernels_{'_'.join(word for word in words if word and not left_out.fullmatch(word)) or 'gpu'}.json"


def read(path: Path) -> dict[str, Any]:
    """The receipt at ``path``; an empty one where there is none. Raises ValueError for a file that is no receipt."""
    if not path.is_file():
        return {"receipt": _NEWEST, "runs": {}, "rows": []}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if found.get("receipt") != _NEWEST:
        raise ValueError(f"{path} is not a receipt of kernels of version {_NEWEST}")
    return found


def write(path: Path, receipt: dict[str, Any]) -> None:
    """Complete or not at all: a run that is cut short keeps what was there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(_rounded(receipt), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def merge(
    receipt: dict[str, Any], name: str, run: dict[str, Any], rows: list[dict[str, Any]], whole: Collection[str] = ()
) -> dict[str, Any]:
    """``receipt`` with ``rows`` of the run ``name`` in place of older rows of the same cases.

    Families in ``whole`` were run completely: of them no other row stays. Runs no row comes from are dropped.
    """
    new = {(row["family"], row["case"]) for row in rows}
    kept = [r for r in receipt["rows"] if (r["family"], r["case"]) not in new and r["family"] not in whole]
    rows = [{**row, "run": name} for row in rows]
    families = list(dict.fromkeys(row["family"] for row in [*receipt["rows"], *rows]))
    # a replaced row stands where the old one stood; in a family run completely the new order holds
    before = [row for row in receipt["rows"] if row["family"] not in whole]
    places = list(dict.fromkeys((row["family"], row["case"]) for row in [*before, *rows]))
    merged = sorted(
        [*kept, *rows], key=lambda row: (families.index(row["family"]), places.index((row["family"], row["case"])))
    )
    used = {row["run"] for row in merged}
    runs = {key: value for key, value in {**receipt["runs"], name: run}.items() if key in used}
    return {"receipt": _NEWEST, "runs": runs, "rows": merged}


def join(receipt: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both receipts' rows; of a case in both, the row of the later run."""
    for name in sorted(other["runs"]):
        theirs = [row for row in other["rows"] if row["run"] == name]
        ours = {(row["family"], row["case"]): row["run"] for row in receipt["rows"]}
        newer = [row for row in theirs if ours.get((row["family"], row["case"]), "") <= name]
        receipt = merge(receipt, name, other["runs"][name], newer)
    return receipt


def _rounded(value: Any) -> Any:
    """Six digits of every float, which is more than a measurement has."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as problem:
        return f"unknown ({problem})"
