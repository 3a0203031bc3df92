"""The ``convert`` stage: a source artifact becomes a checkpoint in canonical names and one dtype.

Streaming: one tensor is in memory at a time. A finished shard is never written again, so an interrupted conversion
resumes at the shard it was in.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from trtllm_cli.artifacts.config import Configured, StageOptions
from trtllm_cli.artifacts.memory import MemoryWatch
from trtllm_cli.artifacts.publish import Request, Workspace, publish
from trtllm_cli.artifacts.schema import CheckpointBody, Dtype, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.artifacts.tensors import CODES, DTYPES, TensorWriter, shard, shard_names, write_index
from trtllm_cli.convert.published import FILES, PublishedModel, open_published
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.families import family_of
from trtllm_cli.models.families.base import Family
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch

_LISTED = 10
_CHUNK_ELEMENTS = 1024 * 1024


class ConvertOptions(StageOptions):
    """``dtype`` of the checkpoint; ``auto`` keeps the published one (bfloat16 for quantized GGUF files)."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_shard_mib: int = Field(default=2048, gt=0)


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
        names = _check_tensors(model, family, spec, source)
        dtype = _dtype(config.options.dtype, model, names.values())
        tokenizer = _tokenizer(parent, model, work, report)
        if tokenizer is not None and tokenizer.vocab_size > spec.vocab_size:
            raise BadInputError(
                "TOKENIZER_MISMATCH",
                f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only {spec.vocab_size}",
                "check that tokenizer and weights belong together",
            )
        with MemoryWatch() as memory:
            total = _write_shards(model, spec, names, dtype, config.options.max_shard_mib, work, report)
        largest = max(_elements(shape) for shape in spec.tensor_shapes().values()) * 4 / 2**20
        report.say(
            f"peak memory {memory.above_baseline:.0f} MiB above the interpreter "
            f"(largest tensor: {largest:.0f} MiB in float32)"
        )
        body = CheckpointBody(
            spec=spec,
            dtype=dtype,
            tokenizer=tokenizer,
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


def _check_tensors(model: PublishedModel, family: Family, spec: DecoderSpec, source: Path) -> dict[str, str]:
    """canonical -> published name of every tensor, or one error that lists all that is wrong."""
    names = family.published_names(spec)
    have = set(model.names())
    wrong: list[str] = []
    for canonical, shape in spec.tensor_shapes().items():
        published = names[canonical]
        if published not in have:
            wrong.append(f"{published} is missing")
        elif tuple(model.shape(published)) != shape:
            wrong.append(f"{published} is {list(model.shape(published))}, expected {list(shape)}")
    expected = set(names.values())
    wrong += [
        f"{name} is not part of a {family.name}" for name in sorted(have - expected) if not family.ignored(spec, name)
    ]
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise BadInputError(
            "TENSORS_WRONG",
            f"{source} does not hold the model its config describes: {'; '.join(wrong[:_LISTED])}{more}",
            "download the model again; if it is a variant, check config.json against the tensors",
        )
    return names


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


def _write_shards(
    model: PublishedModel,
    spec: DecoderSpec,
    names: dict[str, str],
    dtype: Dtype,
    max_shard_mib: int,
    work: Workspace,
    report: Reporter,
) -> int:
    code = CODES[dtype]
    shapes = spec.tensor_shapes()
    sizes = {name: _elements(shape) * DTYPES[code][0] for name, shape in shapes.items()}
    groups = shard(sizes, max_shard_mib * 2**20)
    files = shard_names(len(groups))
    total = sum(sizes.values())
    written = 0
    done: list[str] = list(work.state().get("shards", []))
    for file, group in zip(files, groups, strict=True):
        if file not in done or not work.file(file).is_file():
            partial = work.file(f".{file}.writing")
            with TensorWriter(partial, {name: (code, shapes[name]) for name in group}) as writer:
                for name in group:
                    writer.write(name, _cast(model.tensor(names[name]), dtype, names[name]))
                    written += sizes[name]
                    report.advance("converting", written / 2**20, total / 2**20, "MiB")
            partial.rename(work.file(file))
            done = sorted({*done, file})
            work.note(shards=done)
        else:
            written += sum(sizes[name] for name in group)
            report.say(f"{file} was finished before")
    if len(files) > 1:
        write_index(work.path, list(zip(files, groups, strict=True)), total)
    return total


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
