"""From a plan to the program the native library runs: fusion, buffer reuse, and indices instead of names.

Three rewrites, all exact. An input that one linear alone reads (a norm, a residual addition with its norm, a gated
activation) becomes that linear's *prologue*: no barrier and no trip through memory stands between them. Rows whose
logits nobody wants are dropped right after the last attention instead of just before the head. Activation buffers
whose lives do not overlap share memory. Modules of one input that take it in different ways (quantized by another
scale, in another order) become linears of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trtllm_cli.ops.native.packing import PackedModule
from trtllm_cli.ops.native.plan import (
    AddNormOp,
    AttentionOp,
    EmbeddingOp,
    GatedOp,
    LinearOp,
    NormOp,
    Plan,
    PlanOp,
)

_KINDS = {"embedding": 0, "norm": 1, "add_norm": 2, "linear": 3, "gated": 4, "attention": 5, "gather": 6}
_PROLOGUES = {"norm": 1, "add_norm": 2, "gated": 3}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_QUANTIZED = {None: 0, "int8": 1, "fp8": 2}
LOGITS = -1


@dataclass(frozen=True)
class Treatment:
    """What a linear does to its input: take it in the order of a tensor, and quantize it (None: each row's scale)."""

    order: str | None = None
    activation: str | None = None
    input_scale: float | None = None


@dataclass
class Step:
    """One operation of the program, in names. ``reads`` and ``writes`` are activation buffers."""

    kind: str
    outputs: bool
    dim: int
    reads: list[str]
    writes: list[str]
    total: str | None = None
    matrices: tuple[str, ...] = ()
    vector: str | None = None
    activation: str | None = None
    eps: float = 0.0
    prologue: str | None = None
    attention: AttentionOp | None = None
    treatment: Treatment = Treatment()


@dataclass(frozen=True)
class Program:
    """What :mod:`.model` hands to the library: names in index order, and each operation's integers and floats."""

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    orders: tuple[str, ...]
    buffer_widths: tuple[int, ...]
    ops: tuple[tuple[tuple[int, ...], tuple[float, float, float]], ...] = field(repr=False)


def _steps(plan: Plan, modules: Mapping[str, PackedModule]) -> list[Step]:
    return [part for op in plan.ops for part in _treated(_step(plan, op), modules)]


def _treated(step: Step, modules: Mapping[str, PackedModule]) -> list[Step]:
    """A linear as one step for each way in which its modules take their input; an embedding with its order."""
    if step.kind == "embedding":
        step.treatment = Treatment(order=modules[step.matrices[0]].order)
    if step.kind != "linear":
        return [step]
    parts: dict[Treatment, Step] = {}
    for name, out in zip(step.matrices, step.writes, strict=True):
        m = modules[name]
        treatment = Treatment(m.order, m.activation, m.input_scale)
        part = parts.setdefault(treatment, replace(step, matrices=(), writes=[], treatment=treatment))
        part.matrices += (name,)
        part.writes.append(out)
    return list(parts.values())


def _step(plan: Plan, op: PlanOp) -> Step:
    def outputs(name: str) -> bool:
        return plan.buffers[name].rows == "outputs"

    def width(name: str) -> int:
        return plan.buffers[name].width

    if isinstance(op, EmbeddingOp):
        return Step(op.op, False, width(op.out), [], [op.out], matrices=(op.module,))
    if isinstance(op, NormOp):
        return Step(op.op, outputs(op.x), width(op.x), [op.x], [op.out], vector=op.module, eps=op.eps)
    if isinstance(op, AddNormOp):
        reads = [op.residual, op.delta]
        return Step(
            op.op,
            outputs(op.residual),
            width(op.residual),
            reads,
            [op.out],
            total=op.total,
            vector=op.module,
            eps=op.eps,
        )
    if isinstance(op, LinearOp):
        return Step(op.op, outputs(op.x), width(op.x), [op.x], list(op.outs), matrices=op.modules)
    if isinstance(op, GatedOp):
        return Step(op.op, outputs(op.gate), width(op.gate), [op.gate, op.up], [op.out], activation=op.kind)
    if isinstance(op, AttentionOp):
        return Step(op.op, False, width(op.q), [op.q, op.k, op.v], [op.out], attention=op, eps=op.norm_eps)
    return Step(op.op, True, width(op.x), [op.x], [op.out])


def _gather_early(steps: list[Step], widths: dict[str, int]) -> list[Step]:
    """Moves the gather of wanted rows up to the last attention; everything after it is row by row."""
    gathers = [i for i, s in enumerate(steps) if s.kind == "gather"]
    attentions = [i for i, s in enumerate(steps) if s.kind == "attention"]
    if len(gathers) != 1 or not attentions or gathers[0] < attentions[-1]:
        return steps
    gather, after = steps[gathers[0]], attentions[-1] + 1
    made: set[str] = {name for s in steps[:after] for name in _written(s)}
    renamed: dict[str, str] = {gather.writes[0]: gather.reads[0]}
    moved: list[Step] = []
    tail = [s for s in steps[after:] if s is not gather]
    for s in tail:
        for name in s.reads:
            if name in made and name not in renamed:
                renamed[name] = f"{name}.wanted"
                widths[renamed[name]] = widths[name]
                moved.append(Step("gather", True, widths[name], [name], [renamed[name]]))
    if gather.reads[0] in renamed:  # the head reads what the last attention wrote: nothing to gain
        return steps
    for s in tail:
        s.reads = [renamed.get(name, name) for name in s.reads]
        s.outputs = True
    return [*steps[:after], *moved, *tail]


def _written(step: Step) -> list[str]:
    return step.writes + ([step.total] if step.total else [])


def _fuse(steps: list[Step], logits: str) -> list[Step]:
    """Folds the producer of a linear's input into the linear where nothing else reads it."""
    uses: dict[str, int] = {logits: 1}
    for s in steps:
        for name in s.reads:
            uses[name] = uses.get(name, 0) + 1
    out: list[Step] = []
    for s in steps:
        before = out[-1] if out else None
        if (
            s.kind == "linear"
            and before is not None
            and before.kind in _PROLOGUES
            and before.writes == s.reads
            and uses[s.reads[0]] == 1
        ):
            out.pop()
            s.prologue, s.reads, s.total = before.kind, before.reads, before.total
            s.vector, s.eps, s.activation = before.vector, before.eps, before.activation
            if s.total is not None and s.total not in uses:
                s.total = None  # the last residual: nobody reads it
        out.append(s)
    return out


def _place(steps: list[Step], widths: dict[str, int], logits: str) -> tuple[dict[str, int], list[int]]:
    """Buffer name -> index of a memory area, and the areas' widths. Greedy over lives in program order."""
    last_use: dict[str, int] = {}
    for i, s in enumerate(steps):
        for name in (*s.reads, *_written(s)):
            last_use[name] = i
    areas: list[int] = []
    free: list[int] = []
    placed: dict[str, int] = {logits: LOGITS}
    for i, s in enumerate(steps):
        for name in _written(s):
            if name in placed:
                continue
            if free:
                area = next((a for a in free if areas[a] == widths[name]), free[0])
                free.remove(area)
                placed[name] = area
                areas[area] = max(areas[area], widths[name])
            else:
                placed[name] = len(areas)
                areas.append(widths[name])
        # an operation's inputs are freed only after its outputs are placed: no operation works in place
        for name in {*s.reads, *_written(s)}:
            if last_use[name] == i and placed[name] != LOGITS:
                free.append(placed[name])
        free.sort()
    return placed, areas


def lower(plan: Plan, modules: Mapping[str, PackedModule]) -> Program:
    """The program of a plan with its weights packed as ``modules`` says. Deterministic."""
    widths = {name: buffer.width for name, buffer in plan.buffers.items()}
    steps = _fuse(_gather_early(_steps(plan, modules), widths), plan.logits)
    placed, areas = _place(steps, widths, plan.logits)
    matrices = tuple(plan.matrices)
    vectors = tuple(plan.vectors)
    matrix = {name: i for i, name in enumerate(matrices)}
    vector = {name: i for i, name in enumerate(vectors)}
    orders = tuple(dict.fromkeys(s.treatment.order for s in steps if s.treatment.order is not None))

    def at(names: list[str], i: int) -> int:
        return placed[names[i]] if i < len(names) else -1

    ops: list[tuple[tuple[int, ...], tuple[float, float, float]]] = []
    for s in steps:
        a, t = s.attention, s.treatment
        linear = s.kind == "linear"
        # a prologue's row length is the linear's input; a plain step's is its own
        dim = plan.matrices[s.matrices[0]].k if linear else s.dim
        ints = [
            _KINDS[s.kind],
            _PROLOGUES[s.prologue] if s.prologue else 0,
            at(s.reads, 0),
            at(s.reads, 1),
            at(s.reads, 2),
            placed[s.total] if s.total else -1,
            -1 if linear else at(s.writes, 0),
            matrix[s.matrices[0]] if s.kind == "embedding" else -1,
            vector[s.vector] if s.vector else -1,
            _ACTIVATIONS[s.activation] if s.activation else 0,
            a.rotary if a else -1,
            orders.index(t.order) if t.order else -1,
            _QUANTIZED[t.activation],
            int(s.outputs),
            dim,
            a.layer if a else 0,
            a.num_heads if a else 0,
            a.num_kv_heads if a else 0,
            a.head_dim if a else 0,
            (a.window or 0) if a else 0,
            vector[a.q_norm] if a and a.q_norm else -1,
            vector[a.k_norm] if a and a.k_norm else -1,
            len(s.matrices) if linear else 0,
        ]
        if linear:
            for module, out in zip(s.matrices, s.writes, strict=True):
                ints += [matrix[module], placed[out]]
        ops.append((tuple(ints), (s.eps, a.scale if a else 1.0, t.input_scale or 0.0)))
    return Program(matrices=matrices, vectors=vectors, orders=orders, buffer_widths=tuple(areas), ops=tuple(ops))
