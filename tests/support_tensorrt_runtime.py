"""TensorRT engines with a tokenizer, of small random models of every family, for the tests of their runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support_artifacts import convert_to, save_folder, source_of, text_model
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
from trtllm_cli.runtime.generate import Request, generate
from trtllm_cli.runtime.load import Loaded

CONTEXT = 64
SLOTS = 4
#: what sets each family apart: transformers' class prefix, and its settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def family_model(family: str) -> Any:
    """A random float32 model of the family, with the sizes of :func:`tests.support_artifacts.text_model`."""
    prefix, changes = FAMILIES[family]
    return text_model(family=prefix, **changes)


def checkpoint_of(model: Any, directory: Path) -> Artifact:
    """The converted checkpoint of a transformers model, with the tests' tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = save_folder(model, directory / "published", tokenizer=True)
    return convert_to(source_of(folder, directory / "source").path, directory / "checkpoint")


def engine_of(checkpoint: Artifact, output: Path, **options: Any) -> Artifact:
    """A TensorRT engine of :data:`SLOTS` slots of :data:`CONTEXT` tokens unless ``options`` say otherwise."""
    given = {"context": CONTEXT, "concurrency": SLOTS, **options}
    return build_tensorrt_engine(checkpoint, output, configure(TensorRTOptions, [("command line", given)], "build"))


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 300, count).astype(np.int32)


def requests(count: int, least: int = 3, step: int = 2, **options: Any) -> list[Request]:
    """Ragged prompts, each with its own length of answer: ``least``, ``least + step``, ... tokens."""
    rng = np.random.default_rng(5)
    return [
        Request(
            tokens=tuple(int(t) for t in rng.integers(2, 300, rng.integers(1, 30))),
            max_new_tokens=least + step * i,
            **options,
        )
        for i in range(count)
    ]


def texts(model: Loaded, wanted: list[Request]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in generate(model.executor, model.tokenizer, wanted)]
