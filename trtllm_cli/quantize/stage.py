"""The ``quantize`` stage: a checkpoint becomes a smaller checkpoint that says, layer by layer, what it lost.

Methods without calibration stream weights through in blocks of rows; calibrated ones walk the decoder a layer at a
time (:mod:`trtllm_cli.quantize.calibrated`). Either way a finished part is not done again when an interrupted run is
repeated, and a quality gate that fails leaves no artifact.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.memory import MemoryWatch
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.results import Result
from trtllm_cli.artifacts.schema import CALIBRATION_SKETCH, CheckpointBody, KvCacheScheme, QuantizationRecord
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import CODES, DTYPES, TensorStore
from trtllm_cli.artifacts.texts import read_text
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError
from trtllm_cli.progress import Reporter, Silent
from trtllm_cli.quantize.calibration import OVERLAP_LIMIT, CalibrationData, load_calibration, overlap
from trtllm_cli.quantize.options import QuantizeOptions, refuse_unused
from trtllm_cli.quantize.selection import Choice, select
from trtllm_cli.quantize.writing import Item, items, write

__all__ = ["QuantizeOptions", "QualityGate", "quantize", "refuse_unused", "request"]


class QualityGate(Protocol):
    """Measures a finished checkpoint before it is published, and judges it."""

    def __call__(self, folder: Path, body: CheckpointBody) -> tuple[Result, ...]:
        """Perplexity and divergence of the files in ``folder``. Raises QualityGateError when they are too bad."""
        ...

    def judge(self, results: tuple[Result, ...], where: str) -> None:
        """Raises QualityGateError when a figure is above its limit."""
        ...


#: makes the gate that the options ask for, None where they ask for none; given the source, before the work
GateMaker = Callable[[Artifact, QuantizeOptions, Reporter], "QualityGate | None"]


@dataclass(frozen=True)
class Prepared:
    """What determines the result: the request, and the calibration data where there is any."""

    request: Request
    data: CalibrationData | None


def quantize(
    checkpoint: Path,
    output: Path,
    config: Configured[QuantizeOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
    quality: GateMaker | None = None,
    offline: bool = False,
) -> Artifact:
    """Write the quantized checkpoint.

    Raises UsageError for options without effect, BadInputError for a bad input or calibration data, QualityGateError
    when it is worse than the gate of ``quality`` allows (nothing is published then).
    """
    report = report or Silent()
    parent = open_artifact(checkpoint, "checkpoint", full=True)
    if parent.checkpoint.quantization is not None:
        raise BadInputError(
            "ALREADY_QUANTIZED",
            f"{checkpoint} is quantized already ({parent.checkpoint.quantization.method})",
            "quantize the checkpoint it was made from",
        )
    options = config.options
    refuse_unused(config)
    gate = quality(parent, options, report) if quality is not None else None
    prepared = prepare(parent, config, report, offline=offline)
    with publish(output, prepared.request, force=force) as work:
        if work.up_to_date is not None:
            if gate is not None:
                gate.judge(work.up_to_date.checkpoint.quality, str(output))
            return work.up_to_date
        with MemoryWatch() as memory:
            body, parts = _make(parent, options, prepared.data, work, report)
        if parent.checkpoint.tokenizer is not None:
            _copy_tokenizer(parent, work)
        if prepared.data is not None:
            work.file(CALIBRATION_SKETCH).write_text(prepared.data.sketch().model_dump_json() + "\n")
        _explain(body, parent, report)
        if gate is not None:
            body = body.model_copy(update={"quality": gate(work.path, body)})
        return work.complete(body, {"peak_above_interpreter_mib": round(memory.above_baseline, 1), **parts})


def prepare(
    parent: Artifact, config: Configured[QuantizeOptions], report: Reporter, *, offline: bool = False
) -> Prepared:
    """The request :func:`quantize` makes of ``parent``, reading the calibration and evaluation texts for it.

    Raises BadInputError for unusable texts, and when the evaluation text was calibrated on.
    """
    import torch

    o = config.options
    versions: dict[str, str] = {"torch": torch.__version__}
    identity: dict[str, JsonValue] = {}
    data = None
    if o.uses_calibration or o.provider != "trtllm-cli":
        data = _calibration(parent, o, report, offline)
        identity["calibration"] = data.record.digest
        if o.provider == "trtllm-cli":
            from trtllm_cli.quantize.streaming import choose_compute, choose_device

            device = choose_device(o.device)
            identity["compute"] = f"{device.type} {choose_compute(o.compute, device)}"
        else:
            from trtllm_cli.quantize.providers import modelopt

            versions["nvidia-modelopt"] = modelopt.version()
    if o.eval_text is not None:
        text = read_text(o.eval_text)
        identity["eval_text"] = hashlib.sha256(text.encode()).hexdigest()
        if data is not None:
            _refuse_overlap(parent, data, text, o.eval_text)
    return Prepared(Request("checkpoint", "quantize", config, (parent,), versions, identity), data)


def request(parent: Artifact, config: Configured[QuantizeOptions], report: Reporter | None = None) -> Request:
    """What :func:`quantize` makes of the checkpoint ``parent``; its id tells whether an output is up to date."""
    return prepare(parent, config, report or Silent()).request


def _calibration(parent: Artifact, o: QuantizeOptions, report: Reporter, offline: bool) -> CalibrationData:
    from trtllm_cli.runtime.tokenizer import Tokenizer

    body = parent.checkpoint
    if body.tokenizer is None:
        raise UnsupportedError(
            "NO_TOKENIZER", f"{parent.path} carries no tokenizer to read calibration text with", "convert with one"
        )
    if o.calib_length > body.spec.max_positions:
        raise UsageError(
            "CONTEXT_TOO_LONG",
            f"calibration rows of {o.calib_length} tokens exceed the model's {body.spec.max_positions} positions",
            f"--calib-length {body.spec.max_positions}",
        )
    return load_calibration(
        o.calib,
        Tokenizer(parent.path, body.tokenizer),
        rows=o.calib_rows,
        length=o.calib_length,
        seed=o.calib_seed,
        offline=offline,
        vocab_size=body.spec.vocab_size,
        report=report,
    )


def _refuse_overlap(parent: Artifact, data: CalibrationData, text: str, path: Path) -> None:
    from trtllm_cli.runtime.tokenizer import Tokenizer

    assert parent.checkpoint.tokenizer is not None
    share = overlap(data, Tokenizer(parent.path, parent.checkpoint.tokenizer).encode(text, special=False))
    if share > OVERLAP_LIMIT:
        raise BadInputError(
            "CALIBRATION_OVERLAP",
            f"{100 * share:.0f} % of {path} stands in the calibration data: its figures would flatter the result",
            "evaluate on another text, or calibrate on another one with --calib",
        )


def _make(
    parent: Artifact, options: QuantizeOptions, data: CalibrationData | None, work: Workspace, report: Reporter
) -> tuple[CheckpointBody, dict[str, JsonValue]]:
    spec = parent.checkpoint.spec
    store = TensorStore(parent.path)
    parameters = _parameters(options)
    if options.provider == "modelopt":
        assert data is not None
        made, quantized = _provided(parent, options, data, report)
    else:
        mixed = _mixed(parent, options, data, work, report) if options.target_bits is not None else None
        chosen = select(spec, options, mixed)
        if not chosen and options.kv_cache is None:
            raise UsageError("NOTHING_TO_DO", "the overrides leave no module to quantize", "drop an override")
        _say_notes(chosen, report)
        calibrated = None
        if data is not None:
            from trtllm_cli.quantize.calibrated import quantize_layers

            calibrated = quantize_layers(store, spec, options, chosen, data.tokens, work, report)
        made, quantized = items(store, chosen, options.searches, calibrated), set(chosen)
    layers, total = write(made, options.max_shard_mib, work, report)
    elements = sum(math.prod(store.entry(f"{module}.weight").shape) for module in quantized)
    stored = sum(_weight_bytes(item, quantized) for item in made)
    record = QuantizationRecord(
        method=options.method,
        parameters=parameters,
        layers=layers,
        bits_per_weight=round(stored * 8 / elements, 4) if elements else _stored_bits(parent),
        calibration=data.record if data is not None else None,
        kv_cache=KvCacheScheme(type=options.kv_cache, granularity=options.kv_scales) if options.kv_cache else None,
        provider=options.provider,
    )
    body = parent.checkpoint.model_copy(update={"quantization": record, "weight_bytes": total, "quality": ()})
    return body, _device_memory(options.device) if data is not None else {}


def _stored_bits(parent: Artifact) -> float:
    """Bits of a weight that stays as it is."""
    return 8.0 * DTYPES[CODES[parent.checkpoint.dtype]][0]


def _device_memory(device: str) -> dict[str, JsonValue]:
    """What the GPU held at the most."""
    import torch

    if not device.startswith("cuda"):
        return {}
    return {"peak_device_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}


def _weight_bytes(item: Item, quantized: set[str]) -> int:
    """Bytes of an item's weights with their scales and zero points, where they belong to a quantized module."""
    total = 0
    for name, (code, shape) in item.tensors.items():
        module, _, suffix = name.rpartition(".")
        if module in quantized and suffix.startswith("weight"):
            total += DTYPES[code][0] * math.prod(shape)
    return total


