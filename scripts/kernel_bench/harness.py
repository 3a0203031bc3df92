"""Times kernels on a GPU: graph replays over inputs cycled past the L2 cache, medians with spread, correctness first.

A case's ``variants`` are alternatives on the same inputs: ``ours`` and the best libraries. Each is captured in one CUDA
graph that runs it on every input set in turn, so launch gaps of the host are not in the figure but what one kernel
costs after another is. Variants alternate within a run, and ratios are taken within it.

What would flatter a figure, and is kept out:
- inputs that stay in the L2 cache: input sets add up to three times its size (the row says how many they are);
- outputs that stay there: each set keeps its own, else the allocator hands every call the same buffer;
- the host submitting while the clock runs: the stream sleeps until the graph stands in its queue;
- an order that favours one variant: it is reversed every other time;
- clocks that fell since the ceilings were measured: `drift` measures two of them again at the end.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: bytes the input sets of one case must add up to: three times the L2 cache of an H100
CYCLED_BYTES = 3 * 50 * 2**20
#: launches in one graph; more makes its submission longer than the sleep that hides it
_MOST_CALLS = 4096
_SLEEP_CYCLES = 1_500_000  # about a millisecond


@dataclass(frozen=True)
class Ceilings:
    """Measured on this GPU in this run: bytes/s read and copied, FLOP/s of library products at 8192 cubed."""

    read: float
    copy: float
    bf16: float
    int8: float
    fp8: float


@dataclass(frozen=True)
class Case:
    """One line of the table.

    ``make(i)`` gives the i-th input set, ``variants`` maps a name to a call on it (``ours`` first). ``bytes`` and
    ``flops`` are the least one call must move and do. ``check`` gives the error of ``ours`` against a reference in
    float64 for one set, and must stay below ``tolerance``. ``bound`` names the goal: ("read", 0.8) for a share of a
    ceiling, ("us", 3.0) for a time, ("over:torch", 1.25) for a speed-up over that variant. ``ceiling`` names the one
    the table compares with where no goal does (default: what takes longer, reading ``bytes`` or ``flops`` in bf16).
    """

    name: str
    make: Callable[[int], Any]
    variants: dict[str, Callable[[Any], Any]]
    set_bytes: int
    bytes: int = 0
    flops: int = 0
    check: Callable[[Any], float] | None = None
    tolerance: float = 1e-2
    bounds: Sequence[tuple[str, float]] = field(default=())
    ceiling: str = ""


def cycled(case: Case, free_bytes: float = math.inf, cache_bytes: float = CYCLED_BYTES / 3) -> int:
    """How many input sets keep the cache from helping: at least 2, at most 64 (256 where bandwidth is the goal), and no
    more than half the free memory holds (the other half is for outputs and the libraries' workspaces)."""
    most = 256 if any(kind in ("read", "copy") for kind, _ in case.bounds) else 64
    wanted = max(2, min(most, math.ceil(3 * cache_bytes / max(1, case.set_bytes))))
    return max(1, min(wanted, int(min(free_bytes / 2 / max(1, case.set_bytes), wanted))))


def measure(case: Case, ceilings: Ceilings, repeats: int = 9, budget_s: float = 0.15) -> dict[str, Any]:
    """The row of ``case``: error, and per variant median, least and greatest microseconds a call."""
    sets = [case.make(i) for i in range(cycled(case, *_memory()))]
    row: dict[str, Any] = {"case": case.name, "error": None, "sets": len(sets), "variants": {}}
    try:
        row["error"] = None if case.check is None else case.check(sets[0])
    except Exception as problem:
        row["variants"]["ours"] = _problem(problem)
    if row["error"] is not None and not row["error"] <= case.tolerance:
        row["wrong"] = True
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in case.variants.items():
        if name in row["variants"]:
            continue
        try:
            graphs[name] = _capture(call, sets, budget_s / repeats)
        except Exception as problem:  # a library that cannot do it is a row without a figure, and the reason
            row["variants"][name] = _problem(problem)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats):
        for name in list(graphs)[:: -1 if turn % 2 else 1]:
            graph, calls = graphs[name]
            times[name].append(_replay(graph) * 1e6 / calls)
    for name in case.variants:  # in the case's order
        if name in times:
            row["variants"][name] = figures(case, times[name])
    row["share"] = share(case, row, ceilings)
    row["goals"] = [goal(kind, bound, row, ceilings) for kind, bound in case.bounds]
    graphs.clear()
    sets.clear()
    _tidy()
    return row


