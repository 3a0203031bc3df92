"""``trtllm-cli inspect``, ``verify``, ``diff`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.cli.options import Debug, Json
from trtllm_cli.cli.output import Output

if TYPE_CHECKING:
    from trtllm_cli.artifacts.schema import Ancestor, EngineBody, Manifest
    from trtllm_cli.artifacts.store import Artifact

_SHOWN_PER_SECTION = 12


def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="Any artifact.", show_default=False)],
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="List every quantized module with its error, or what TensorRT made of each module."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact is, what it was made from and with which options."""
    from trtllm_cli.artifacts.store import MEASUREMENTS, open_artifact

    found = open_artifact(artifact)
    manifest = found.manifest
    columns, rows = _layers(manifest) if layers else ([], [])
    with Output(as_json) as out:
        out.line(f"{manifest.kind} {manifest.id}")
        out.line(f"made by {manifest.stage}, trtllm-cli {manifest.versions.get('trtllm-cli', '?')}")
        for line in _body(found):
            out.line(line)
        out.line("options")
        for name, setting in manifest.config.items():
            out.line(f"  {name} = {json.dumps(setting.value)}  ({setting.origin})")
        out.line("lineage")
        out.line(f"  {manifest.kind} {manifest.id[:12]}")
        for parent in manifest.parents:
            _lineage(out, parent, 1)
        out.line("files")
        for entry in manifest.files:
            out.line(f"  {entry.size:>12}  {entry.sha256[:12]}  {entry.path}")
        measured = found.path / MEASUREMENTS
        if measured.is_file():
            out.line(f"measured while writing: {', '.join(f'{k} {v}' for k, v in _read(measured).items())}")
        out.table(columns, rows)
        out.result(manifest.model_dump(mode="json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return data


def _body(artifact: Artifact) -> list[str]:
    from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody, ReportBody, SourceBody
    from trtllm_cli.cli.evaluate import describe

    body = artifact.manifest.body
    if isinstance(body, SourceBody):
        return [f"{body.format} from {body.origin.kind}: {body.origin.reference}"]
    if isinstance(body, ReportBody):
        return [line for result in body.results for line in describe(result)]
    spec = body.spec
    lines = [
        f"{spec.family}: {spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_heads} heads "
        f"({spec.num_kv_heads} key/value) of {spec.head_dim}, vocabulary {spec.vocab_size}, "
        f"{spec.max_positions} positions, {body.dtype}"
    ]
    if body.quantization is not None:
        record = body.quantization
        by = record.method if record.provider == "trtllm-cli" else f"{record.method} ({record.provider})"
        lines.append(f"quantized by {by}: {len(record.layers)} modules, {record.bits_per_weight:.2f} bits a weight")
        if record.calibration is not None:
            seen = record.calibration
            lines.append(
                f"calibrated on {seen.rows} rows of {seen.length} tokens ({seen.source}, digest {seen.digest[:12]})"
            )
        if record.kv_cache is not None:
            lines.append(f"key/value cache: {record.kv_cache.type}, a scale per {record.kv_cache.granularity}")
    if isinstance(body, CheckpointBody):
        lines.append(f"{body.parameters / 1e6:.1f} M parameters, {body.weight_bytes / 2**20:.1f} MiB of weights")
        lines += [line for result in body.quality for line in describe(result)]
    if isinstance(body, EngineBody):
        limits = body.limits
        lines.append(
            f"{body.backend} engine for executor {body.executor}: context {limits.context}, "
            f"concurrency {limits.concurrency}, weights {limits.weight_bytes / 2**20:.1f} MiB, "
            f"cache {limits.cache_bytes / 2**20:.1f} MiB"
        )
        if body.backend == "tensorrt":
            lines += _profiles(body)
        lines += [f"needs {need.name} {need.value}: {need.reason}" for need in body.requirements]
    return lines


def _profiles(engine: EngineBody) -> list[str]:
    """What each optimization profile of a plan takes and became."""
    from trtllm_cli.artifacts.tensorrt import tensorrt_tactics

    lines = []
    for profile in tensorrt_tactics(engine).profiles:
        sizes = ", ".join(
            f"{name} {least}" if least == most else f"{name} {least}..{most}"
            for name, (least, _, most) in (("batch", profile.batch), ("tokens", profile.tokens))
        )
        attention = ", ".join(f"{count} {name}" for name, count in profile.attention.items()) or "not fused"
        products = ", ".join(f"{count} {what}" for what, count in profile.products.items()) or "unknown"
        fell = f", {len(profile.fallbacks)} modules fell back (see --layers)" if profile.fallbacks else ""
        lines.append(
            f"{profile.name}: {sizes}, {profile.kernels} kernels, attention {attention}, products {products},"
            f" activations {profile.scratch_bytes / 2**20:.0f} MiB{fell}"
        )
    return lines


def _lineage(out: Output, ancestor: Ancestor, depth: int) -> None:
    options = ", ".join(
        f"{key} {json.dumps(value)}" for key, value in ancestor.config.items() if value not in (None, [])
    )
    out.line(f"  {'  ' * depth}<- {ancestor.kind} {ancestor.id[:12]} by {ancestor.stage} ({options})")
    for parent in ancestor.parents:
        _lineage(out, parent, depth + 1)


def _layers(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: of a TensorRT engine what each module became, else how each was quantized."""
    from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody
    from trtllm_cli.errors import UsageError

    body = manifest.body
    if isinstance(body, EngineBody) and body.backend == "tensorrt":
        from trtllm_cli.artifacts.tensorrt import kernels_by_module, tensorrt_tactics

        names = [profile.name for profile in tensorrt_tactics(body).profiles]
        return ["module", *names], [[module, *kinds] for module, kinds in kernels_by_module(body).items()]
    if not isinstance(body, (CheckpointBody, EngineBody)) or body.quantization is None:
        raise UsageError("OPTION_UNUSED", "--layers has no effect: the artifact is not quantized", "leave it out")
    rows = [
        [
            layer.module,
            layer.method or body.quantization.method,
            layer.scheme.type + ("" if layer.scheme.symmetric else " asymmetric"),
            str(layer.scheme.group_size or layer.scheme.granularity),
            "-" if layer.activation is None else f"{layer.activation.type} per {layer.activation.granularity}",
            "-" if layer.relative_error is None else f"{layer.relative_error:.5f}",
            "-" if layer.output_error is None else f"{layer.output_error:.5f}",
            layer.note or "",
        ]
        for layer in body.quantization.layers
    ]
    return ["module", "method", "weights", "scale per", "inputs", "relative error", "output error", "note"], rows


def verify_command(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts to check.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hash every file again and compare with the manifest."""
    from trtllm_cli.artifacts.store import Artifact, problems, read_manifest
    from trtllm_cli.errors import BadInputError

    with Output(as_json) as out:
        found: dict[str, list[str]] = {}
        for path in artifacts:
            artifact = Artifact(path, read_manifest(path))
            found[str(path)] = list(problems(artifact))
            if not found[str(path)]:
                out.line(f"{path}: whole ({len(artifact.manifest.files)} files, {artifact.kind} {artifact.id[:12]})")
            for problem in found[str(path)]:
                out.line(f"{path}: {problem}")
        damaged = [path for path, wrong in found.items() if wrong]
        if damaged:
            raise BadInputError(
                "ARTIFACT_DAMAGED",
                "; ".join(f"{path}: {found[path][0]}" for path in damaged),
                "repeat the stage that wrote it with --force",
            )
        out.result({"status": "whole", "artifacts": list(found)})


def diff_command(
    a: Annotated[Path, typer.Argument(help="One artifact.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other.", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Do not shorten long sections.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two artifacts: options, versions, model, quantization, quality, tensors, files."""
    from trtllm_cli.artifacts.difference import differences
    from trtllm_cli.artifacts.store import open_artifact

    with Output(as_json) as out:
        found = differences(open_artifact(a), open_artifact(b))
        if not found:
            out.line("no difference")
        for section in dict.fromkeys(item.section for item in found):
            items = [item for item in found if item.section == section]
            out.line(f"{section} ({len(items)} differ)")
            for item in items if everything else items[:_SHOWN_PER_SECTION]:
                out.line(f"  {item.name}: {_short(item.a)} | {_short(item.b)}")
            if not everything and len(items) > _SHOWN_PER_SECTION:
                out.line(f"  and {len(items) - _SHOWN_PER_SECTION} more (--all)")
        out.result({"differences": [item.model_dump(mode="json") for item in found]})


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def schema_command(
    directory: Annotated[Path, typer.Argument(help="Directory for the JSON Schema files.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the JSON Schemas of manifests, reports and pipelines."""
    from trtllm_cli.artifacts.publish import as_user_error, write_atomic
    from trtllm_cli.cli.schemas import json_schemas

    with Output(as_json) as out:
        names = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, schema in json_schemas().items():
                write_atomic(directory / name, schema)
                names.append(name)
        except OSError as error:
            raise as_user_error(error, directory) from error
        out.line(f"{len(names)} schemas in {directory}: {', '.join(names)}")
        out.result({"directory": str(directory), "files": names})
