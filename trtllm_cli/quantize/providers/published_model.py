"""A checkpoint as the transformers model that was published, for tools that quantize nothing else."""

from __future__ import annotations

from typing import Any

from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.models.families import family_of
from trtllm_cli.models.published import published_config
from trtllm_cli.models.spec import DecoderSpec


def published_names(spec: DecoderSpec) -> dict[str, str]:
    """canonical tensor name -> published tensor name."""
    return family_of(published_config(spec, "float32"), "the checkpoint").published_names(spec)


def transformers_model(checkpoint: Artifact) -> Any:
    """The unquantized checkpoint as a transformers model in float32, in evaluation mode. Needs transformers."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    spec = checkpoint.checkpoint.spec
    keys = published_config(spec, "float32")
    config = CONFIG_MAPPING[keys["model_type"]].from_dict(keys)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config, dtype=torch.float32)
    store = TensorStore(checkpoint.path)
    state = {published: store.tensor(name).to(torch.float32) for name, published in published_names(spec).items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - ({"lm_head.weight"} if spec.tie_embeddings else set()):
        raise RuntimeError(f"transformers' {type(model).__name__} has other tensors: {missing}, {unexpected}")
    model.tie_weights()
    # the rotary tables are computed and not stored, so they came out without data
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise RuntimeError(f"transformers' {type(model).__name__} has tensors without data: {empty}")
    return model.eval()
