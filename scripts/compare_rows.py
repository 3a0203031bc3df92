"""What ``compare_quantizers.py`` compares: our command lines beside the published packages' recipes for the same thing.

A bound is the perplexity on SmolLM2 (see the protocol in ``compare_quantizers.py``) that we want to stay below; None
where the row only informs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A recipe of ``compare_peer_worker.py``; ``label`` tells a package's recipes apart."""

    package: str
    label: str
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """``ours`` are options of ``trtllm-cli quantize``; None: we have nothing of the kind.

    ``dtype`` is the checkpoint's that ours starts from; peers always start from float32.
    """

    name: str
    bound: float | None
    ours: tuple[str, ...] | None
    peers: tuple[Peer, ...] = field(default=())
    dtype: str = "float32"


def _weights(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return scheme if group is None else {**scheme, "group_size": group}


def _llm(label: str, **recipe: Any) -> Peer:
    return Peer("llmcompressor", label, recipe)


def _modelopt(config: str, **more: Any) -> Peer:
    return Peer("modelopt", config, {"config": config, **more})


def _int4(method: str, group: int, symmetric: bool, *more: str) -> tuple[str, ...]:
    sign = "--symmetric" if symmetric else "--asymmetric"
    return ("--method", method, "--group-size", str(group), sign, *more)


def _name(group: int, symmetric: bool) -> str:
    return f"g{group} {'symmetric' if symmetric else 'asymmetric'}"


def _gptq(group: int, symmetric: bool, bound: float | None) -> Row:
    weights = {**_weights(4, group, symmetric), "actorder": "static"}
    peer = _llm("GPTQ, static act-order", weights=weights, gptq={})
    return Row(f"GPTQ {_name(group, symmetric)}", bound, _int4("gptq", group, symmetric), (peer,))


def _awq(group: int, symmetric: bool, bound: float | None) -> Row:
    peers = [_llm("AWQ", weights=_weights(4, group, symmetric), before={"awq": {}})]
    if symmetric:
        peers.append(_modelopt("INT4_AWQ_CFG", group_size=group))
    return Row(f"AWQ {_name(group, symmetric)}", bound, _int4("awq", group, symmetric), tuple(peers))


def _nearest(group: int, symmetric: bool) -> Row:
    peers = [
        _llm("round to nearest", weights=_weights(4, group, symmetric)),
        Peer("torchao", "IntxWeightOnlyConfig", {"kind": "int4", "group_size": group, "symmetric": symmetric}),
    ]
    if not symmetric:
        peers.append(Peer("hqq", "HQQ", {"bits": 4, "group_size": group}))
    ours = _int4("int4-weight-only", group, symmetric)
    return Row(f"round to nearest {_name(group, symmetric)}", None, ours, tuple(peers))


_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
_SMOOTH = {"smoothquant": {"smoothing_strength": 0.8}}


def _float(scheme: dict[str, Any]) -> dict[str, Any]:
    return {**scheme, "type": "float"}


def _smoothquant(activations: str) -> tuple[str, ...]:
    return ("--method", "smoothquant", "--weights", "channel", "--activations", activations)


def _fp8(weights: str, activations: str) -> tuple[str, ...]:
    return ("--method", "fp8", "--weights", weights, "--activations", activations)


def _cache(kind: str) -> tuple[Peer, ...]:
    scheme = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True, "dynamic": False}
    return (
        _llm("cache per head", weights=_weights(8, None, True), kv_cache={**scheme, "strategy": "attn_head"}),
        _llm("cache per tensor", weights=_weights(8, None, True), kv_cache={**scheme, "strategy": "tensor"}),
        _modelopt("INT8_WEIGHT_ONLY_CFG", kv_cache=kind),
    )


def rows() -> tuple[Row, ...]:
    """All of them, in the order of the table."""
    keep_weights = ("--method", "int8-weight-only")
    eight = _weights(8, None, True)
    return (
        Row(
            "int8 weight-only",
            28.84,
            keep_weights,
            (
                _modelopt("INT8_WEIGHT_ONLY_CFG"),
                _llm("round to nearest", weights=eight),
                Peer("torchao", "Int8WeightOnlyConfig", {"kind": "int8"}),
                Peer("quanto", "qint8", {"weights": "qint8"}),
            ),
        ),
        Row("int8 weight-only, bfloat16 checkpoint", 28.84, keep_weights, dtype="bfloat16"),
        Row(
            "SmoothQuant int8, per channel / per token",
            29.3,
            _smoothquant("token"),
            (
                _llm("SmoothQuant 0.8", weights=eight, inputs=_TOKEN, before=_SMOOTH),
                _llm("without smoothing", weights=eight, inputs=_TOKEN),
                Peer("torchao", "Int8DynamicActivationInt8WeightConfig", {"kind": "w8a8"}),
            ),
        ),
        Row(
            "SmoothQuant int8, per channel / static per tensor",
            30.4,
            _smoothquant("tensor"),
            (
                _modelopt("INT8_SMOOTHQUANT_CFG"),
                _llm("SmoothQuant 0.8", weights=eight, inputs=_TENSOR, before=_SMOOTH),
                Peer("quanto", "qint8, qint8", {"weights": "qint8", "activations": "qint8"}),
            ),
        ),
        Row(
            "FP8, per channel / per token",
            29.85,
            _fp8("channel", "token"),
            (
                _modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG"),
                _llm("FP8 dynamic", weights=_float(eight), inputs=_float(_TOKEN)),
            ),
        ),
        Row(
            "FP8, per tensor / static per tensor",
            None,
            _fp8("tensor", "tensor"),
            (
                _modelopt("FP8_DEFAULT_CFG"),
                _llm("FP8 static", weights=_float({**eight, "strategy": "tensor"}), inputs=_float(_TENSOR)),
            ),
        ),
        _gptq(64, True, 37.5),
        _gptq(32, False, 32.4),
        _gptq(128, True, None),
        _awq(128, True, None),
        _awq(128, False, None),
        _awq(64, True, 38.5),
        _awq(64, False, 36.5),
        _awq(32, True, None),
        _awq(32, False, None),
        *(_nearest(group, symmetric) for group in (128, 64, 32) for symmetric in (True, False)),
        Row(
            "AWQ then GPTQ g32 asymmetric",
            None,
            _int4("awq-gptq", 32, False),
            (
                _llm(
                    "AWQ, GPTQ static act-order",
                    weights={**_weights(4, 32, False), "actorder": "static"},
                    before={"awq": {}},
                    gptq={},
                ),
            ),
        ),
        Row("int8 cache beside int8 weights", None, (*keep_weights, "--kv-cache", "int8"), _cache("int8")),
        Row("fp8 cache beside int8 weights", None, (*keep_weights, "--kv-cache", "fp8"), _cache("fp8")),
        Row("6.2 bits a weight, mixed", 30.6, ("--method", "gptq", "--asymmetric", "--target-bits", "6.2")),
        Row("provider: ModelOpt SmoothQuant", None, ("--method", "smoothquant", "--provider", "modelopt")),
        Row(
            "provider: ModelOpt AWQ g64",
            None,
            ("--method", "awq", "--group-size", "64", "--provider", "modelopt"),
        ),
        Row("provider: ModelOpt FP8", None, ("--method", "fp8", "--provider", "modelopt")),
    )
