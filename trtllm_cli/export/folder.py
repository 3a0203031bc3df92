"""The files beside the weights: config.json, generation_config.json and the tokenizer's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtllm_cli.artifacts.schema import CheckpointBody, TokenizerInfo
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.models.published import published_config


def write_config(body: CheckpointBody, quantization: dict[str, Any] | None, directory: Path) -> None:
    """``config.json`` and ``generation_config.json``. Raises UnsupportedError where the spec has no published form."""
    config = published_config(body.spec, body.dtype)
    ids = _special_ids(body.tokenizer)
    config.update(ids)
    if quantization is not None:
        config["quantization_config"] = quantization
    _write(directory / "config.json", config)
    if ids:
        _write(directory / "generation_config.json", ids)


def write_tokenizer(parent: Artifact, directory: Path) -> None:
    """``tokenizer.json``, ``tokenizer_config.json`` and the chat template, where the checkpoint has a tokenizer."""
    body = parent.checkpoint
    info = body.tokenizer
    if info is None:
        return
    shutil.copyfile(parent.file(info.file), directory / "tokenizer.json")
    if info.chat_template is not None:
        shutil.copyfile(parent.file(info.chat_template), directory / "chat_template.jinja")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": body.spec.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    tokens = {
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "pad_token": _token(directory / "tokenizer.json", info.pad_id),
    }
    settings.update({key: token for key, token in tokens.items() if token is not None})
    _write(directory / "tokenizer_config.json", settings)


def _special_ids(info: TokenizerInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    ids: dict[str, Any] = {}
    if info.bos_id is not None:
        ids["bos_token_id"] = info.bos_id
    if info.eos_ids:
        ids["eos_token_id"] = info.eos_ids[0] if len(info.eos_ids) == 1 else list(info.eos_ids)
    if info.pad_id is not None:
        ids["pad_token_id"] = info.pad_id
    return ids


def _token(tokenizer: Path, token_id: int | None) -> str | None:
    if token_id is None:
        return None
    from tokenizers import Tokenizer

    token: str | None = Tokenizer.from_file(str(tokenizer)).id_to_token(token_id)
    return token


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