def figures(case: Case, taken: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of microseconds a call, and the rates of the median."""
    median = statistics.median(taken)
    return {
        "us": median,
        "least": min(taken),
        "greatest": max(taken),
        **({"bytes_per_s": case.bytes / median * 1e6} if case.bytes else {}),
        **({"flops_per_s": case.flops / median * 1e6} if case.flops else {}),
    }


def share(case: Case, row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any] | None:
    """``ours`` as a share of the ceiling that counts for this case; None without a figure."""
    ours = row["variants"].get("ours", {})
    of = case.ceiling or next((kind for kind, _ in case.bounds if hasattr(ceilings, kind)), "")
    if not of and (case.bytes or case.flops):
        of = "read" if case.bytes / ceilings.read >= case.flops / ceilings.bf16 else "bf16"
    rate = ours.get("bytes_per_s" if of in ("read", "copy") else "flops_per_s")
    return None if not of or rate is None else {"of": of, "value": rate / getattr(ceilings, of)}


def goal(kind: str, bound: float, row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """What was reached of one bound; a wrong result meets none."""
    ours = row["variants"].get("ours", {})
    if "us" not in ours:
        return {"goal": kind, "bound": bound, "reached": None, "met": False}
    reached: float | None
    if kind == "us":
        reached, met = ours["us"], ours["us"] <= bound
    elif kind.startswith("over:"):
        peer = row["variants"].get(kind[5:], {}).get("us")
        reached = None if peer is None else peer / ours["us"]
        met = reached is not None and reached >= bound
    else:
        rate = ours["bytes_per_s" if kind in ("read", "copy") else "flops_per_s"]
        reached = rate / getattr(ceilings, kind)
        met = reached >= bound
    return {"goal": kind, "bound": bound, "reached": reached, "met": met and not row.get("wrong", False)}


def _tidy() -> None:
    """Gives the case's memory back to torch, and to the GPU where that runs short: allocating it anew takes longer than
    most measurements."""
    gc.collect()
    free, total = torch.cuda.mem_get_info()
    if free < 0.6 * total:
        torch.cuda.empty_cache()


def _problem(problem: Exception) -> dict[str, str]:
    torch.cuda.synchronize()  # raises where the GPU's context is lost: no later figure would mean anything
    return {"problem": f"{type(problem).__name__}: {problem}"[:200]}


def _memory() -> tuple[float, float]:
    """Free bytes of the GPU, and its L2 cache's (of an H100 where torch does not tell)."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or CYCLED_BYTES / 3
    return float(torch.cuda.mem_get_info()[0]), float(cache)


def _capture(call: Callable[[Any], Any], sets: list[Any], budget_s: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of whole rounds over ``sets`` that takes about ``budget_s``, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in sets[:2]:
            call(one)
        stream.synchronize()
        probe = _rounds(call, sets, 1, stream)
        _replay(probe)
        rounds = int(budget_s / max(1e-6, _replay(probe)))
        rounds = max(1, min(rounds, _MOST_CALLS // len(sets)))
        if rounds == 1:
            return probe, len(sets)
        del probe  # its pool of outputs, before there is a second
        graph = _rounds(call, sets, rounds, stream)
    _replay(graph)
    return graph, rounds * len(sets)


def _rounds(call: Callable[[Any], Any], sets: list[Any], rounds: int, stream: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    held: list[Any] = [None] * len(sets)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for i, one in enumerate(sets):
                held[i] = call(one)  # the output of this set's last round is given back only now
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay, by events."""
    return _timed(graph.replay)


def _timed(call: Callable[[], Any]) -> float:
    """Seconds the GPU takes for ``call``: the sleep gives the host time to queue it behind the first event."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in float64; infinite where anything is not finite."""
    a, b = found.double(), wanted.double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def ceilings(repeats: int = 15) -> Ceilings:
    """Measure them: a large sum, a large copy, and the libraries' products."""
    torch.manual_seed(0)
    large = torch.randn(2**29, device="cuda", dtype=torch.float32)
    other = torch.empty_like(large)
    n = 8192
    a = torch.randn(n, n, device="cuda").bfloat16()
    b = torch.randn(n, n, device="cuda").bfloat16()
    a8, b8 = (torch.randint(-127, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    af, bf = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones(n, 1, device="cuda")
    flops = 2 * n**3

    def time(call: Callable[[], Any]) -> float:
        return _median(call, repeats)

    return Ceilings(
        read=large.nbytes / time(large.sum),
        copy=2 * large.nbytes / time(lambda: other.copy_(large)),
        bf16=flops / time(lambda: a @ b.T),
        int8=flops / time(lambda: torch._int_mm(a8, b8.T)),
        fp8=flops / time(lambda: torch._scaled_mm(af, bf.T, one, one.T, out_dtype=torch.bfloat16)),
    )


def drift(before: Ceilings) -> dict[str, float]:
    """Reading and the bf16 product now, as a share of what they were: how far clocks fell during the run."""
    large = torch.randn(2**29, device="cuda", dtype=torch.float32)
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    return {
        "read": large.nbytes / _median(large.sum, 5) / before.read,
        "bf16": 2 * 8192**3 / _median(lambda: a @ b.T, 5) / before.bf16,
    }


def _median(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(_timed(call) for _ in range(repeats))
