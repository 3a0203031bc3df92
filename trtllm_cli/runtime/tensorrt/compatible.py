"""Whether a plan runs here, said before it is loaded: from the engine's manifest, the plan's header and the GPU.

TensorRT itself answers a plan that it cannot open with "no", at best with a bit mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_cli.artifacts.schema import EngineBody
from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UserError

#: import name -> the distribution to install
DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt"}
_CPU = "trtllm-cli build CHECKPOINT -o OUT --backend cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it: ``capability`` such as 8.9, memory in bytes."""

    name: str
    capability: str
    total: int
    free: int


def find_gpu() -> Gpu | None:
    """The GPU that torch would use, None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}", total, free)


def required(engine: EngineBody, name: str) -> str | None:
    """What a requirement of the engine's manifest says, None where it has none of the name."""
    return next((one.value for one in engine.requirements if one.name == name), None)


def require_version(path: Path, engine: EngineBody, trt: TensorRT, written_by: str) -> None:
    """Raises UnsupportedError where another version of TensorRT wrote the plan, which only opens its own."""
    if written_by != trt.version:
        recorded = required(engine, engine.executor)
        also = "" if recorded in (None, written_by) else f" (its manifest says {recorded})"
        raise UnsupportedError(
            "PLAN_VERSION",
            f"the plan of {path} was written by version {written_by} of {engine.executor}{also}, {trt.version} is"
            " installed, and a plan opens only in the version that wrote it",
            f"pip install {DISTRIBUTIONS[trt.package]}=={written_by}, or repeat `trtllm-cli build` with --force",
        )


def require_gpu(path: Path, gpu: Gpu | None) -> Gpu:
    """Raises UnsupportedError on a machine without a GPU."""
    if gpu is not None:
        return gpu
    import torch

    why = "this machine has none that torch can use" if torch.version.cuda else "the torch installed here has no CUDA"
    raise UnsupportedError(
        "GPU_MISSING",
        f"{path} is a TensorRT engine, which runs on an NVIDIA GPU; {why}",
        f"add --executor reference (slow: for checks), or {_CPU}",
    )


def require_target(path: Path, engine: EngineBody, gpu: Gpu) -> str | None:
    """Compare the GPU with what the plan was compiled for.

    Raises UnsupportedError for a GPU older than any of these. For one that is newer, or between them, the runtime must
    decide: returns a sentence to say if it agrees.
    """
    targets = (required(engine, "compute_capability") or "").split()
    if not targets or gpu.capability in targets or not all(_is_capability(one) for one in targets):
        return None
    named = f"{gpu.name} (compute capability {gpu.capability})"
    if _number(gpu.capability) < min(map(_number, targets)):
        raise UnsupportedError(
            "GPU_OLDER_THAN_TARGETS",
            f"the plan of {path} was compiled for compute capabilities {', '.join(targets)}, and this GPU is older:"
            f" {named}",
            f"repeat `trtllm-cli build` with --target sm{_number(gpu.capability)}",
        )
    return f"note: the plan was compiled for compute capabilities {', '.join(targets)}, not for this {named}"


def require_valid(path: Path, trt: TensorRT, runtime: Any, header: bytes, gpu: Gpu) -> str | None:
    """Ask the runtime, where it can be asked. Raises UserError with its reason in words.

    A GPU that is not on its list may run the plan all the same (1.6.1 calls 9.0 unsupported, and runs there), so that
    is no reason yet: returns a sentence to say before trying.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, bits = runtime.get_engine_validity(header)
    if validity != trt.api.EngineValidity.INVALID:
        return None
    members = trt.api.EngineInvalidityDiagnostics.__members__
    reasons = {name for name, value in members.items() if int(value) & int(bits)}
    if reasons == {"UNSUPPORTED_CC"}:
        return f"note: {trt.title} does not list compute capability {gpu.capability} ({gpu.name}) as supported; trying"
    raise refusal(path, trt, gpu, reasons)


def refusal(path: Path, trt: TensorRT, gpu: Gpu, reasons: set[str]) -> UserError:
    """The error for the runtime's reasons, the most telling one first."""
    if "MALFORMED_ENGINE" in reasons:
        return BadInputError(
            "PLAN_DAMAGED", f"{trt.title} says that the plan of {path} is not well-formed", f"trtllm-cli verify {path}"
        )
    if "VERSION_MISMATCH" in reasons:
        return UnsupportedError(
            "PLAN_VERSION",
            f"the plan of {path} was written by another version of TensorRT than the {trt.version} installed here",
            "repeat `trtllm-cli build` with --force",
        )
    if "UNSUPPORTED_CC" in reasons:
        return UnsupportedError(
            "GPU_UNSUPPORTED",
            f"{trt.title} does not run the plan of {path} on this {gpu.name} (compute capability {gpu.capability})",
            f"repeat `trtllm-cli build` with --target sm{_number(gpu.capability)} if it has that target, or {_CPU}",
        )
    if reasons & {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"}:
        return UnsupportedError(
            "CUDA_TOO_OLD", f"{trt.title} needs a newer CUDA driver than this machine has", "update the NVIDIA driver"
        )
    if "INSUFFICIENT_GPU_MEMORY" in reasons:
        return DoesNotFitError(
            "GPU_MEMORY",
            f"the plan of {path} does not fit the GPU's memory ({gpu.free >> 20} MiB of {gpu.total >> 20} MiB free)",
            "free GPU memory, or quantize the model",
        )
    told = ", ".join(sorted(reasons)) or "no reason given"
    return UnsupportedError(
        "PLAN_REFUSED",
        f"{trt.title} does not accept the plan of {path} on this {gpu.name} ({told})",
        f"trtllm-cli verify {path}, then repeat `trtllm-cli build` with --force",
    )


def require_memory(path: Path, engine: EngineBody, gpu: Gpu) -> None:
    """Raises DoesNotFitError where weights, caches and activations together exceed the memory that is free."""
    limits = engine.limits
    needs = limits.weight_bytes + limits.cache_bytes + limits.scratch_bytes
    if needs > gpu.free:
        raise DoesNotFitError(
            "GPU_MEMORY",
            f"{path} needs {needs >> 20} MiB of GPU memory (weights {limits.weight_bytes >> 20}, caches"
            f" {limits.cache_bytes >> 20}, activations {limits.scratch_bytes >> 20}); {gpu.free >> 20} of"
            f" {gpu.total >> 20} MiB are free on this {gpu.name}",
            "free GPU memory, or build with a smaller --context or --concurrency, or quantize the model",
        )


def _number(capability: str) -> int:
    major, _, minor = capability.partition(".")
    return 10 * int(major) + int(minor)


def _is_capability(text: str) -> bool:
    major, _, minor = text.partition(".")
    return major.isdecimal() and minor.isdecimal()
