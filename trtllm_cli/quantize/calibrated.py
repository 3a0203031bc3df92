"""The walk over all layers: quantize, write the layer, say how it went; resumable after every layer.

A finished layer lies in ``.layers/NNNNN.safetensors`` of the stage's workspace with its records beside it. A repeated
run computes the residual again by running the finished layers as they ran before (quantized ones where the method
looks at quantized inputs), so that what follows is the same to the bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trtllm_cli.artifacts.memory import parse_bytes
from trtllm_cli.artifacts.publish import Workspace
from trtllm_cli.artifacts.schema import LayerQuantization
from trtllm_cli.artifacts.tensors import CODES, TensorFile, TensorStore, TensorWriter
from trtllm_cli.errors import DoesNotFitError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.models.weights import dequantized
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize.groups import LayerResult
from trtllm_cli.quantize.layerwise import LayerQuantizer
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.quantize.selection import Choice
from trtllm_cli.quantize.streaming import SPILLED, Streamer, choose_compute, choose_device

_FOLDER = ".layers"


def quantize_layers(
    store: TensorStore,
    spec: DecoderSpec,
    options: QuantizeOptions,
    choices: Mapping[str, Choice],
    tokens: NDArray[np.int32],
    work: Workspace,
    report: Reporter,
) -> list[tuple[TensorFile, tuple[LayerQuantization, ...]]]:
    """Every layer's new tensors and records, in order. ``tokens`` int32 [rows, length].

    Raises what :func:`~trtllm_cli.quantize.streaming.choose_device` raises, BadInputError for activations or weights
    that are not finite.
    """
    finished = [layer for layer in range(spec.num_layers) if layer in set(work.state().get("layers", []))]
    if len(finished) < spec.num_layers:
        folder = work.file(f"{_FOLDER}/layer").parent
        for left in folder.glob(f"{SPILLED}*"):
            left.unlink()  # of a run that was killed
        device = choose_device(options.device)
        compute = choose_compute(options.compute, device)
        streamer = Streamer(
            spec,
            torch.from_numpy(tokens.astype(np.int64)),
            device,
            compute,
            parse_bytes(options.max_ram),
            folder,
        )
        if streamer.residual.spilled:
            report.say(f"activations ({streamer.residual.bytes / 2**30:.1f} GiB) exceed --max-ram and lie on disk")
        try:
            with torch.inference_mode():
                _walk(store, spec, options, choices, streamer, work, report)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                "DEVICE_MEMORY",
                f"{options.device} has too little memory for one layer and its activations",
                "a smaller --max-ram (activations go to disk), fewer --calib-rows, or --device cpu; it resumes",
            ) from error
        finally:
            streamer.residual.close()
    return [_finished(work, layer) for layer in range(spec.num_layers)]


def _finished(work: Workspace, layer: int) -> tuple[TensorFile, tuple[LayerQuantization, ...]]:
    records = json.loads(_records(work, layer).read_bytes())
    return TensorFile(_file(work, layer)), tuple(map(LayerQuantization.model_validate, records))


def _file(work: Workspace, layer: int) -> Path:
    return work.file(f"{_FOLDER}/{layer:05d}.safetensors")


def _records(work: Workspace, layer: int) -> Path:
    return work.file(f"{_FOLDER}/{layer:05d}.json")


def _walk(
    store: TensorStore,
    spec: DecoderSpec,
    options: QuantizeOptions,
    choices: Mapping[str, Choice],
    streamer: Streamer,
    work: Workspace,
    report: Reporter,
) -> None:
    dtypes = {name: store.tensor_dtype(name) for name in store}
    quantizer = LayerQuantizer(streamer, options, choices, dtypes)
    finished: list[int] = list(work.state().get("layers", []))
    if finished:
        report.say(f"{len(finished)} of {spec.num_layers} layers were finished before")
    streamer.embed(store)
    began, done = time.monotonic(), 0
    for layer in range(spec.num_layers):
        streamer.load(store, layer)
        if layer in finished:
            if quantizer.sequential(layer):
                _restore(streamer, *_finished(work, layer))
            streamer.advance(layer)
            report.advance("repeating", layer + 1, len(finished), "layers")
            continue
        result = quantizer.run(layer)
        _write(work, layer, result)
        finished.append(layer)
        work.note(layers=finished)
        done += 1
        left = (time.monotonic() - began) / done * (spec.num_layers - layer - 1)
        report.say(f"layer {layer + 1} of {spec.num_layers}: {_summary(result.records)}, about {left:.0f} s left")
        report.advance("quantizing", layer + 1, spec.num_layers, "layers")


def _summary(records: Sequence[LayerQuantization]) -> str:
    errors = [(r.output_error, r.module.split(".", 2)[2]) for r in records if r.output_error is not None]
    if not errors:
        return f"{len(records)} modules"
    worst, module = max(errors)
    mean = sum(error for error, _ in errors) / len(errors)
    return f"output error {mean:.4f} (worst {module} {worst:.4f})"


def _write(work: Workspace, layer: int, result: LayerResult) -> None:
    partial = work.file(f"{_FOLDER}/{layer:05d}.writing")
    tensors = {name: tensor.contiguous() for name, tensor in result.tensors.items()}
    shapes = {n: (CODES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(partial, shapes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    _records(work, layer).write_text(json.dumps([record.model_dump(mode="json") for record in result.records]))
    partial.rename(_file(work, layer))


def _restore(streamer: Streamer, file: TensorFile, records: Sequence[LayerQuantization]) -> None:
    """Give the streamer the finished layer as it was when its residual was computed."""
    modules = {record.module for record in records}
    for name in file.entries:
        module, _, suffix = name.rpartition(".")
        if suffix == "bias" or (suffix == "weight" and module not in modules):
            streamer.weights.set(name, file.tensor(name))
    for record in records:
        streamer.weights.set(f"{record.module}.weight", dequantized(file, record))
