"""A plan opened on a GPU by TensorRT: its execution contexts, and the kernels they compile, kept for the next start."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from trtllm_cli.artifacts.schema import EngineBody
from trtllm_cli.artifacts.tensorrt import TensorRTTactics
from trtllm_cli.build.tensorrt.errors import Complaints, logger
from trtllm_cli.build.tensorrt.module import TensorRT
from trtllm_cli.build.tensorrt.plan import read_header
from trtllm_cli.errors import BadInputError, DoesNotFitError, UserError
from trtllm_cli.progress import Reporter
from trtllm_cli.runtime.tensorrt import compatible
from trtllm_cli.runtime.tensorrt.kernels import KernelFile
from trtllm_cli.runtime.tensorrt.memory import Memory

#: bytes of a plan from which its validity can be told
_HEADER_BYTES = 64
#: how kernels are specialised for the shapes of prompts and of generation steps; see :class:`PlanSession`
SPECIALISATION = ("NONE", "EAGER")
_MEMORY = ("out of memory", "OutOfMemory", "cudaError 2:", "cudaErrorMemoryAllocation")


class PlanSession:
    """See :class:`trtllm_cli.runtime.tensorrt.executor.Session`.

    All contexts share one block of activation memory, since they run one after another on one stream. Kernels for the
    shapes of a generation profile, which always has the same, are compiled when its context is made; those of prompts,
    of any length, are the plan's general ones, because compiling takes longer than a prompt does.
    """

    def __init__(
        self, engine: Any, runtime: Any, trt: TensorRT, complaints: Complaints, memory: Memory, kernels: KernelFile
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._trt = trt
        self._complaints = complaints
        self._memory = memory
        self._kernels = kernels
        self._cache: Any = None
        self._gpu = torch.cuda.get_device_name()
        try:
            self._scratch = memory.zeros((max(int(engine.device_memory_size_v2), 1),), torch.uint8)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                "GPU_MEMORY",
                f"activations of {int(engine.device_memory_size_v2) >> 20} MiB do not fit the GPU's memory",
                "free GPU memory, or build the engine with a smaller --context or --concurrency",
            ) from error

    def context(self, profile: int) -> Any:
        api, engine = self._trt.api, self._engine
        user_managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            if hasattr(config, "create_runtime_cache"):
                strategies = api.DynamicShapesKernelSpecializationStrategy
                strategy = getattr(strategies, SPECIALISATION[min(profile, 1)])
                config.dynamic_shapes_kernel_specialization_strategy = strategy
                if self._cache is None:
                    self._cache = config.create_runtime_cache()
                    if not self._kernels.load_into(self._cache):
                        self._complaints.take()  # of a file that it did not take, which is no error
                config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(user_managed)
        if context is None:
            raise self._refused("made no execution context")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        if not context.set_optimization_profile_async(profile, self._memory.stream):
            raise self._refused(f"has no profile {profile}")
        return context

    def complaints(self) -> str:
        return self._complaints.take()

    def settled(self) -> None:
        if self._cache is not None:
            self._kernels.save(self._cache)

    def describe(self) -> dict[str, Any]:
        return {
            "executor": self._trt.package,
            "version": self._trt.version,
            "gpu": self._gpu,
            "torch": torch.__version__,
            "kernels": str(self._kernels.path),
        }

    def close(self) -> None:
        self.settled()
        self._cache = None
        self._engine = None
        self._runtime = None

    def _refused(self, what: str) -> UserError:
        reason = self.complaints() or "no reason given"
        if any(sign in reason for sign in _MEMORY):
            return DoesNotFitError(
                "GPU_MEMORY", f"the engine {what}: {reason}", "free GPU memory, or quantize the model"
            )
        return BadInputError("ENGINE_REFUSED", f"the engine {what}: {reason}", "repeat `trtllm-cli build` with --force")


def open_plan(
    path: Path,
    plan: Path,
    engine: EngineBody,
    tactics: TensorRTTactics,
    trt: TensorRT,
    memory: Memory,
    gpu: compatible.Gpu,
    kernels: KernelFile,
    report: Reporter,
) -> PlanSession:
    """Load the plan of the engine at ``path`` on the GPU.

    Raises UserError with the reason in words for whatever keeps it from running; what can be known without loading is
    said without loading.
    """
    compatible.require_version(path, engine, trt, read_header(plan).version)
    note = compatible.require_target(path, engine, gpu)
    compatible.require_memory(path, engine, gpu)
    complaints = Complaints(trt)
    runtime = trt.api.Runtime(logger(trt))
    runtime.error_recorder = complaints.recorder
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        unlisted = compatible.require_valid(path, trt, runtime, mapped[:_HEADER_BYTES], gpu)
        if unlisted or note:
            report.say(unlisted or note or "")
        loaded = runtime.deserialize_cuda_engine(mapped)
    if loaded is None:
        reason = complaints.take() or "no reason given"
        if any(sign in reason for sign in _MEMORY):
            raise DoesNotFitError(
                "GPU_MEMORY",
                f"loading {path} ran out of GPU memory: {reason}",
                "free GPU memory, or quantize the model",
            )
        if unlisted:
            raise compatible.refusal(path, trt, gpu, {"UNSUPPORTED_CC"})
        raise BadInputError(
            "PLAN_REFUSED", f"{trt.title} could not load the plan of {path}: {reason}", f"trtllm-cli verify {path}"
        )
    if loaded.num_optimization_profiles != len(tactics.profiles):
        raise BadInputError(
            "PLAN_FOREIGN",
            f"the plan of {path} has {loaded.num_optimization_profiles} profiles, its manifest says"
            f" {len(tactics.profiles)}",
            f"trtllm-cli verify {path}",
        )
    return PlanSession(loaded, runtime, trt, complaints, memory, kernels)
