"""Weights and a spec in, a TensorRT plan out, on a machine with or without a GPU.

Nothing here knows about artifacts: :func:`build_plan` writes ``engine.plan`` and ``layers.json`` into a directory (and
``weights.safetensors``, where weights are inputs of the plan) and returns what it learnt. Weights are used where they
lie (memory maps) and the plan is streamed to disk, so the memory needed is what TensorRT itself takes. Plans are not
bit-reproducible.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_cli.artifacts.schema import Dtype, LayerQuantization
from trtllm_cli.artifacts.tensorrt import Range
from trtllm_cli.build.tensorrt import errors
from trtllm_cli.build.tensorrt.linears import Census, census, told
from trtllm_cli.build.tensorrt.log import LogReader, PlanFacts
from trtllm_cli.build.tensorrt.module import TensorRT, load
from trtllm_cli.build.tensorrt.network import Profile, Sizing, add_profiles, define, new_definition, profiles
from trtllm_cli.build.tensorrt.ops import NO_CHOICES, Choices
from trtllm_cli.build.tensorrt.plan import PlanWriter, digests, read_header
from trtllm_cli.build.tensorrt.quantized import Quantized, nothing
from trtllm_cli.build.tensorrt.weights import WeightSource, write
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.models.decoder import Forward, decoder
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter, Silent

PLAN = "engine.plan"
LAYERS = "layers.json"
WEIGHTS = "weights.safetensors"
#: what a plan is made for unless the user says; four targets in one plan cost the size of one
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
#: the first compute capability that has the type
_FIRST: dict[str, int] = {"bfloat16": 80, "int4": 80, "fp8": 89}
#: capabilities that the package does not list but runs plans on, seen with TensorRT-RTX 1.6.1 on an H100 and an H200
_UNLISTED = {"sm90": "leave --target out: a plan for the default targets runs on an H100 or H200 too"}
_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class TrtBuild:
    """A finished plan: the file, what the log said, the package, the compute capabilities it is for, and the cost.

    ``targets`` is empty where the package only builds for the GPU of the machine. ``network_layers`` counts layers
    before fusion; ``linears`` says per profile what the products compiled to (empty where the log was not understood);
    ``cache_bytes`` is the memory of all caches at full concurrency; ``weight_inputs`` names the weights that are inputs
    of the plan, which ``weight_bytes`` includes. ``plan_digests``: see :func:`trtllm_cli.build.tensorrt.plan.digests`.
    """

    plan: Path
    facts: PlanFacts
    linears: tuple[Census, ...]
    package: str
    version: str
    targets: tuple[str, ...]
    dtype: Dtype
    profiles: tuple[Profile, ...]
    network_layers: int
    weight_bytes: int
    cache_bytes: int
    seconds: float
    choices: Choices = NO_CHOICES
    weight_inputs: tuple[str, ...] = ()
    plan_digests: tuple[str, ...] = ()


def build_plan(
    spec: DecoderSpec,
    weights: WeightSource,
    dtype: Dtype,
    sizing: Sizing,
    target: Sequence[str],
    directory: Path,
    report: Reporter | None = None,
    quantized: Quantized | None = None,
    forward: Forward = decoder,
    choices: Choices = NO_CHOICES,
) -> TrtBuild:
    """Build the decoder in ``dtype`` for the compute capabilities ``target`` (empty: the default ones).

    The modules that ``quantized`` records are built from its source, all else from ``weights``. ``forward`` is the
    forward pass where it is not the usual one (a watched one, or one of your own), ``choices`` what else can differ.

    Raises UsageError for a context beyond the model's, BadInputError for a missing or misshapen weight (naming it),
    UnsupportedError for what TensorRT refuses, DoesNotFitError when memory runs out, OSError when the disk does.
    """
    started = time.monotonic()
    report = report or Silent()
    trt = load()
    check_context(spec, sizing.context)
    layers_of = {layer.module: layer for layer in quantized.record.layers} if quantized else {}
    check_choices(choices, dtype, bool(layers_of))
    narrow = {"fp8"} if choices.fp8_attention else set()
    targets = resolve_targets(trt, target, dtype, narrow | {layer.scheme.type for layer in layers_of.values()})
    reader = LogReader()
    ranges = profiles(sizing)

    def hear(message: str) -> None:
        reader.hear(message)
        if message.startswith("Constructing optimization profile number "):
            report.advance("compiling", reader.profile, len(ranges), "profiles")

    with errors.listening(trt, hear) as tail:
        made = new_definition(trt)
        layers, network = made.layers, made.layers.network
        define(
            layers, spec, weights, dtype, sizing.context, quantized.source if quantized else nothing, forward, choices
        )
        report.say(f"defined {network.num_layers} layers")
        config = _configure(trt, made.builder, spec, dtype, sizing, targets)
        with _interruptible(trt, config) as interrupted, PlanWriter(trt, directory / PLAN) as writer:
            done = made.builder.build_serialized_network_to_stream(network, config, writer.target)
            if writer.error is not None:
                raise writer.error
            interrupted()
            if not done:
                complaints = "; ".join(filter(None, (made.complaints.take(), layers.complaints.take())))
                raise errors.build_failed(trt, complaints, list(tail))
        network_layers = int(network.num_layers)
    facts = reader.facts()
    linears = _censuses(facts, spec, layers_of, dtype, choices)
    _report_facts(ranges, facts, linears, spec, report)
    read_header(directory / PLAN)
    (directory / LAYERS).write_text(facts.model_dump_json(indent=1) + "\n")
    loaded = write(directory / WEIGHTS, spec.tensor_shapes(), weights, dtype) if choices.weights_as_inputs else 0
    built = TrtBuild(
        plan=directory / PLAN,
        facts=facts,
        linears=linears,
        package=trt.package,
        version=trt.version,
        targets=targets,
        dtype=dtype,
        profiles=ranges,
        network_layers=network_layers,
        weight_bytes=loaded + (facts.weight_bytes or sum(bits.nbytes for bits in layers.constants.values())),
        cache_bytes=2 * spec.num_layers * sizing.concurrency * spec.kv_size * sizing.context * _BYTES[dtype],
        seconds=time.monotonic() - started,
        choices=choices,
        weight_inputs=tuple(spec.tensor_shapes()) if choices.weights_as_inputs else (),
        plan_digests=digests(directory / PLAN),
    )
    needs = {"weights": built.weight_bytes, "caches": built.cache_bytes, "activations": facts.scratch_bytes}
    report.say(
        f"needs {sum(needs.values()) / 2**30:.2f} GiB of GPU memory: "
        + ", ".join(f"{what} {count / 2**20:.0f} MiB" for what, count in needs.items())
    )
    return built


def resolve_targets(
    trt: TensorRT, target: Sequence[str], dtype: Dtype, weights: Collection[str] = ()
) -> tuple[str, ...]:
    """The compute capabilities to build for, given the compute type and the types of quantized weights.

    Raises UnsupportedError for one that the package does not have or that lacks a type.
    """
    known = trt.targets
    if not known:
        if target:
            raise UnsupportedError(
                "TARGET_FIXED",
                f"{trt.title} builds only for the GPU of this machine, not for {', '.join(target)}",
                "leave --target out, or pip install 'trtllm-cli[tensorrt]' for TensorRT-RTX",
            )
        return ()
    lacking = max((dtype, *sorted(weights)), key=lambda kind: _FIRST.get(kind, 0))
    first = _FIRST.get(lacking, 0)
    able = [name for name in known if int(name[2:]) >= first]
    chosen = tuple(target) or tuple(name for name in DEFAULT_TARGETS if name in able)
    for name in chosen:
        if name not in known:
            raise UnsupportedError(
                "TARGET_UNKNOWN",
                f"{trt.title} has no target {name}; it has {', '.join(known)}",
                f"{_UNLISTED[name]}, or {_nearest(name, able)}" if name in _UNLISTED else _nearest(name, able),
            )
        if name not in able:
            raise UnsupportedError(
                "TARGET_LACKS_DTYPE",
                f"target {name} has no {lacking} arithmetic; {lacking} needs sm{first} or later",
                f"add --dtype float16, or {_nearest(name, able).removeprefix('add ')}"
                if lacking == dtype
                else _nearest(name, able),
            )
    return chosen


def _nearest(name: str, able: Sequence[str]) -> str:
    wanted = int(name[2:])
    return f"add --target {min(able, key=lambda other: abs(int(other[2:]) - wanted))}"


def check_choices(choices: Choices, dtype: Dtype, quantized: bool) -> None:
    """Raises UnsupportedError for a choice that TensorRT does not take with the compute type or the weights."""
    if choices.fp8_attention and dtype == "float32":
        raise UnsupportedError(
            "TENSORRT_FP8_ATTENTION",
            "--fp8-attention with float32: TensorRT has no fused attention of prompts that writes float32",
            "add --dtype bfloat16, or leave out --fp8-attention",
        )
    if choices.weights_as_inputs and quantized:
        raise UnsupportedError(
            "TENSORRT_INPUTS_QUANTIZED",
            "--weights-as-inputs with a quantized checkpoint: TensorRT melts low-bit weights into their kernels only as"
            " constants of the plan",
            "leave out --weights-as-inputs, or build the checkpoint it was quantized from",
        )


def check_context(spec: DecoderSpec, context: int) -> None:
    """Raises UsageError when the model has fewer positions."""
    if context > spec.max_positions:
        raise UsageError(
            "CONTEXT_TOO_LONG",
            f"context {context} is beyond the {spec.max_positions} positions this {spec.family} model has",
            f"add --context {spec.max_positions}",
        )


def _configure(
    trt: TensorRT, builder: Any, spec: DecoderSpec, dtype: Dtype, sizing: Sizing, targets: tuple[str, ...]
) -> Any:
    config = builder.create_builder_config()
    # the only source of what is inside a plan where there is no GPU; see log.py
    config.profiling_verbosity = trt.api.ProfilingVerbosity.DETAILED
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, name in enumerate(targets):
            config.set_compute_capability(trt.targets[name], index)
    if dtype == "float32":
        # on by default: products of float32 would keep ten bits of mantissa (measured on a GPU: errors of 0.1 to 0.3 %)
        config.clear_flag(trt.api.BuilderFlag.TF32)
    add_profiles(builder, config, spec, sizing)
    return config


def _censuses(
    facts: PlanFacts, spec: DecoderSpec, layers_of: Mapping[str, LayerQuantization], dtype: Dtype, choices: Choices
) -> tuple[Census, ...]:
    if not facts.complete:
        return ()
    return tuple(census(profile, spec, layers_of, dtype, choices.fp8_attention) for profile in facts.profiles)


def _report_facts(
    ranges: Sequence[Profile], facts: PlanFacts, linears: Sequence[Census], spec: DecoderSpec, report: Reporter
) -> None:
    if not facts.complete:
        report.say("the build log was not understood: the plan's kernels are not recorded")
        return
    for sizes, profile, products in zip(ranges, facts.profiles, linears, strict=True):
        fused = sum(profile.attention.values())
        kinds = ", ".join(profile.attention) or "none"
        became = ", ".join(f"{count} {what}" for what, count in products.kinds.items())
        report.say(
            f"{sizes.name}: batch {_span(sizes.batch)}, tokens {_span(sizes.tokens)}, {len(profile.kernels)} kernels,"
            f" attention {fused}/{spec.num_layers} fused ({kinds}), products: {became}"
        )
        for line in told(products.fallbacks):
            report.say(f"{sizes.name}: {line}")


def _span(sizes: Range) -> str:
    least, _, most = sizes
    return str(least) if least == most else f"{least}..{most}"


@contextmanager
def _interruptible(trt: TensorRT, config: Any) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C (or SIGTERM, where it is handled) cancel the build; call the yielded function after it.

    A Python exception must not travel through TensorRT's frames, so the signal is noted, the progress monitor asks
    for the end, and the signal's own handler runs afterwards.
    """
    noted: list[int] = []
    base: Any = trt.api.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not noted

        def phase_finish(self, phase: str) -> None:
            pass

    monitor = Monitor()
    config.progress_monitor = monitor
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda got, frame: noted.append(got))

    def finish() -> None:
        restore()
        for number in noted:
            handlers[number](number, None)

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        yield finish
    finally:
        restore()