def _parameters(o: QuantizeOptions) -> dict[str, JsonValue]:
    """The options that say what the method was, for the record."""
    used: dict[str, tuple[str, ...]] = {
        "int4-weight-only": ("group_size", "symmetric", "scale_search"),
        "int8-weight-only": ("scale_search",),
        "gptq": ("bits", "group_size", "symmetric", "act_order", "damping", "scale_search"),
        "awq": ("group_size", "symmetric", "scale_search"),
        "awq-gptq": ("group_size", "symmetric", "act_order", "damping", "scale_search"),
        "smoothquant": ("format", "alpha", "weights", "activations"),
        "fp8": ("weights", "activations", "scale_search"),
    }
    dumped: dict[str, Any] = {**o.model_dump(mode="json"), "scale_search": o.searches(o.method)}
    names = used[o.method] + (("target_bits",) if o.target_bits is not None else ())
    return {name: dumped[name] for name in names}


def _mixed(
    parent: Artifact, options: QuantizeOptions, data: CalibrationData | None, work: Workspace, report: Reporter
) -> dict[str, tuple[str, int]]:
    """The method and group size of every module for a target in bits; remembered for a resumed run."""
    from trtllm_cli.quantize.mixing import choose_precisions

    noted = work.state().get("mixed")
    if noted is None:
        assert data is not None
        noted = {k: list(v) for k, v in choose_precisions(parent, options, data.tokens, report).items()}
        work.note(mixed=noted)
    return {module: (str(method), int(group)) for module, (method, group) in noted.items()}


