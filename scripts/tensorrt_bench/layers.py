"""Where the time of a generation step goes: TensorRT's own profiler, kernels put together by what they do.

The profiler brackets every kernel with events, so its sum is longer than a step: the shares count, not the total.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from typing import Any

import torch

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.build import LAYERS, PLAN
from trtllm_cli.build.tensorrt.log import Kernel, PlanFacts
from trtllm_cli.build.tensorrt.module import load_package
from trtllm_cli.build.tensorrt.network import cache_names, updated
from trtllm_cli.models.decoder import head
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Silent
from trtllm_cli.runtime.tensorrt import compatible
from trtllm_cli.runtime.tensorrt.kernels import KernelFile
from trtllm_cli.runtime.tensorrt.memory import Memory
from trtllm_cli.runtime.tensorrt.passes import reach
from trtllm_cli.runtime.tensorrt.plan import open_plan

#: kernels listed by name
_LISTED = 12
_STEPS = 7


def layers(artifact: Artifact, batch: int, position: int) -> dict[str, Any]:
    """Milliseconds of a step of ``batch`` sequences at ``position``, by part of the model; and the slowest kernels."""
    engine = artifact.engine
    tactics = tensorrt_tactics(engine)
    index = tactics.generation(batch)
    trt = load_package(engine.executor, "profiling", "pip install 'trtllm-cli[tensorrt]'")
    gpu = compatible.require_gpu(artifact.path, compatible.find_gpu())
    memory = Memory(torch.device("cuda", torch.cuda.current_device()))
    kernels = KernelFile(artifact.path, artifact.id, gpu.name, trt.version, Silent())
    session = open_plan(artifact.path, artifact.file(PLAN), engine, tactics, trt, memory, gpu, kernels, Silent())
    context = session.context(index)
    held = _bind(context, memory, engine.spec, getattr(torch, engine.dtype), engine.limits.context, batch, position)
    profiler = _new_profiler(trt.api)
    _run(context, memory, 3)
    context.profiler = profiler
    _run(context, memory, _STEPS)
    found = {name: statistics.median(values) for name, values in profiler.times.items()}
    # in this order: a context calls its profiler, holds its engine, and works on tensors
    del context
    del profiler
    session.close()
    held.clear()
    facts = PlanFacts.model_validate_json(artifact.file(LAYERS).read_bytes())
    return {"batch": batch, "profile": tactics.profiles[index].name, **summary(found, facts, index, engine.spec)}


def summary(times: dict[str, float], facts: PlanFacts, profile: int, spec: DecoderSpec) -> dict[str, Any]:
    """``times``: milliseconds of each profiled name."""
    by_name = {kernel.name: kernel for kernel in facts.profiles[profile].kernels}
    parts: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, ms in times.items():
        part = parts[_part(by_name.get(plain(name)), name, spec)]
        part[0] += 1
        part[1] += ms
    total = sum(times.values())
    slowest = sorted(times.items(), key=lambda item: -item[1])[:_LISTED]
    return {
        "kernels": len(times),
        "sum_ms": total,
        "parts": {
            name: {"kernels": int(count), "ms": ms, "share": ms / total}
            for name, (count, ms) in sorted(parts.items(), key=lambda item: -item[1][1])
        },
        "slowest": [{"name": plain(name), "ms": ms} for name, ms in slowest],
    }


def plain(name: str) -> str:
    """A profiled name as the build log has it."""
    return re.sub(r" \[profile \d+\]", "", name)


def _part(kernel: Kernel | None, name: str, spec: DecoderSpec) -> str:
    if "_mha_" in name:
        return "attention"
    if kernel is None:
        return "kernels unknown to the build log"
    # a layer whose name was taken carries a number; a merged product bears the names of all its modules
    sources = {part for source in kernel.sources for part in source.partition("#")[0].split("+")}
    if kernel.type != "kgen":
        if head(spec) in sources:
            return "head"
        modules = sorted({source.rpartition(".")[2] for source in sources & set(spec.linears())})
        if modules:
            return "product " + "+".join(modules)
    return "cache update" if any("_cache" in source for source in sources) else "norms, rotary, activation and the like"


def _bind(
    context: Any, memory: Memory, spec: DecoderSpec, dtype: torch.dtype, room: int, batch: int, position: int
) -> dict[str, torch.Tensor]:
    """Give every input and output a place; the tensors, which must live as long as the context works."""
    held = {
        "token_ids": memory.zeros((batch, 1), torch.int32),
        "starts": memory.zeros((batch,), torch.int32),
        "rows": memory.zeros((batch,), torch.int32),
        "seen": memory.upload(torch.arange(reach(position + 1, room), dtype=torch.int32)),
    }
    shape = (batch, spec.num_kv_heads, room, spec.head_dim)
    caches = {name: memory.zeros(shape, dtype) for layer in range(spec.num_layers) for name in cache_names(layer)}
    logits = memory.zeros((batch, spec.vocab_size), torch.float32)
    with memory.active():
        held["token_ids"].random_(1, spec.vocab_size)
        held["starts"].fill_(position)
        held["rows"].copy_(torch.arange(batch, dtype=torch.int32))
        for cache in caches.values():
            cache.normal_()
    for name, tensor in {**held, **caches}.items():
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise RuntimeError(f"the profile refuses {tuple(tensor.shape)} for {name}")
    places = {**held, **caches, **{updated(name): cache for name, cache in caches.items()}, "logits": logits}
    for name, tensor in places.items():
        context.set_tensor_address(name, tensor.data_ptr())
    memory.synchronize()
    return places


def _new_profiler(api: Any) -> Any:
    """A profiler that keeps the milliseconds of each name in ``times``."""
    base: Any = api.IProfiler

    class Profiler(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.times: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, name: str, ms: float) -> None:
            self.times[name].append(ms)

    return Profiler()


def _run(context: Any, memory: Memory, steps: int) -> None:
    for _ in range(steps):
        if not context.execute_async_v3(memory.stream):
            raise RuntimeError("the step was refused")
        memory.synchronize()
