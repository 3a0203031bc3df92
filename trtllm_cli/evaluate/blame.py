"""Whom to blame for a quantized model's divergence: each part's share, by exchanging one at a time in the source.

The source runs once; every part of the quantized checkpoint (a module with its activation quantization, a layer's
quantized cache, or neighbours between which scale was moved) is then laid over it alone, and every decoder layer as a
whole. Everything is computed in float32 by the reference operations, from the first changed layer on only
(:mod:`trtllm_cli.models.replay`, which also states the memory; the source's weights take up to 8 GiB more, beyond that
they are read again each time, as the quantized ones are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from trtllm_cli.artifacts.results import BlameEntry, BlameResult, TextProtocol
from trtllm_cli.artifacts.schema import CheckpointBody
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError, UnsupportedError, UsageError
from trtllm_cli.evaluate.blame_parts import QuantizedModel, find_parts
from trtllm_cli.evaluate.perplexity import windows
from trtllm_cli.models.replay import Divergence, Replay, StoredWeights
from trtllm_cli.runtime.executor import Tokens

#: windows scored where the user names no number: every one is run once for each part
DEFAULT_WINDOWS = 4

#: called with (changes run, changes in all, the largest divergence so far)
Progress = Callable[[int, int, float], None]


def require_blamable(quantized: Artifact, source: Artifact) -> None:
    """Raises UsageError or UnsupportedError unless the first is a quantized checkpoint and the other its model."""
    for artifact in (quantized, source):
        if not isinstance(artifact.manifest.body, CheckpointBody):
            raise UsageError(
                "BLAME_NEEDS_CHECKPOINTS",
                f"{artifact.path} is a {artifact.kind}: blame exchanges weights, which only checkpoints have",
                "trtllm-cli eval QUANTIZED_CHECKPOINT --against SOURCE_CHECKPOINT --blame --text FILE",
            )
    if quantized.checkpoint.quantization is None:
        raise UsageError(
            "NOT_QUANTIZED", f"{quantized.path} is not quantized: there is nothing to blame", "leave out --blame"
        )
    if source.checkpoint.quantization is not None:
        raise UsageError(
            "ALREADY_QUANTIZED",
            f"{source.path} is quantized itself ({source.checkpoint.quantization.method})",
            "name the checkpoint it was made from with --against",
        )
    ours, theirs = quantized.checkpoint.spec.model_dump(), source.checkpoint.spec.model_dump()
    differing = [key for key, value in ours.items() if theirs[key] != value]
    if differing:
        raise UnsupportedError(
            "SPEC_DIFFERS",
            f"{quantized.path} and {source.path} are different models ({', '.join(differing)})",
            "name the checkpoint it was made from with --against",
        )


def blame(
    quantized: Artifact,
    source: Artifact,
    tokens: Sequence[int] | Tokens,
    protocol: TextProtocol,
    *,
    reference_name: str,
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> BlameResult:
    """Measure on the windows of ``protocol`` of the text's ``tokens``.

    Raises as :func:`require_blamable`, and BadInputError for logits that are NaN or infinite.
    """
    require_blamable(quantized, source)
    record = quantized.checkpoint.quantization
    assert record is not None
    spec, store = source.checkpoint.spec, TensorStore(source.path)
    model = QuantizedModel(spec, TensorStore(quantized.path), record)
    parts = find_parts(model, store)
    if not parts:
        raise BadInputError("NOT_QUANTIZED", f"{quantized.path} holds the source's own numbers", "leave out --blame")

    ids, scored = _windows(tokens, protocol, bos_id)
    replay = Replay(spec, StoredWeights(store, torch.float32), ids, scored=scored)
    by_layer = {layer: [part for part in parts if part.layer == layer] for layer in range(spec.num_layers)}
    whole = [layer for layer, members in by_layer.items() if len(members) > 1]
    total = len(parts) + len(whole) + 1
    done, largest = 0, 0.0

    def run(names: Sequence[str], layer: int | None, label: str, found: Divergence) -> BlameEntry:
        nonlocal done, largest
        done, largest = done + 1, max(largest, found.mean)
        if progress is not None:
            progress(done, total, largest)
        return BlameEntry(
            name=label, modules=tuple(names), layer=layer, divergence=found.mean, top1_agreement=found.top1_agreement
        )

    entries = [run(part.modules, part.layer, part.name, replay.run(model.change([part]))) for part in parts]
    layers: list[BlameEntry] = []
    for layer, members in by_layer.items():
        modules = [module for part in members for module in part.modules]
        if layer in whole:
            layers.append(run(modules, layer, f"layers.{layer}", replay.run(model.change(members))))
        elif members:
            alone = next(entry for entry, part in zip(entries, parts, strict=True) if part is members[0])
            layers.append(alone.model_copy(update={"name": f"layers.{layer}"}))
    together = run([], None, "together", replay.run(model.change(parts)))
    return BlameResult(
        protocol=protocol,
        reference=reference_name,
        parts=tuple(sorted(entries, key=lambda entry: -entry.divergence)),
        layers=tuple(sorted(layers, key=lambda entry: -entry.divergence)),
        together=together.divergence,
        together_top1_agreement=together.top1_agreement,
        scored_tokens=replay.positions,
    )


def _windows(
    tokens: Sequence[int] | Tokens, protocol: TextProtocol, bos_id: int | None
) -> tuple[torch.Tensor, list[int]]:
    """Token ids int64 [W, context], BOS included, and in each the index of the first scored one."""
    if protocol.bos and bos_id is None:
        raise UnsupportedError("NO_BOS", "this model has no BOS token", "evaluate without --bos")
    text = np.asarray(tokens, np.int64)
    front = np.asarray([bos_id] if protocol.bos else [], np.int64)
    rows, scored = [], []
    for window in windows(protocol):
        rows.append(np.concatenate([front, text[window.begin : window.end]]))
        scored.append(window.scored - window.begin + len(front))
    return torch.from_numpy(np.stack(rows)), scored
