"""What each stage would make: the same request, hence the same id, as the stage itself computes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_cli.artifacts.config import Configured
from trtllm_cli.artifacts.publish import Request
from trtllm_cli.artifacts.schema import EngineBody, Manifest
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.build.cpu import stage as cpu
from trtllm_cli.convert import stage as convert
from trtllm_cli.download.folder import resolve_folder
from trtllm_cli.download.gguf_file import resolve_gguf
from trtllm_cli.download.hub import already_there
from trtllm_cli.download.known import KnownHub
from trtllm_cli.download.package import resolve_package
from trtllm_cli.download.reference import FolderReference, GgufReference, HubReference, KnownReference
from trtllm_cli.download.resolved import Resolved
from trtllm_cli.evaluate.hardware import hardware, library_versions
from trtllm_cli.evaluate.tasks import read_tasks
from trtllm_cli.pipeline.load import Step
from trtllm_cli.pipeline.schema import BuildStage
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize import stage as quantize


@dataclass(frozen=True)
class Asked:
    """What a download would make, and its size in bytes; both None where only asking the network can tell."""

    request: Request | None
    bytes: int | None


def download_request(step: Step, existing: Manifest | None, report: Reporter) -> Asked:
    """Without asking the network. ``existing`` is what lies at the output; a known model may have made it already."""

    def of(resolved: Resolved) -> Request:
        return Request(kind="source", stage="download", config=step.config, identity=resolved.identity)

    reference = step.reference
    if isinstance(reference, (FolderReference, GgufReference)):
        resolve = resolve_folder if isinstance(reference, FolderReference) else resolve_gguf
        resolved = resolve(reference.path, report)
        return Asked(of(resolved), resolved.bytes)
    if isinstance(reference, HubReference):
        there = already_there(reference, existing, any_commit=False) if existing is not None else None
        return Asked(of(there) if there is not None else None, None)
    if not isinstance(reference, KnownReference):
        raise TypeError(f"{step.name} is not a download")
    candidates: list[Resolved | None] = []
    for source in reference.model.sources:
        if not isinstance(source, KnownHub):
            candidates.append(resolve_package(source, reference.model.name, offline=True))
        elif existing is not None:
            candidates.append(already_there(HubReference(source.repo, source.revision), existing, any_commit=True))
    for candidate in candidates:
        if candidate is not None and existing is not None and of(candidate).id == existing.id:
            return Asked(of(candidate), candidate.bytes)
    # with a single source that is a package everything is known; otherwise it depends on which one answers
    only = candidates[0] if len(reference.model.sources) == 1 and candidates else None
    return Asked(of(only), only.bytes) if only is not None else Asked(None, None)


def stage_request(step: Step, parents: Sequence[Artifact], report: Reporter) -> Request | None:
    """The request of any other stage; None where only the stage itself can tell (TensorRT).

    Raises what the stage raises for input files and options.
    """
    config: Configured[Any] = step.config
    kind = step.stage.stage
    if kind == "convert":
        return convert.request(parents[0], config)
    if kind == "quantize":
        return quantize.request(parents[0], config, report)
    if kind == "build":
        if isinstance(step.stage, BuildStage) and step.stage.backend == "tensorrt":
            return None
        return cpu.request(parents[0], config, report)
    if any(isinstance(one.manifest.body, EngineBody) and one.engine.backend == "tensorrt" for one in parents):
        return None
    if kind == "bench":
        identity: dict[str, Any] = {"hardware": hardware().model_dump(mode="json")}
        return Request("report", "bench", config, tuple(parents), library_versions(), identity)
    options = config.options
    # the same digests as evaluate.stage takes; were they to differ, the stage would look for itself and be slower
    digest = hashlib.sha256(options.text.read_bytes()).hexdigest() if options.text is not None else None
    tasks = [[file.name, file.sha256] for file in (read_tasks(path, options.limit) for path in options.tasks)]
    identity = {"text_sha256": digest, "tasks": tasks}
    return Request("report", "eval", config, tuple(parents), library_versions(), identity)
