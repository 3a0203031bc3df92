"""What differs between two artifacts: options, versions, tensors, sizes, measured quality."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue

from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody, Manifest, ReportBody
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorEntry, TensorFile
from trtllm_cli.models.spec import Frozen


class Difference(Frozen):
    """One thing: where it stands (``config.dtype``), and its value on either side (None: absent)."""

    section: str
    name: str
    a: JsonValue
    b: JsonValue


def differences(a: Artifact, b: Artifact) -> list[Difference]:
    """Everything that differs, most telling first. Empty for equal content."""
    found: list[Difference] = []

    def compare(section: str, left: dict[str, Any], right: dict[str, Any]) -> None:
        for name in sorted(set(left) | set(right)):
            if left.get(name) != right.get(name):
                found.append(Difference(section=section, name=name, a=left.get(name), b=right.get(name)))

    compare("artifact", _identity(a.manifest), _identity(b.manifest))
    compare("config", _config(a.manifest), _config(b.manifest))
    compare("versions", a.manifest.versions, b.manifest.versions)
    compare("model", _model(a.manifest), _model(b.manifest))
    compare("quantization", _quantization(a.manifest), _quantization(b.manifest))
    compare("quality", _quality(a.manifest), _quality(b.manifest))
    compare("tensors", _tensors(a), _tensors(b))
    compare("files", _files(a.manifest), _files(b.manifest))
    return found


def _identity(manifest: Manifest) -> dict[str, Any]:
    parents = ", ".join(parent.id[:12] for parent in manifest.parents)
    return {"kind": manifest.kind, "stage": manifest.stage, "id": manifest.id[:12], "parents": parents}


def _config(manifest: Manifest) -> dict[str, Any]:
    return {key: setting.value for key, setting in manifest.config.items()}


def _model(manifest: Manifest) -> dict[str, Any]:
    body = manifest.body
    if not isinstance(body, (CheckpointBody, EngineBody)):
        return {}
    facts = {**body.spec.model_dump(mode="json"), "dtype": body.dtype}
    if isinstance(body, EngineBody):
        facts |= {"backend": body.backend, "executor": body.executor, **body.limits.model_dump(), **body.tactics}
    else:
        facts["weight_bytes"] = body.weight_bytes
    return facts


def _quantization(manifest: Manifest) -> dict[str, Any]:
    body = manifest.body
    if not isinstance(body, (CheckpointBody, EngineBody)) or body.quantization is None:
        return {}
    record = body.quantization
    facts: dict[str, Any] = {"method": record.method, "bits_per_weight": record.bits_per_weight}
    for layer in record.layers:
        group = f" g{layer.scheme.group_size}" if layer.scheme.group_size else ""
        form = "" if layer.scheme.symmetric else " asymmetric"
        error = "unknown" if layer.relative_error is None else f"{layer.relative_error:.5f}"
        facts[layer.module] = f"{layer.scheme.type}{group}{form}, relative error {error}"
    return facts


def _quality(manifest: Manifest) -> dict[str, Any]:
    body = manifest.body
    results = body.results if isinstance(body, ReportBody) else body.quality if isinstance(body, CheckpointBody) else ()
    facts: dict[str, Any] = {}
    for result in results:
        if result.type == "perplexity":
            facts[f"perplexity ({_protocol(result.protocol.model_dump())})"] = round(result.perplexity, 4)
        elif result.type == "divergence":
            facts[f"KL divergence ({_protocol(result.protocol.model_dump())})"] = round(result.mean, 6)
        elif result.type == "task":
            facts[f"{result.name} ({result.tasks} tasks)"] = round(result.accuracy, 4)
        elif result.type == "blame":
            facts[f"KL divergence of all parts ({_protocol(result.protocol.model_dump())})"] = round(result.together, 6)
        else:
            facts[f"decode tokens/s (batch {result.batch})"] = round(result.decode_tokens_per_s, 1)
    return facts


def _protocol(facts: dict[str, Any]) -> str:
    # figures of different protocols get different names, so that they never stand side by side
    return f"{facts['windows']} x {facts['context']}/{facts['stride']}, text {facts['text_sha256'][:8]}"


def _tensors(artifact: Artifact) -> dict[str, Any]:
    def text(entry: TensorEntry) -> str:
        return f"{entry.dtype} {list(entry.shape)}"

    found: dict[str, Any] = {}
    for file in artifact.manifest.files:
        if file.path.endswith(".safetensors"):
            tensors = TensorFile(artifact.path / file.path)
            found |= {name: text(entry) for name, entry in tensors.entries.items()}
    return found


def _files(manifest: Manifest) -> dict[str, Any]:
    return {entry.path: f"{entry.size} bytes, sha256 {entry.sha256[:12]}" for entry in manifest.files}
