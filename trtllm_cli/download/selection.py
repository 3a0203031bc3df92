"""Which of the published files a conversion needs. Everything else (other formats, duplicates, images) stays behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from trtllm_cli.download.gguf_file import refuse_split
from trtllm_cli.download.reference import PICKLE_SUFFIXES, pickle_refused
from trtllm_cli.errors import BadInputError, UnsupportedError, UserError

INDEX = "model.safetensors.index.json"
#: configuration, tokenizer, and the records quantizers leave beside GPTQ, AWQ and ModelOpt checkpoints
_AUXILIARY = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)


@dataclass(frozen=True)
class Selection:
    """Names of the needed files, in the order they are fetched (small ones first)."""

    names: tuple[str, ...]
    format: Literal["safetensors", "gguf"]


def select(
    names: Iterable[str], read_index: Callable[[str], bytes], where: str, load_from: str | None = None
) -> Selection:
    """Choose from the paths ``names`` (with ``/``) of a repository or folder called ``where``.

    ``read_index`` returns the content of a named file; it is called once when the weights are in shards. The index
    decides over a single file, as it does when the tensors are read. Raises UnsupportedError when there are weights
    but none this tool reads, BadInputError when files are missing.
    """
    names = list(names)
    here = sorted(name for name in names if "/" not in name)
    auxiliary = [name for name in here if any(fnmatchcase(name, pattern) for pattern in _AUXILIARY)]
    if INDEX in here:
        weights = [INDEX, *_shards(read_index(INDEX), set(here), where)]
    elif "model.safetensors" in here:
        weights = ["model.safetensors"]
    else:
        ggufs = [name for name in names if name.endswith(".gguf") and ".." not in name.split("/")]
        if not ggufs:
            raise _no_weights(here, where, load_from)
        return Selection((_only_gguf(ggufs, where),), "gguf")
    if "config.json" not in here:
        raise BadInputError(
            "CONFIG_MISSING", f"{where} has weights but no config.json", "complete it from where the model came from"
        )
    return Selection((*auxiliary, *weights), "safetensors")


def _shards(index: bytes, here: set[str], where: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
        unsafe = [name for name in shards if not isinstance(name, str) or "/" in name or "\\" in name or name == ".."]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInputError(
            "INDEX_DAMAGED", f"{INDEX} of {where} is not a weight index ({error})", "report it to the publisher"
        ) from error
    if unsafe or not shards:
        raise BadInputError(
            "PATH_ESCAPES" if unsafe else "INDEX_DAMAGED",
            f"{INDEX} of {where} names " + (f"a shard outside its folder: {unsafe[0]!r}" if unsafe else "no shard"),
            "do not trust it; report it to the publisher",
        )
    missing = [name for name in shards if name not in here]
    if missing:
        raise BadInputError(
            "SHARD_MISSING",
            f"{where} lacks {len(missing)} of the {len(shards)} shards its index names, such as {missing[0]}",
            "complete it from where the model came from",
        )
    if any(not name.endswith(".safetensors") for name in shards):
        raise BadInputError(
            "INDEX_DAMAGED", f"{INDEX} of {where} names files that are not safetensors", "report it to the publisher"
        )
    return shards


def _only_gguf(names: list[str], where: str) -> str:
    if len(names) == 1:
        refuse_split(names[0])
        return names[0]
    where = where.partition("@")[0]
    raise BadInputError(
        "GGUF_AMBIGUOUS",
        f"{where} holds {len(names)} GGUF files: {', '.join(sorted(names)[:6])}" + (", ..." if len(names) > 6 else ""),
        f"name one: trtllm-cli download {where}/{sorted(names)[0]} -o OUT",
    )


def _no_weights(here: list[str], where: str, load_from: str | None) -> UserError:
    if "adapter_model.safetensors" in here or "adapter_config.json" in here:
        return UnsupportedError(
            "ADAPTER_ONLY",
            f"{where} is an adapter without its base model",
            "merge it into its base (peft: model.merge_and_unload().save_pretrained(OUT)), then download OUT",
        )
    other = [name for name in here if name.endswith(".safetensors")]
    if other:
        return UnsupportedError(
            "WEIGHT_LAYOUT_UNKNOWN",
            f"{where} has {', '.join(other[:3])} but neither model.safetensors nor {INDEX}",
            "save it with save_pretrained of transformers, which writes these names",
        )
    pickles = [name for name in here if name.endswith(PICKLE_SUFFIXES) and name != "training_args.bin"]
    if pickles:
        return pickle_refused(where, pickles, load_from)
    return BadInputError(
        "WEIGHTS_MISSING",
        f"{where} holds no model.safetensors, {INDEX} or .gguf file",
        "check the name; trtllm-cli download takes a model, not a data set or a folder above models",
    )