def _provided(
    parent: Artifact, options: QuantizeOptions, data: CalibrationData, report: Reporter
) -> tuple[list[Item], set[str]]:
    """What ModelOpt made, with the embedding and head as ours, and the modules that are quantized."""
    from trtllm_cli.quantize.providers import landing, modelopt

    outside = {m: c for m, c in select(parent.checkpoint.spec, options).items() if m in ("embed", "lm_head")}
    assert options.method in ("smoothquant", "awq", "fp8")
    provided = modelopt.run(
        parent,
        options.method,
        data.tokens,
        group_size=options.group_size,
        device=options.device,
        report=report,
    )
    return landing.items(TensorStore(parent.path), provided, outside), {*provided.shapes, *outside}


def _say_notes(chosen: dict[str, Choice], report: Reporter) -> None:
    for note in sorted({choice.note for choice in chosen.values() if choice.note}):
        count = sum(choice.note == note for choice in chosen.values())
        report.say(f"{count} of {len(chosen)} modules use {note}")


def _explain(body: CheckpointBody, parent: Artifact, report: Reporter) -> None:
    record = body.quantization
    assert record is not None
    if not record.layers:
        report.say("every weight stays as it is; scales for the cache were added")
        return
    worst = max(record.layers, key=lambda layer: layer.relative_error or 0.0)
    report.say(
        f"{len(record.layers)} modules at {record.bits_per_weight:.2f} bits a weight, "
        f"{parent.checkpoint.weight_bytes / 2**20:.0f} -> {body.weight_bytes / 2**20:.0f} MiB; "
        f"largest relative error {worst.relative_error or 0.0:.4f} in {worst.module}"
    )
    fallen = [layer for layer in record.layers if layer.note and "round to nearest" in layer.note]
    for layer in fallen:
        report.say(f"{layer.module}: {layer.note}")


def _copy_tokenizer(parent: Artifact, work: Workspace) -> None:
    info = parent.checkpoint.tokenizer
    assert info is not None
    for name in (info.file, info.chat_template):
        if name is not None:
            shutil.copyfile(parent.file(name), work.file(name))
