"""Engines to debug, and a checkpoint with a fault planted in one layer."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support_artifacts import convert_to, save_folder, source_of, text_model
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine


def engine_of(checkpoint: Artifact, output: Path, **options: object) -> Artifact:
    """A TensorRT engine for 2 sequences of 64 tokens."""
    given = {"context": 64, "concurrency": 2, **options}
    return build_tensorrt_engine(checkpoint, output, configure(TensorRTOptions, [("command line", given)], "build"))


def faulty_checkpoint(directory: Path, **options: object) -> Artifact:
    """The tests' usual model, with one row of layers.1.mlp.up two and a half times as large as it should be."""
    model = text_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] *= 2.5
    source = source_of(save_folder(model, directory / "published", tokenizer=True), directory / "source")
    return convert_to(source.path, directory / "checkpoint", **options)
