"""The ``convert`` stage: a source artifact becomes a checkpoint in canonical names and one dtype.

A source that is quantized already (GPTQ, AWQ, compressed-tensors, ModelOpt FP8) becomes a quantized checkpoint: its
integers and scales keep their values, only the rest is cast. Streaming: one tensor is in memory at a time. A finished
shard is never written again, so an interrupted conversion resumes at the shard it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.memory import MemoryWatch
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import CheckpointBody, Dtype, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import CODES, DTYPES, TensorWriter, shard, shard_names, write_index
from trtllm_cli.convert.published import FILES, PublishedModel, open_published, quantized_layout
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.families import family_of
from trtllm_cli.models.families.base import Family
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch

    from trtllm_cli.quantize.interchange.plan import ImportPlan

_LISTED = 10
_CHUNK_ELEMENTS = 1024 * 1024


class ConvertOptions(StageOptions):
    """``dtype`` of what is not quantized; ``auto`` keeps the published one (bfloat16 for quantized GGUF files)."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_shard_mib: int = Field(default=2048, gt=0)


@dataclass(frozen=True)
class _Unit:
    """What is read and written in one go: a tensor, or all tensors of a quantized module."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[], dict[str, torch.Tensor]]

    @property
    def size(self) -> int:
        return sum(DTYPES[code][0] * _elements(shape) for code, shape in self.tensors.values())


def convert(
    source: Path,
    output: Path,
    config: Configured[ConvertOptions],
    *,
    force: bool = False,
    report: Reporter | None = None,
) -> Artifact:
    """Write the checkpoint. Raises BadInputError naming every missing, extra, misshapen or non-finite tensor."""
    report = report or Silent()
    parent = open_artifact(source, "source", full=True)
    with publish(output, request(parent, config), force=force) as work:
        if work.up_to_date is not None:
            return work.up_to_date
        model = open_published(parent)
        where = f"{source} ({'GGUF metadata' if parent.source.format == 'gguf' else 'config.json'})"
        family = family_of(model.config, where)
        spec = family.spec(model.config, where)
        plan = _import_plan(model, family, spec)
        names = _check_tensors(model, family, spec, plan, source)
        dtype = _dtype(config.options.dtype, model, names.values())
        tokenizer = _tokenizer(parent, model, work, report)
        if tokenizer is not None and tokenizer.vocab_size > spec.vocab_size:
            raise BadInputError(
                "TOKENIZER_MISMATCH",
                f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only {spec.vocab_size}",
                "check that tokenizer and weights belong together",
            )
        units = _units(model, spec, plan, names, dtype)
        with MemoryWatch() as memory:
            total = _write_shards(units, config.options.max_shard_mib, work, report)
        largest = max(_elements(shape) for shape in spec.tensor_shapes().values()) * 4 / 2**20
        report.say(
            f"peak memory {memory.above_baseline:.0f} MiB above the interpreter "
            f"(largest tensor: {largest:.0f} MiB in float32)"
        )
        record = plan.record() if plan is not None else None
        if record is not None:
            report.say(
                f"{len(record.layers)} modules stay quantized as published ({record.method}, "
                f"{record.bits_per_weight:.2f} bits a weight)"
            )
        body = CheckpointBody(
            spec=spec,
            dtype=dtype,
            tokenizer=tokenizer,
            quantization=record,
            parameters=sum(_elements(shape) for shape in spec.tensor_shapes().values()),
            weight_bytes=total,
        )
        return work.complete(
            body,
            {
                "peak_above_interpreter_mib": round(memory.above_baseline, 1),
                "largest_tensor_float32_mib": round(largest, 1),
            },
        )


def request(parent: Artifact, config: Configured[ConvertOptions]) -> Request:
    """What :func:`convert` makes of the source ``parent``; its id tells whether an output is up to date."""
    return Request("checkpoint", "convert", config, (parent,), _versions(parent))


def _versions(source: Artifact) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str] = {"torch": torch.__version__}
    if source.source.format == "gguf":
        try:
            versions["gguf"] = version("gguf")
        except PackageNotFoundError:
            versions["gguf"] = "missing"  # opening the file says what to install
    return versions


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _import_plan(model: PublishedModel, family: Family, spec: DecoderSpec) -> ImportPlan | None:
    layout = quantized_layout(model)
    if layout is None:
        return None
    from trtllm_cli.quantize.interchange.plan import ImportPlan

    return ImportPlan(layout, model, family, spec)


def _check_tensors(
    model: PublishedModel, family: Family, spec: DecoderSpec, plan: ImportPlan | None, source: Path
) -> dict[str, str]:
    """canonical -> published name of every unquantized tensor, or one error that lists all that is wrong."""
    quantized = {f"{module}.weight" for module in plan.linears} if plan is not None else set()
    names = {ours: theirs for ours, theirs in family.published_names(spec).items() if ours not in quantized}
    have = set(model.names())
    wrong: list[str] = []
    for canonical, shape in spec.tensor_shapes().items():
        if canonical in quantized:
            continue
        published = names[canonical]
        if published not in have:
            wrong.append(f"{published} is missing")
        elif tuple(model.shape(published)) != shape:
            wrong.append(f"{published} is {list(model.shape(published))}, expected {list(shape)}")
    needed = plan.needed() if plan is not None else {}
    for published, want in needed.items():
        if published not in have:
            wrong += [] if want.optional else [f"{published} is missing"]
        elif tuple(model.shape(published)) not in want.shapes:
            expected_shapes = " or ".join(str(list(shape)) for shape in want.shapes)
            wrong.append(f"{published} is {list(model.shape(published))}, expected {expected_shapes}")
        elif model.stored_type(published) not in want.types:
            wrong.append(f"{published} has type {model.stored_type(published)}, expected {' or '.join(want.types)}")
    expected = {*names.values(), *needed}
    wrong += [
        f"{name} is not part of a {family.name}" for name in sorted(have - expected) if not family.ignored(spec, name)
    ]
    if plan is not None and not wrong:
        wrong = plan.check_zeros(needed)
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise BadInputError(
            "TENSORS_WRONG",
            f"{source} does not hold the model its config describes: {'; '.join(wrong[:_LISTED])}{more}",
            "download the model again; if it is a variant, check config.json against the tensors",
        )
    return names


def _units(
    model: PublishedModel, spec: DecoderSpec, plan: ImportPlan | None, names: dict[str, str], dtype: Dtype
) -> dict[str, _Unit]:
    """Everything to write, in execution order."""

    def cast_tensor(name: str, published: str) -> dict[str, torch.Tensor]:
        return {name: _cast(model.tensor(published), dtype, published)}

    units: dict[str, _Unit] = {}
    for name, shape in spec.tensor_shapes().items():
        if name in names:
            units[name] = _Unit({name: (CODES[dtype], shape)}, partial(cast_tensor, name, names[name]))
        else:
            assert plan is not None
            module = name.removesuffix(".weight")
            units[name] = _Unit(plan.tensors(module), partial(plan.read, module))
    if plan is not None:
        for layer, scales in enumerate(plan.scales):
            for name in scales.names:

                def scale(layer: int = layer, name: str = name) -> dict[str, torch.Tensor]:
                    return {name: plan.read_scale(layer, name)}

                units[name] = _Unit({name: ("F32", (spec.num_kv_heads,))}, scale)
    return units


def _dtype(asked: str, model: PublishedModel, published: Iterable[str]) -> Dtype:
    if asked != "auto":
        return cast(Dtype, asked)
    sizes: dict[str, int] = {}
    for name in published:
        kind = model.stored_type(name)
        sizes[kind] = sizes.get(kind, 0) + _elements(model.shape(name))
    most = max(sizes, key=lambda kind: sizes[kind])
    kept: dict[str, Dtype] = {"F32": "float32", "F16": "float16"}
    return kept.get(most, "bfloat16")


def _tokenizer(source: Artifact, model: PublishedModel, work: Workspace, report: Reporter) -> TokenizerInfo | None:
    if source.source.format == "gguf":
        from trtllm_cli.convert.gguf_model import GgufModel
        from trtllm_cli.convert.gguf_tokenizer import write_gguf_tokenizer

        return write_gguf_tokenizer(cast(GgufModel, model), work.path)
    from trtllm_cli.convert.tokenizer_files import write_tokenizer

    return write_tokenizer(source.path / FILES, model.config, work.path, report)


def _write_shards(units: dict[str, _Unit], max_shard_mib: int, work: Workspace, report: Reporter) -> int:
    groups = shard({name: unit.size for name, unit in units.items()}, max_shard_mib * 2**20)
    files = shard_names(len(groups))
    total = sum(unit.size for unit in units.values())
    written = 0
    done: list[str] = list(work.state().get("shards", []))
    for file, group in zip(files, groups, strict=True):
        if file not in done or not work.file(file).is_file():
            partial_file = work.file(f".{file}.writing")
            with TensorWriter(partial_file, _shapes(units, group)) as writer:
                for name in group:
                    _write_unit(units[name], writer)
                    written += units[name].size
                    report.advance("converting", written / 2**20, total / 2**20, "MiB")
            partial_file.rename(work.file(file))
            done = sorted({*done, file})
            work.note(shards=done)
        else:
            written += sum(units[name].size for name in group)
            report.say(f"{file} was finished before")
    if len(files) > 1:
        write_index(
            work.path, [(file, _shapes(units, group)) for file, group in zip(files, groups, strict=True)], total
        )
    return total


def _write_unit(unit: _Unit, writer: TensorWriter) -> None:
    # a function of its own: its tensors are gone before the next ones are read
    for name, tensor in unit.read().items():
        writer.write(name, tensor)


def _shapes(units: dict[str, _Unit], group: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {made: described for name in group for made, described in units[name].tensors.items()}


def _cast(tensor: torch.Tensor, dtype: Dtype, name: str) -> torch.Tensor:
    """To the target dtype, piece by piece; every value must be finite before and after."""
    import torch

    # the 8-bit floats of quantized checkpoints mean nothing without their scales
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise BadInputError(
            "TENSOR_TYPE",
            f"tensor {name} has type {tensor.dtype}, not a float of 16 bits or more",
            "the model may be quantized already",
        )
    target = getattr(torch, dtype)
    flat = tensor.reshape(-1)
    result = flat if tensor.dtype == target else torch.empty(flat.shape, dtype=target)
    for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
        piece = flat[begin : begin + _CHUNK_ELEMENTS]
        if not bool(torch.isfinite(piece).all()):
            bad = int((~torch.isfinite(flat.float())).sum())
            raise BadInputError(
                "TENSOR_NOT_FINITE",
                f"tensor {name} has {bad} NaN or infinite values of {flat.numel()}",
                "the published file is damaged or from a diverged run; download it again or use another revision",
            )
        if result is not flat:
            result[begin : begin + _CHUNK_ELEMENTS] = piece
            if not bool(torch.isfinite(result[begin : begin + _CHUNK_ELEMENTS]).all()):
                raise BadInputError(
                    "TENSOR_OVERFLOW",
                    f"tensor {name} has values up to {float(piece.abs().max()):.3g}, beyond the range of {dtype}",
                    "trtllm-cli convert ... --dtype bfloat16",
                )
    return result.reshape(tensor.shape)
