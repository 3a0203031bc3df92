"""Time the CUDA kernels on this GPU beside the best library for each, against ceilings measured in the same run.

    python scripts/bench_kernels.py [--only pointwise --only mmha] [--match REGEX] [--out RECEIPT]
    python scripts/bench_kernels.py --summary RECEIPT          # every bound, reached or not; needs no GPU
    python scripts/bench_kernels.py --out A --merge B          # B's newer rows into A; needs no GPU

Prints a table (microseconds, spread, share of the ceiling, the fastest peer, goals), then the summary. ``--out``
updates the receipt after each family: rows of the cases measured are replaced, the others stay, and each says which
run it is of. In a folder the receipt is named after the GPU: ``--out scripts/receipts`` updates kernels_h200.json
there on an H200. Exits 1 when a kernel is wrong or fails; missed goals are no error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import pkgutil
import re
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import kernel_bench
from scripts.kernel_bench import receipt, table

_OURS = ("harness", "receipt", "table")
FAMILIES = sorted(m.name for m in pkgutil.iter_modules(kernel_bench.__path__) if m.name not in _OURS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=FAMILIES, help="a family (may be repeated)")
    parser.add_argument("--match", default="", help="regular expression over case names")
    parser.add_argument(
        "--goals", action="store_true", help="only cases that have a goal, and of them the ones that match"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of GPU time for each variant of a case")
    parser.add_argument("--out", type=Path, metavar="RECEIPT", help="receipt to update, or the folder it lies in")
    parser.add_argument("--commit", help="of the sources, where git cannot be asked")
    parser.add_argument("--summary", type=Path, metavar="RECEIPT", help="only show what a receipt says of every bound")
    parser.add_argument("--markdown", action="store_true", help="with --summary: a table for the documentation")
    parser.add_argument("--merge", type=Path, action="append", metavar="RECEIPT", help="only add its rows to --out")
    options = parser.parse_args()
    if options.summary:
        print((table.markdown if options.markdown else table.summary)(receipt.read(options.summary)["rows"]))
        return 0
    if options.merge:
        return _merge(parser, options)
    return _run(options)


def _merge(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if not options.out:
        parser.error("--merge needs --out")
    joined = receipt.read(options.out)
    for other in options.merge:
        if not other.is_file():
            parser.error(f"{other} does not exist")
        joined = receipt.join(joined, receipt.read(other))
    receipt.write(options.out, joined)
    print(f"{options.out}: {len(joined['rows'])} rows of {len(joined['runs'])} runs")
    return 0


def _run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench_kernels: torch sees no GPU on this machine", file=sys.stderr)
        return 1
    from scripts.kernel_bench import harness

    if options.out and options.out.is_dir():
        options.out /= receipt.file_name(torch.cuda.get_device_name())
    kept = receipt.read(options.out) if options.out else {}
    ceilings = harness.ceilings()
    name = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    run: dict[str, Any] = {
        **receipt.environment(options.commit),
        "command": shlex.join(["python", *sys.argv]),
        "repeats": options.repeats,
        "budget_s": options.budget,
        "ceilings": asdict(ceilings),
    }
    print(f"{run['gpu'].get('name', 'GPU')}, commit {run['commit'][:12]}; ceilings in 1e12/s:", end=" ")
    print(", ".join(f"{k} {v / 1e12:.2f}" for k, v in asdict(ceilings).items()))
    rows: list[dict[str, Any]] = []
    gc.freeze()  # what is imported stays: each case's collection need not look at it
    for family in options.only or FAMILIES:
        found = importlib.import_module(f"scripts.kernel_bench.{family}").cases(ceilings)
        chosen = [case for case in found if re.search(options.match, case.name) and (case.bounds or not options.goals)]
        if not chosen:
            continue
        print(table.header(family))
        for case in chosen:
            row = {
                "family": family,
                **harness.measure(case, ceilings, options.repeats, options.budget),
                "command": _again(family, case.name),
            }
            print(table.line(row), flush=True)
            rows.append(row)
        if options.out:
            mine = [row for row in rows if row["family"] == family]
            kept = receipt.merge(kept, name, run, mine, set() if options.match or options.goals else {family})
            receipt.write(options.out, kept)
    run["drift"] = harness.drift(ceilings)
    print("\nceilings at the end, of what they were: " + ", ".join(f"{k} {v:.1%}" for k, v in run["drift"].items()))
    if options.out:
        kept["runs"].update({name: run} if name in kept["runs"] else {})
        receipt.write(options.out, kept)
    print("\n" + table.summary(rows))
    return 1 if any(row.get("wrong") or "us" not in row["variants"].get("ours", {}) for row in rows) else 0


def _again(family: str, case: str) -> str:
    return shlex.join(["python", "scripts/bench_kernels.py", "--only", family, "--match", f"^{re.escape(case)}$"])


if __name__ == "__main__":
    sys.exit(main())
