"""Decoders of your own: layers and forward passes in the functional API, run and built on every backend.

A :class:`Model` is a spec (sizes and the names and shapes of its tensors), a forward pass over :class:`Ops`, and the
tensors. ``docs/functional-api.md`` builds two, with the code of ``examples/custom_layer.py`` and
``examples/custom_decoder.py``. What is imported here is the API; everything else in this package may change.

Executors are used as all in this package: ``executor.forward([Segment(slot=0, start=0, tokens=ids, want="all")])``
gives float32 logits ``[tokens, vocab]``, and keys and values stay in the slot for the next call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import Dtype, KvCacheScheme
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.decoder import Forward, attention_spec, decoder
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec
from trtllm_cli.ops.api import AttentionSpec, DecoderInputs, DecoderOutputs, KvCache, Ops
from trtllm_cli.ops.segment import Segment

if TYPE_CHECKING:
    from trtllm_cli.build.tensorrt.build import TrtBuild
    from trtllm_cli.build.tensorrt.weights import WeightSource
    from trtllm_cli.runtime.executor import Executor

__all__ = [
    "AttentionSpec",
    "DecoderInputs",
    "DecoderOutputs",
    "DecoderSpec",
    "Forward",
    "KvCache",
    "Model",
    "NormSpec",
    "Ops",
    "RotarySpec",
    "Segment",
    "attention_spec",
    "decoder",
    "random_tensors",
]

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Model:
    """A decoder of your own.

    ``spec`` says what there is: :class:`DecoderSpec`, or a subclass whose ``layer_linears`` or ``tensor_shapes`` name
    other tensors. ``forward(ops, spec, inputs)`` is the forward pass. ``tensors`` holds float32 or float16 arrays of
    the shapes that ``spec.tensor_shapes()`` says, by name.

    Raises BadInputError for a tensor that is missing, of another shape, or that the spec does not name.
    """

    spec: DecoderSpec
    forward: Forward
    tensors: Tensors

    def __post_init__(self) -> None:
        shapes = self.spec.tensor_shapes()
        for name in [*shapes, *self.tensors]:
            given = self.tensors.get(name)
            if name not in shapes:
                raise BadInputError("TENSOR_UNKNOWN", f"the spec names no tensor {name}", "leave it out, or name it")
            if given is None:
                raise BadInputError("TENSOR_MISSING", f"tensor {name} of the spec is not given", "give it")
            if tuple(given.shape) != shapes[name] or given.dtype not in (np.float32, np.float16):
                raise BadInputError(
                    "TENSOR_SHAPE",
                    f"tensor {name} is {given.dtype} {tuple(given.shape)}, the spec says {shapes[name]} in float32 or"
                    " float16",
                    "give it so",
                )

    def torch(self, *, context: int, slots: int = 1) -> Executor:
        """The reference: plain torch and float32 on the CPU, ``slots`` sequences of up to ``context`` tokens."""
        import torch

        from trtllm_cli.runtime.torch_executor import TorchExecutor

        return TorchExecutor(self.spec, _Dense(self.tensors), context, slots, torch.float32, None, self.forward)

    def native(self, *, context: int, slots: int = 1, threads: int | None = None) -> Executor:
        """The native CPU library, in float32: the forward pass is recorded once as a plan of its operations.

        Raises UnsupportedError for operations that it has no kernel for (the primitives: sums, products, means of
        their own), naming the operation, and where the library cannot be had.
        """
        from trtllm_cli.ops.native.model import NativeModel
        from trtllm_cli.ops.native.packing import pack_module, pack_vector
        from trtllm_cli.ops.native.plan import record
        from trtllm_cli.runtime.native_executor import NativeExecutor

        plan = record(self.spec, self.forward)
        wide = {name: np.asarray(array, np.float32) for name, array in self.tensors.items()}
        modules, packed = {}, {}
        for name, use in plan.matrices.items():
            bias = wide[f"{name}.bias"] if use.bias else None
            modules[name], tensors = pack_module(name, "float32", wide[f"{name}.weight"], bias=bias)
            packed.update(tensors)
        for name in plan.vectors:
            packed.update(pack_vector(name, wide[f"{name}.weight"]))
        return NativeExecutor(
            NativeModel(
                plan, modules, packed, context=context, slots=slots, gemm="float32", kv_dtype="float32", threads=threads
            )
        )

    def network(self, *, context: int, slots: int = 1, dtype: Dtype = "float32") -> Executor:
        """The TensorRT network in ``dtype``, evaluated layer by layer in torch: its mathematics, without a GPU.

        Raises UnsupportedError for what TensorRT refuses, naming the layer.
        """
        import torch

        from trtllm_cli.build.tensorrt.module import load
        from trtllm_cli.build.tensorrt.network import Sizing, define, new_definition
        from trtllm_cli.build.tensorrt.quantized import nothing
        from trtllm_cli.runtime.tensorrt.executor import TensorRTExecutor
        from trtllm_cli.runtime.tensorrt.memory import Memory
        from trtllm_cli.runtime.tensorrt.reference import ReferenceSession

        layers = new_definition(load()).layers
        define(layers, self.spec, self._weights(), dtype, context, nothing, self.forward)
        tactics = _tactics(Sizing(context=context, concurrency=slots))
        return TensorRTExecutor(
            ReferenceSession(layers, tactics),
            Memory(torch.device("cpu")),
            self.spec,
            getattr(torch, dtype),
            tactics,
            context,
            slots,
            {},
            graphs=False,
        )

    def build(
        self,
        directory: Path,
        *,
        context: int,
        concurrency: int = 1,
        dtype: Dtype = "float16",
        target: Sequence[str] = (),
    ) -> TrtBuild:
        """Write a TensorRT plan (``engine.plan``) and what it compiled to (``layers.json``) into ``directory``.

        No GPU is needed; :meth:`tensorrt` runs it on one. ``target`` as in ``trtllm-cli build``. Raises what
        :func:`trtllm_cli.build.tensorrt.build.build_plan` raises.
        """
        from trtllm_cli.build.tensorrt.build import build_plan
        from trtllm_cli.build.tensorrt.network import Sizing

        sizing = Sizing(context=context, concurrency=concurrency)
        return build_plan(self.spec, self._weights(), dtype, sizing, target, directory, forward=self.forward)

    def tensorrt(self, built: TrtBuild, *, context: int, slots: int = 1) -> Executor:
        """A plan of :meth:`build` on the GPU, for the same ``context`` and at most its concurrency of ``slots``.

        Raises UserError with the reason in words when this machine cannot run it.
        """
        import torch

        from trtllm_cli.artifacts.identity import sha256_file
        from trtllm_cli.artifacts.schema import EngineBody, EngineLimits
        from trtllm_cli.build.tensorrt.module import load
        from trtllm_cli.build.tensorrt.stage import requirements, tactics
        from trtllm_cli.progress import Silent
        from trtllm_cli.runtime.tensorrt import compatible
        from trtllm_cli.runtime.tensorrt.executor import TensorRTExecutor
        from trtllm_cli.runtime.tensorrt.kernels import KernelFile
        from trtllm_cli.runtime.tensorrt.memory import Memory
        from trtllm_cli.runtime.tensorrt.plan import open_plan

        path, trt, sizes = built.plan.parent, load(), tactics(built)
        gpu = compatible.require_gpu(path, compatible.find_gpu())
        body = EngineBody(
            backend="tensorrt",
            executor=built.package,
            spec=self.spec,
            dtype=built.dtype,
            tokenizer=None,
            limits=EngineLimits(
                context=context,
                concurrency=slots,
                weight_bytes=built.weight_bytes,
                cache_bytes=built.cache_bytes,
                scratch_bytes=built.facts.scratch_bytes,
            ),
            requirements=requirements(built),
            tactics=sizes.model_dump(mode="json"),
        )
        memory = Memory(torch.device("cuda", torch.cuda.current_device()))
        kernels = KernelFile(path, sha256_file(built.plan), gpu.name, trt.version, Silent())
        session = open_plan(path, built.plan, body, sizes, trt, memory, gpu, kernels, Silent())
        dtype = getattr(torch, built.dtype)
        return TensorRTExecutor(session, memory, self.spec, dtype, sizes, context, slots, {})

    def _weights(self) -> WeightSource:
        from trtllm_cli.build.tensorrt.weights import Weight

        def weight(name: str) -> Weight:
            array = self.tensors[name]
            return Weight(array, "float16" if array.dtype == np.float16 else "float32")

        return weight


def random_tensors(spec: DecoderSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Tensors to try a model with: norms around 1, all else normal with the usual 1/sqrt(inputs) deviation."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in spec.tensor_shapes().items():
        noise = generator.standard_normal(shape, np.float32)
        if len(shape) == 1 and name.endswith(".weight"):
            found[name] = 1 + np.float32(0.1) * noise
        else:
            found[name] = noise / np.float32(np.sqrt(shape[-1]))
    return found


class _Dense:
    """Given arrays as the torch executor reads weights."""

    kv_cache: KvCacheScheme | None = None

    def __init__(self, tensors: Tensors) -> None:
        import torch

        self._tensors = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in tensors.items()}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def dense(self, name: str) -> Any:
        return self._tensors[name]

    def input_quantizer(self, module: str) -> None:
        return None

    def kv_scales(self, layer: int) -> tuple[Any, Any]:
        raise KeyError(layer)


def _tactics(sizing: Any) -> Any:
    from trtllm_cli.artifacts.tensorrt import ProfileTactics, TensorRTTactics
    from trtllm_cli.build.tensorrt.network import profiles

    found = tuple(ProfileTactics(**sizes.model_dump()) for sizes in profiles(sizing))
    return TensorRTTactics(network_layers=0, complete=False, profiles=found)
