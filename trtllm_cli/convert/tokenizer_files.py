"""The tokenizer of a published folder, as the checkpoint carries it: tokenizer.json, special ids, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.progress import Reporter

TEMPLATE = "chat_template.jinja"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError("TOKENIZER_DAMAGED", f"{path} is not JSON ({error})", "download it again") from error
    if not isinstance(data, dict):
        raise BadInputError("TOKENIZER_DAMAGED", f"{path} is not a JSON object", "download it again")
    return data


def _text(token: Any) -> str | None:
    # published files write a token as a string, or as an object with its text under "content"
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template(config: dict[str, Any], source: Path) -> str | None:
    file = source / TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    legacy = _read(source / "chat_template.json").get("chat_template")
    template = config.get("chat_template", legacy)
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def write_tokenizer(source: Path, config: dict[str, Any], directory: Path, report: Reporter) -> TokenizerInfo | None:
    """Copy the tokenizer of ``source`` into ``directory``; None when the folder has none (the engine then takes ids).

    Raises UnsupportedError for a SentencePiece-only tokenizer.
    """
    published = source / "tokenizer.json"
    if not published.is_file():
        if (source / "tokenizer.model").is_file():
            raise UnsupportedError(
                "TOKENIZER_FORMAT",
                f"{source} has only a SentencePiece tokenizer.model",
                "save a fast tokenizer beside it: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        report.say(f"{source} has no tokenizer: the checkpoint will take token ids only")
        return None
    shutil.copyfile(published, directory / "tokenizer.json")
    settings = _read(source / "tokenizer_config.json")
    specials = {**_read(source / "special_tokens_map.json"), **settings}
    template = _template(settings, source)
    if template is not None:
        (directory / TEMPLATE).write_text(template, "utf-8")
    generation = _read(source / "generation_config.json")

    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(published))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise BadInputError(
            "TOKENIZER_DAMAGED", f"{published} cannot be read ({error})", "download it again"
        ) from error
    bos, eos, pad = (_text(specials.get(key)) for key in ("bos_token", "eos_token", "pad_token"))
    eos_ids = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    from_text = fast.token_to_id(eos) if eos else None
    if from_text is not None and from_text not in eos_ids:
        eos_ids.append(from_text)
    bos_id = fast.token_to_id(bos) if bos else next(iter(_ids(config.get("bos_token_id"))), None)
    return TokenizerInfo(
        vocab_size=fast.get_vocab_size(with_added_tokens=True),
        bos_id=bos_id,
        eos_ids=tuple(eos_ids),
        pad_id=fast.token_to_id(pad) if pad else None,
        bos_token=bos,
        eos_token=eos,
        chat_template=TEMPLATE if template is not None else None,
    )
