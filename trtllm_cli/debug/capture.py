"""The two sides of a comparison: a TensorRT network whose watched points are outputs, and the source model in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.build.tensorrt.evaluator import Evaluator
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.network import cache_names
from trtllm_cli.build.tensorrt.ops import TrtOps
from trtllm_cli.debug.compare import Captured
from trtllm_cli.debug.watch import Watching
from trtllm_cli.models.decoder import decoder
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.models.weights import CheckpointWeights
from trtllm_cli.ops.api import DecoderInputs, DecoderOutputs, KvCache, Ops
from trtllm_cli.ops.torch_ops import TorchOps

LOGITS = "logits"


class Names:
    """Which points are watched: a name that one of several shell patterns takes (``layers.3.*``, ``*.mlp.down``)."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        #: every name that was asked for so far, in order
        self.seen: dict[str, None] = {}

    def __call__(self, name: str) -> bool:
        self.seen[name] = None
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)


class Marks:
    """A forward pass (for :func:`~trtllm_cli.build.tensorrt.network.define`) that makes its watched points outputs.

    After it ran, ``tensors`` has the name of the network's tensor and ``inputs`` the compared points before, by point;
    ``dtypes`` has TensorRT's type by tensor name. The logits are an output anyway and a point always.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self._wanted = wanted
        self.tensors: dict[str, str] = {}
        self.dtypes: dict[str, Any] = {}
        self.inputs: dict[str, tuple[str, ...]] = {}

    def __call__(self, ops: Ops[Any], spec: DecoderSpec, inputs: DecoderInputs[Any]) -> DecoderOutputs[Any]:
        assert isinstance(ops, TrtOps)
        watching: Watching[Any] = Watching(ops, self._wanted)
        outputs = decoder(watching, spec, inputs)
        watching.rename(outputs.logits, LOGITS)
        for name, point in watching.points.items():
            self.inputs[name] = point.inputs
            if name == LOGITS:  # named and marked by who defines the network
                self.tensors[name] = LOGITS
                self.dtypes[LOGITS] = ops.layers.trt.api.float32
                continue
            ops.layers.network.mark_output(point.value)
            self.tensors[name] = str(point.value.name)
            self.dtypes[self.tensors[name]] = point.value.dtype
        return outputs

    def captured(self, outputs: dict[str, torch.Tensor]) -> dict[str, Captured]:
        """The watched points of a run's outputs (by tensor name)."""
        return {name: Captured(outputs[tensor], self.inputs[name]) for name, tensor in self.tensors.items()}


class NetworkRun(Protocol):
    """A network that runs one sequence of tokens, a step at a time, and keeps its caches."""

    def step(self, tokens: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        """Outputs by tensor name after ``tokens`` at cache position ``start``; the logits are of the last token."""
        ...


class ReferenceRun:
    """The network evaluated layer by layer in torch, on the CPU. ``shape`` is that of every cache."""

    def __init__(self, layers: Layers, spec: DecoderSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._evaluator = Evaluator(layers, in_place=True)
        self._seen = torch.arange(shape[2], dtype=torch.int32)
        self._caches = {
            name: torch.zeros(shape, dtype=dtype) for layer in range(spec.num_layers) for name in cache_names(layer)
        }

    def step(self, tokens: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        return self._evaluator.run(
            {
                "token_ids": torch.tensor([list(tokens)], dtype=torch.int32),
                "starts": torch.tensor([start], dtype=torch.int32),
                "rows": torch.tensor([len(tokens) - 1], dtype=torch.int32),
                "seen": self._seen,
                **self._caches,
            }
        )


class SourceRun:
    """The source model in plain torch and float32, one sequence."""

    def __init__(self, checkpoint: Artifact, context: int, wanted: Callable[[str], bool]) -> None:
        self._spec = checkpoint.checkpoint.spec
        self._ops = TorchOps(CheckpointWeights(checkpoint, torch.float32), context)
        self._wanted = wanted
        shape = (1, self._spec.num_kv_heads, context, self._spec.head_dim)
        self._caches = tuple(KvCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(self._spec.num_layers))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], start: int) -> dict[str, Captured]:
        """The watched points of ``tokens`` at cache position ``start``; the logits are of the last token."""
        watching = Watching(self._ops, self._wanted)
        inputs = DecoderInputs(
            torch.tensor([list(tokens)]), torch.tensor([start]), torch.tensor([len(tokens) - 1]), self._caches
        )
        outputs = decoder(watching, self._spec, inputs)
        watching.rename(outputs.logits, LOGITS)
        return {name: Captured(point.value, point.inputs) for name, point in watching.points.items()}
