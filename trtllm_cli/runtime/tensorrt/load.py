"""Opening a TensorRT engine artifact: on a GPU, or by the reference evaluator from the checkpoint it was built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.artifacts.store import MANIFEST, Artifact, open_artifact, read_manifest
from trtllm_cli.artifacts.tensorrt import TensorRTTactics, tensorrt_tactics
from trtllm_cli.errors import BadInputError, UsageError, UserError
from trtllm_cli.progress import Reporter
from trtllm_cli.runtime.tensorrt.executor import Session, TensorRTExecutor

if TYPE_CHECKING:
    import torch

    from trtllm_cli.build.tensorrt.layers import Layers
    from trtllm_cli.build.tensorrt.weights import Weight
    from trtllm_cli.runtime.tensorrt.intact import Intact
    from trtllm_cli.runtime.tensorrt.memory import Memory


def load_on_gpu(artifact: Artifact, graphs: bool, report: Reporter, intact: Intact) -> TensorRTExecutor:
    """Raises UserError with the reason in words when this machine cannot run the engine."""
    import torch

    from trtllm_cli.build.tensorrt.build import PLAN
    from trtllm_cli.build.tensorrt.module import load_package
    from trtllm_cli.build.tensorrt.plan import read_header
    from trtllm_cli.runtime.tensorrt import compatible
    from trtllm_cli.runtime.tensorrt.kernels import KernelFile
    from trtllm_cli.runtime.tensorrt.memory import Memory
    from trtllm_cli.runtime.tensorrt.plan import open_plan

    engine, path = artifact.engine, artifact.path
    tactics = tensorrt_tactics(engine)
    written_by = read_header(artifact.file(PLAN)).version
    distribution = f"{compatible.DISTRIBUTIONS[engine.executor]}=={written_by}"
    trt = load_package(engine.executor, f"running {path}", f"pip install {distribution}")
    compatible.require_version(path, engine, trt, written_by)
    gpu = compatible.require_gpu(path, compatible.find_gpu())
    memory = Memory(torch.device("cuda", torch.cuda.current_device()))
    kernels = KernelFile(path, artifact.id, gpu.name, trt.version, report)
    intact.require()
    session = open_plan(path, artifact.file(PLAN), engine, tactics, trt, memory, gpu, kernels, report)
    return _executor(artifact, session, memory, tactics, graphs)


def load_reference(artifact: Artifact, checkpoint: Path | None) -> TensorRTExecutor:
    """The engine's network, made again from its checkpoint, run by torch on the CPU.

    ``checkpoint`` defaults to :func:`find_checkpoint`; an engine whose weights are inputs brings them and needs none.
    Raises UsageError where it is needed and not found, or where the one given is another.
    """
    import torch

    from trtllm_cli.artifacts.tensors import TensorStore
    from trtllm_cli.build.tensorrt.module import load
    from trtllm_cli.build.tensorrt.network import define, new_definition
    from trtllm_cli.build.tensorrt.ops import Choices
    from trtllm_cli.build.tensorrt.quantized import QuantizedSource, nothing
    from trtllm_cli.build.tensorrt.quantized import stored as quantized_source
    from trtllm_cli.build.tensorrt.weights import WeightSource, stored
    from trtllm_cli.runtime.tensorrt.memory import Memory
    from trtllm_cli.runtime.tensorrt.reference import ReferenceSession

    engine = artifact.engine
    tactics = tensorrt_tactics(engine)
    choices = Choices(weights_as_inputs=bool(tactics.weight_inputs), fp8_attention=tactics.fp8_attention)
    record = engine.quantization
    quantized: QuantizedSource = nothing
    weights: WeightSource = _unasked
    if checkpoint is not None or not choices.weights_as_inputs:
        store = TensorStore(find_checkpoint(artifact, checkpoint).path)
        weights = stored(store)
        if record is not None:
            quantized = quantized_source(store, record.layers)
    layers: Layers = new_definition(load()).layers
    define(layers, engine.spec, weights, engine.dtype, engine.limits.context, quantized, choices=choices)
    return _executor(artifact, ReferenceSession(layers, tactics), Memory(torch.device("cpu")), tactics, graphs=False)


def _unasked(name: str) -> Weight:
    raise AssertionError(f"{name} is an input of the network, not a constant")


def find_checkpoint(artifact: Artifact, given: Path | None) -> Artifact:
    """The checkpoint that an engine was built from: ``given``, or a neighbour of the engine with the recorded id.

    Raises UsageError where it is not found, or where the one given is another.
    """
    wanted = next((parent.id for parent in artifact.manifest.parents if parent.kind == "checkpoint"), None)
    if given is not None:
        checkpoint = open_artifact(given, "checkpoint")
        if checkpoint.id != wanted:
            raise UsageError(
                "CHECKPOINT_OTHER",
                f"{artifact.path} was built from checkpoint {(wanted or 'unknown')[:12]}, {given} is"
                f" {checkpoint.id[:12]}",
                "name the checkpoint the engine was built from with --checkpoint",
            )
        return checkpoint
    for manifest in sorted(artifact.path.resolve().parent.glob(f"*/{MANIFEST}")):
        try:
            found = read_manifest(manifest.parent)
        except UserError:  # whatever else lies there
            continue
        if found.kind == "checkpoint" and found.id == wanted:
            return open_artifact(manifest.parent, "checkpoint")
    raise UsageError(
        "CHECKPOINT_NEEDED",
        f"the reference executor takes the weights of {artifact.path} from the checkpoint it was built from"
        f" ({(wanted or 'unknown')[:12]}), which does not lie beside it",
        "add --checkpoint CHECKPOINT",
    )


def _executor(
    artifact: Artifact, session: Session, memory: Memory, tactics: TensorRTTactics, graphs: bool
) -> TensorRTExecutor:
    import torch

    engine = artifact.engine
    dtype: torch.dtype = getattr(torch, engine.dtype)
    limits = engine.limits
    try:
        return TensorRTExecutor(
            session,
            memory,
            engine.spec,
            dtype,
            tactics,
            limits.context,
            limits.concurrency,
            _weights(artifact, tactics),
            graphs,
        )
    except BaseException:
        session.close()
        raise


def _weights(artifact: Artifact, tactics: TensorRTTactics) -> Mapping[str, torch.Tensor]:
    """The bytes of weights that are inputs of the plan, by input name."""
    if tactics.weight_file is None:
        return {}
    import torch

    from trtllm_cli.artifacts.tensors import TensorFile

    file = TensorFile(artifact.file(tactics.weight_file))
    missing = [name for name in tactics.weight_inputs if name not in file.entries]
    if missing:
        raise BadInputError(
            "TENSOR_MISSING",
            f"{tactics.weight_file} of {artifact.path} lacks {missing[0]}, an input of its plan",
            f"trtllm-cli verify {artifact.path}",
        )
    return {name: file.tensor(name).contiguous().view(-1).view(torch.uint8) for name in tactics.weight_inputs}
