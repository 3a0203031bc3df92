"""The ``export`` stage: a checkpoint becomes a folder that transformers and other servers load.

The result is a source artifact, so ``convert`` takes it back; the published files lie in its folder ``files``. Tensors
stream through one module at a time, and a finished shard is not written again when an interrupted export is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.memory import MemoryWatch
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import SourceBody, SourceOrigin
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import DTYPES, TensorStore, TensorWriter, shard, shard_names, write_index
from trtllm_cli.export.folder import write_config, write_tokenizer
from trtllm_cli.export.formats import Format, PlainFormat, Subject, listed
from trtllm_cli.models.families import family_of
from trtllm_cli.models.published import published_config
from trtllm_cli.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch

#: folder of the published files inside a source artifact
FILES = "files"


class ExportOptions(StageOptions):
    """``format`` of the quantized part: ``compressed-tensors``, ``gptq`` (int4 weights), ``hf`` (nothing quantized)."""

    format: Literal["compressed-tensors", "gptq", "hf"]
    max_shard_mib: int = Field(default=2048, gt=0)


@dataclass(frozen=True)
class _Unit:
    """What is read and written in one go: a tensor, or all tensors of a quantized module, by published name."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[], dict[str, torch.Tensor]]

    @property
    def size(self) -> int:
        return sum(DTYPES[code][0] * math.prod(shape) for code, shape in self.tensors.values())


def export(
    checkpoint: Path,
    output: Path,
    config: Configured[ExportOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Write the folder. Raises UnsupportedError for what the format cannot hold, naming the modules."""
    report = report or Silent()
    parent = open_artifact(checkpoint, "checkpoint", full=True)
    body = parent.checkpoint
    with publish(output, request(parent, config), force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        subject = _subject(parent)
        form = _format(config.options.format, subject)
        if form.dense:
            report.say(
                f"{listed(form.dense)}: {config.options.format} has no place for it quantized, so it is written "
                "dequantized in float32, which changes no value"
            )
        for note in form.notes:
            report.say(note)
        directory = work.file(f"{FILES}/config.json").parent
        write_config(body, form.config(), directory)
        write_tokenizer(parent, directory)
        with MemoryWatch() as memory:
            _write(_units(subject, form), config.options.max_shard_mib, directory, work, report)
        origin = SourceOrigin(kind="export", reference=f"checkpoint:{parent.id}")
        return work.complete(
            SourceBody(origin=origin, format="safetensors"),
            {"peak_above_interpreter_mib": round(memory.above_baseline, 1)},
        )


def request(parent: Artifact, config: Configured[ExportOptions]) -> Request:
    """What :func:`export` makes of the checkpoint ``parent``; its id tells whether an output is up to date."""
    import torch

    return Request("source", "export", config, (parent,), {"torch": torch.__version__})


def _subject(parent: Artifact) -> Subject:
    body = parent.checkpoint
    config = published_config(body.spec, body.dtype)
    names = family_of(config, str(parent.path)).published_names(body.spec)
    record = body.quantization
    return Subject(
        store=TensorStore(parent.path),
        spec=body.spec,
        record=record,
        published={ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in names.items()},
        layers={layer.module: layer for layer in record.layers} if record else {},
    )


def _format(name: str, subject: Subject) -> Format:
    if name == "hf":
        return PlainFormat(subject)
    if name == "gptq":
        from trtllm_cli.export.gptq import GptqFormat

        return GptqFormat(subject)
    from trtllm_cli.export.compressed import CompressedTensorsFormat

    return CompressedTensorsFormat(subject)


def _units(subject: Subject, form: Format) -> list[_Unit]:
    """Everything to write, in execution order."""
    units: list[_Unit] = []
    for name, shape in subject.spec.tensor_shapes().items():
        module, _, kind = name.rpartition(".")
        published = f"{subject.published[module]}.{kind}"
        if kind != "weight" or module not in subject.layers:
            units.append(_Unit({published: (subject.code(name), shape)}, partial(_plain, subject, name, published)))
        elif module in form.dense:
            units.append(_Unit({published: ("F32", shape)}, partial(_dequantized, subject, module, published)))
        else:
            prefix = subject.published[module]
            described = {f"{prefix}.{suffix}": made for suffix, made in form.described(module).items()}
            units.append(_Unit(described, partial(_quantized, form, module, prefix)))
    units += [_Unit({name: made}, partial(_scale, form, name)) for name, made in form.scales().items()]
    return units


def _plain(subject: Subject, name: str, published: str) -> dict[str, torch.Tensor]:
    return {published: subject.tensor(name)}


def _dequantized(subject: Subject, module: str, published: str) -> dict[str, torch.Tensor]:
    from trtllm_cli.models.weights import dequantized

    layer = subject.layers[module]
    if layer.scheme.type == "int4":
        return {published: dequantized(subject.store, layer)}
    # an embedding is often the largest matrix of a model: scaled in place, in the order of the definition
    weight = subject.tensor(f"{module}.weight").float()
    return {published: weight.mul_(subject.tensor(f"{module}.weight_scale").float()[:, None])}


def _quantized(form: Format, module: str, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in form.tensors(module).items()}


def _scale(form: Format, name: str) -> dict[str, torch.Tensor]:
    return {name: form.scale(name)}


def _write(units: list[_Unit], max_shard_mib: int, directory: Path, work: Workspace, report: Reporter) -> None:
    by_name = {next(iter(unit.tensors)): unit for unit in units}
    groups = shard({name: unit.size for name, unit in by_name.items()}, max_shard_mib * 2**20)
    files = shard_names(len(groups))
    total = sum(unit.size for unit in units)
    written = 0
    done: list[str] = list(work.state().get("shards", []))
    for file, group in zip(files, groups, strict=True):
        if file not in done or not (directory / file).is_file():
            unfinished = directory / f".{file}.writing"
            with TensorWriter(unfinished, _shapes(by_name, group)) as writer:
                for name in group:
                    _write_unit(by_name[name], writer)
                    written += by_name[name].size
                    report.advance("exporting", written / 2**20, total / 2**20, "MiB")
            unfinished.rename(directory / file)
            done = sorted({*done, file})
            work.note(shards=done)
        else:
            written += sum(by_name[name].size for name in group)
            report.say(f"{file} was finished before")
    if len(files) > 1:
        named = [(file, _shapes(by_name, group)) for file, group in zip(files, groups, strict=True)]
        write_index(directory, named, total)


def _write_unit(unit: _Unit, writer: TensorWriter) -> None:
    # a function of its own: its tensors are gone before the next ones are read
    for name, tensor in unit.read().items():
        writer.write(name, tensor)


def _shapes(units: dict[str, _Unit], group: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {made: described for name in group for made, described in units[name].tensors.items()}
