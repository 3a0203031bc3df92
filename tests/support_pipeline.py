"""A tiny published model with a tokenizer, and a pipeline over it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from tests.support_models import tiny_model

WORDS = tuple(f"word{number}" for number in range(90))


def write_model(directory: Path, case: str = "llama-gqa", seed: int = 0) -> None:
    """A random llama as published: config.json, model.safetensors, tokenizer.json (one token a word)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiny_model(case, seed).save_pretrained(directory)
    vocabulary = {"<unk>": 0, **{word: number for number, word in enumerate(WORDS, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_text(path: Path, words: int = 300, seed: int = 0) -> None:
    chosen = random.Random(seed).choices(WORDS, k=words)
    path.write_text(" ".join(chosen), "utf-8")


def stages() -> dict[str, dict[str, Any]]:
    """Stage name -> stage, in order, of a pipeline that needs no engine to run."""
    return {
        "source": {"stage": "download", "model": "tiny"},
        "half": {"stage": "convert", "options": {"dtype": "bfloat16"}},
        "int8": {"stage": "quantize", "options": {"method": "int8-weight-only"}},
        "engine": {"stage": "build", "options": {"executor": "torch", "context": 64, "concurrency": 2}},
        "quality": {
            "stage": "eval",
            "from": "int8",
            "against": "half",
            "text": "eval.txt",
            "options": {"context": 32, "windows": 3},
            "gate": {"max_kld": 0.1, "max_ppl_increase": "5%"},
        },
    }


def speed_stage() -> dict[str, Any]:
    """A bench of the engine, short."""
    options = {"prompt-tokens": 8, "new_tokens": 4, "repetitions": 1, "bandwidth": False}
    return {"stage": "bench", "from": "engine", "options": options}


def write_pipeline(path: Path, content: dict[str, dict[str, Any]], **more: Any) -> Path:
    listed = [{"name": name, **stage} for name, stage in content.items()]
    path.write_text(yaml.safe_dump({"version": 1, "work": "work", **more, "stages": listed}, sort_keys=False), "utf-8")
    return path
