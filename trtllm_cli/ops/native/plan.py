"""The recorded forward pass: what the native library interprets.

:func:`record` runs the one forward pass (:func:`trtllm_cli.models.decoder.decoder`) once with :class:`PlanOps`, an
executor whose tensors are names. The result is a :class:`Plan`: operations over named activation buffers, each a
matrix of float32 rows, one row a token (``tokens``) or one row a position whose logits are wanted (``outputs``). Plans
hold no sizes of batches, no addresses and no weight formats, so one plan serves every packing of its model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.decoder import Forward, decoder
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec
from trtllm_cli.ops.api import AttentionSpec, DecoderInputs, KvCache, Ops

PLAN_VERSION: Literal[1] = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EmbeddingOp(_Frozen):
    """``out`` = rows of ``module`` at the token ids."""

    op: Literal["embedding"] = "embedding"
    out: str
    module: str


class NormOp(_Frozen):
    """``out`` = x / sqrt(mean(x^2) + eps) * weight over the whole row."""

    op: Literal["norm"] = "norm"
    out: str
    x: str
    module: str
    eps: float


class AddNormOp(_Frozen):
    """``total`` = residual + delta; ``out`` = its normalisation."""

    op: Literal["add_norm"] = "add_norm"
    total: str
    out: str
    residual: str
    delta: str
    module: str
    eps: float


class LinearOp(_Frozen):
    """``outs[i]`` = x @ modules[i].T + bias: several products of one input."""

    op: Literal["linear"] = "linear"
    outs: tuple[str, ...]
    x: str
    modules: tuple[str, ...]


class GatedOp(_Frozen):
    """``out`` = activation(gate) * up."""

    op: Literal["gated"] = "gated"
    out: str
    gate: str
    up: str
    kind: Literal["silu", "gelu", "gelu_tanh"]


class AttentionOp(_Frozen):
    """Head norms, rotary, cache write and causal attention of one layer; ``rotary`` indexes :attr:`Plan.rotaries`."""

    op: Literal["attention"] = "attention"
    out: str
    q: str
    k: str
    v: str
    layer: int = Field(ge=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    scale: float
    window: int | None
    rotary: int = Field(ge=0)
    q_norm: str | None = None
    k_norm: str | None = None
    norm_eps: float = 0.0


class GatherOp(_Frozen):
    """``out`` = the rows of x whose logits are wanted."""

    op: Literal["gather"] = "gather"
    out: str
    x: str


PlanOp = Annotated[
    EmbeddingOp | NormOp | AddNormOp | LinearOp | GatedOp | AttentionOp | GatherOp, Field(discriminator="op")
]


class Buffer(_Frozen):
    """An activation: ``width`` float32 elements a row, one row per token or per wanted output."""

    width: int = Field(gt=0)
    rows: Literal["tokens", "outputs"]


class MatrixUse(_Frozen):
    """A weight matrix the plan multiplies by or looks up: [n outputs, k inputs]."""

    n: int = Field(gt=0)
    k: int = Field(gt=0)
    bias: bool = False


class Plan(_Frozen):
    """The program of one model. ``logits`` names the buffer that is the result."""

    version: Literal[1] = PLAN_VERSION
    family: str
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    rotaries: tuple[RotarySpec, ...]
    matrices: dict[str, MatrixUse]
    vectors: dict[str, int]
    buffers: dict[str, Buffer]
    ops: tuple[PlanOp, ...]
    logits: str


class PlanOps(Ops[str]):
    """Records the decoder. Handles are buffer names; ``spec`` gives the widths the API itself never asks for."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._shapes = {name: shape for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
        self._biases = {name for name, (_, _, bias) in spec.linears().items() if bias}
        self.buffers: dict[str, Buffer] = {}
        self.matrices: dict[str, MatrixUse] = {}
        self.vectors: dict[str, int] = {}
        self.rotaries: list[RotarySpec] = []
        self.ops: list[PlanOp] = []

    def _new(self, stem: str, width: int, rows: Literal["tokens", "outputs"]) -> str:
        name = f"{stem}.{len(self.buffers)}"
        self.buffers[name] = Buffer(width=width, rows=rows)
        return name

    def _like(self, stem: str, x: str) -> str:
        return self._new(stem, self.buffers[x].width, self.buffers[x].rows)

    def _matrix(self, module: str) -> MatrixUse:
        n, k = self._shapes[f"{module}.weight"]
        self.matrices[module] = MatrixUse(n=n, k=k, bias=module in self._biases)
        return self.matrices[module]

    def positions(self, token_ids: str, starts: str) -> str:
        return "positions"

    def embedding(self, token_ids: str, module: str) -> str:
        out = self._new("embedding", self._matrix(module).k, "tokens")
        self.ops.append(EmbeddingOp(out=out, module=module))
        return out

    def linear(self, x: str, module: str) -> str:
        return self.linears(x, (module,))[0]

    def linears(self, x: str, modules: tuple[str, ...]) -> tuple[str, ...]:
        outs = tuple(self._new(m.rsplit(".", 1)[-1], self._matrix(m).n, self.buffers[x].rows) for m in modules)
        self.ops.append(LinearOp(outs=outs, x=x, modules=modules))
        return outs

    def norm(self, x: str, module: str, spec: NormSpec) -> str:
        self.vectors[module] = self.buffers[x].width
        out = self._like("norm", x)
        self.ops.append(NormOp(out=out, x=x, module=module, eps=spec.eps))
        return out

    def add_norm(self, residual: str, delta: str, module: str, spec: NormSpec) -> tuple[str, str]:
        self.vectors[module] = self.buffers[residual].width
        total, out = self._like("residual", residual), self._like("norm", residual)
        self.ops.append(AddNormOp(total=total, out=out, residual=residual, delta=delta, module=module, eps=spec.eps))
        return total, out

    def gated(self, gate: str, up: str, kind: str) -> str:
        out = self._like("gated", gate)
        self.ops.append(GatedOp.model_validate({"out": out, "gate": gate, "up": up, "kind": kind}))
        return out

    def self_attention(
        self,
        q: str,
        k: str,
        v: str,
        cache: KvCache[str],
        positions: str,
        starts: str,
        spec: AttentionSpec,
        qk_norm: tuple[str, str, NormSpec] | None,
    ) -> tuple[str, KvCache[str]]:
        if spec.rotary not in self.rotaries:
            self.rotaries.append(spec.rotary)
        if qk_norm is not None:
            self.vectors[qk_norm[0]] = self.vectors[qk_norm[1]] = spec.head_dim
        out = self._like("attended", q)
        self.ops.append(
            AttentionOp(
                out=out,
                q=q,
                k=k,
                v=v,
                layer=int(cache.k),
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=spec.scale,
                window=spec.window,
                rotary=self.rotaries.index(spec.rotary),
                q_norm=qk_norm[0] if qk_norm else None,
                k_norm=qk_norm[1] if qk_norm else None,
                norm_eps=qk_norm[2].eps if qk_norm else 0.0,
            )
        )
        return out, cache

    def gather_last(self, x: str, last: str) -> str:
        out = self._new("gathered", self.buffers[x].width, "outputs")
        self.ops.append(GatherOp(out=out, x=x))
        return out

    # The decoder reaches none of these: each lives inside a coarse operation recorded above, or is for other layers.

    def add(self, a: str, b: str | float) -> str:
        raise _unrecorded("add")

    def mul(self, a: str, b: str | float) -> str:
        raise _unrecorded("mul")

    def parameter(self, name: str) -> str:
        raise _unrecorded("parameter")

    def div(self, a: str, b: str) -> str:
        raise _unrecorded("div")

    def sqrt(self, x: str) -> str:
        raise _unrecorded("sqrt")

    def mean(self, x: str) -> str:
        raise _unrecorded("mean")

    def float32(self, x: str) -> str:
        raise _unrecorded("float32")

    def type_as(self, x: str, like: str) -> str:
        raise _unrecorded("type_as")

    def activation(self, x: str, kind: str) -> str:
        raise _unrecorded("activation")

    def split_heads(self, x: str, heads: int, head_dim: int) -> str:
        raise _unrecorded("split_heads")

    def merge_heads(self, x: str) -> str:
        raise _unrecorded("merge_heads")

    def rotary(self, x: str, positions: str, spec: RotarySpec) -> str:
        raise _unrecorded("rotary")

    def cache_update(self, cache: KvCache[str], k: str, v: str, starts: str) -> KvCache[str]:
        raise _unrecorded("cache_update")

    def attend(self, q: str, cache: KvCache[str], positions: str, spec: AttentionSpec) -> str:
        raise _unrecorded("attend")


def _unrecorded(what: str) -> UnsupportedError:
    return UnsupportedError(
        "PLAN_OPERATION",
        f"the native CPU plan has no stand-alone operation {what!r}",
        "build for another backend with --backend",
    )


def record(spec: DecoderSpec, forward: Forward = decoder) -> Plan:
    """The plan of a model. The same spec always gives the same plan.

    Raises UnsupportedError for an operation of ``forward`` that the native library has no kernel for.
    """
    ops = PlanOps(spec)
    caches = tuple(KvCache(str(layer), str(layer)) for layer in range(spec.num_layers))
    out = forward(ops, spec, DecoderInputs("tokens", "starts", "last", caches))
    return Plan(
        family=spec.family,
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_positions=spec.max_positions,
        rotaries=tuple(ops.rotaries),
        matrices=ops.matrices,
        vectors=ops.vectors,
        buffers=ops.buffers,
        ops=tuple(ops.ops),
        logits=out.logits,
    )
