"""The tokenizer inside a GGUF file, rebuilt as the ``tokenizer.json`` it was made from.

Byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``) is exact: vocabulary and merges are stored, and the rule that
splits text beforehand is named (``tokenizer.ggml.pre``). A name this module does not know is refused, because a wrong
rule gives almost the same tokens and silently costs quality.

SentencePiece BPE (``llama``) stores scores instead of merges. They are turned into merges as transformers turns them
for the published tokenizer.json files. Only where one piece can be made from two overlapping pairs of symbols at equal
score could the two break the tie differently (SentencePiece takes the leftmost pair, a merge list the one listed
first); tests against SentencePiece itself, long runs of one character included, find no text where they do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.convert.gguf_model import GgufModel
from trtllm_cli.convert.tokenizer_files import TEMPLATE
from trtllm_cli.errors import BadInputError, UnsupportedError

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
#: the character SentencePiece writes for a space
_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


#: tokenizer.ggml.pre -> (normalizer, pre-tokenizer, ignore_merges, BOS by default), as in the tokenizer.json of the
#: models the name stands for; the names and defaults are those of llama.cpp's src/llama-vocab.cpp
_RULES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], bool, bool]] = {
    "gpt-2": (None, _byte_level(True), False, False),
    "smollm": (None, _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)), False, False),
    "llama-bpe": (None, _sequence(_split(_LLAMA3), _byte_level(False)), True, True),
    "qwen2": ({"type": "NFC"}, _sequence(_split(_QWEN2), _byte_level(False)), False, False),
    "tekken": (None, _sequence(_split(_TEKKEN), _byte_level(False)), True, True),
    # what llama.cpp does for files that say "default": a rule of its own, of no published tokenizer
    "default": (
        None,
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            _split(r"\p{N}+"),
            _split("[0-9][0-9][0-9]"),
            _byte_level(False),
        ),
        False,
        False,
    ),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
#: control tokens that end an answer wherever they occur (llama.cpp: special_eog_ids)
_END_OF_GENERATION = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
)


def write_gguf_tokenizer(model: GgufModel, directory: Path) -> TokenizerInfo | None:
    """Write ``tokenizer.json`` (and the chat template, where there is one) into ``directory``.

    None when the file carries no tokenizer. Raises UnsupportedError for another kind of tokenizer or an unknown
    ``tokenizer.ggml.pre``, BadInputError when its parts are missing or contradict each other.
    """
    vocabulary = _Vocabulary(model)
    if vocabulary.kind in (None, "none", "no_vocab"):
        return None
    if vocabulary.kind == "gpt2":
        parts = _byte_level_bpe(vocabulary)
    elif vocabulary.kind == "llama":
        parts = _sentencepiece_bpe(vocabulary)
    else:
        raise UnsupportedError(
            "TOKENIZER_FORMAT",
            f"{vocabulary.path} has a tokenizer of the kind {vocabulary.kind!r}; gpt2 (byte-level BPE) and llama"
            " (SentencePiece BPE) can be rebuilt",
            "use the model's safetensors with its tokenizer.json",
        )
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": vocabulary.added(),
            "normalizer": parts["normalizer"],
            "pre_tokenizer": parts["pre_tokenizer"],
            "post_processor": vocabulary.post_processor(parts["add_bos"]),
            "decoder": parts["decoder"],
            "model": {"type": "BPE", "vocab": vocabulary.ids, **parts["model"]},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
    _check(text, vocabulary)
    (directory / "tokenizer.json").write_text(text, "utf-8")
    template = model.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / TEMPLATE).write_text(template, "utf-8")
    bos, eos, pad = (vocabulary.special(name) for name in ("bos", "eos", "padding"))
    return TokenizerInfo(
        vocab_size=len(vocabulary.tokens),
        bos_id=bos,
        eos_ids=vocabulary.end_ids(),
        pad_id=pad,
        bos_token=None if bos is None else vocabulary.tokens[bos],
        eos_token=None if eos is None else vocabulary.tokens[eos],
        chat_template=TEMPLATE if isinstance(template, str) else None,
    )


class _Vocabulary:
    """Tokens, their types and the special ids of one file, checked against each other."""

    def __init__(self, model: GgufModel) -> None:
        self.path = model.file.path
        self._metadata = model.metadata
        kind = self.key("model")
        self.kind = kind if isinstance(kind, str) else None
        self.tokens: list[str] = []
        self.types: list[int] = []
        if self.kind in ("gpt2", "llama"):
            self._load()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            self.damaged(f"the token {twice!r} stands in it twice")

    def _load(self) -> None:
        self.tokens = list(self.strings("tokens"))
        types = self.key("token_type")
        self.types = [1] * len(self.tokens) if types is None else self._numbers(types, "token_type")
        if self.kind == "llama":
            # added tokens match the text before spaces are replaced, so they carry real spaces
            pairs = zip(self.tokens, self.types, strict=True)
            self.tokens = [t.replace(_SPACE, " ") if kind == _USER_DEFINED else t for t, kind in pairs]

    def key(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def damaged(self, what: str) -> NoReturn:
        raise BadInputError("TOKENIZER_DAMAGED", f"the tokenizer of {self.path}: {what}", "download the file again")

    def strings(self, name: str) -> list[str]:
        value = self.key(name)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            self.damaged(f"tokenizer.ggml.{name} is missing or not a list of texts")
        return value

    def _numbers(self, value: Any, name: str) -> list[Any]:
        fits = isinstance(value, list) and len(value) == len(self.tokens)
        if not fits or not isinstance(value[0], int | float):
            self.damaged(f"tokenizer.ggml.{name} does not hold one number for each of {len(self.tokens)} tokens")
        return list(value)

    def scores(self) -> list[float]:
        return self._numbers(self.key("scores"), "scores")

    def flag(self, name: str, default: bool) -> bool:
        value = self.key(name)
        if value is not None and not isinstance(value, bool):
            self.damaged(f"tokenizer.ggml.{name} is {value!r}, not true or false")
        return default if value is None else value

    def special(self, name: str) -> int | None:
        """The id of a special token; None when the file names none."""
        value = self.key(f"{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.damaged(f"tokenizer.ggml.{name}_token_id is {value!r}")
        if not 0 <= value < len(self.tokens):
            # some converters write -1 or 2**32 - 1 for "none"
            if value in (-1, 2**32 - 1):
                return None
            self.damaged(f"its {name} token has the id {value}, but there are {len(self.tokens)} tokens")
        return value

    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends generation, the end-of-text one first."""
        named = [self.special(name) for name in ("eos", "eot", "eom")]
        found = [token for token in named if token is not None]
        found += [
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED) and token in _END_OF_GENERATION
        ]
        return tuple(dict.fromkeys(found))

    def added(self) -> list[dict[str, Any]]:
        """Tokens matched as a whole before the text is split; control tokens are special (left out of decoded text)."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": token, **flags, "special": kind != _USER_DEFINED}
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
        ]

    def post_processor(self, add_bos_default: bool) -> dict[str, Any] | None:
        """The BOS and EOS around a text, where the model was trained with them."""
        ends: list[tuple[str, int] | None] = []
        for name, default in (("bos", add_bos_default), ("eos", False)):
            token = self.special(name)
            wanted = self.flag(f"add_{name}_token", default)
            if wanted and token is None and self.key(f"add_{name}_token"):
                self.damaged(f"it asks for a {name} token at every text and names none")
            ends.append((self.tokens[token], token) if wanted and token is not None else None)
        if ends == [None, None]:
            return None

        def around(name: str, type_id: int) -> list[dict[str, Any]]:
            pieces: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": type_id}}]
            if ends[0]:
                pieces.insert(0, {"SpecialToken": {"id": ends[0][0], "type_id": type_id}})
            if ends[1]:
                pieces.append({"SpecialToken": {"id": ends[1][0], "type_id": type_id}})
            return pieces

        used = [end for end in ends if end is not None]
        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": [*around("A", 0), *around("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in used},
        }


def _byte_level_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = vocabulary.key("pre")
    rule = _RULES.get(_ALIASES.get(pre, pre)) if isinstance(pre, str) else None
    if rule is None:
        raise UnsupportedError(
            "PRE_TOKENIZER_UNKNOWN",
            f"{vocabulary.path} "
            + ("does not say how it splits text" if pre is None else f"splits text by the rule {pre!r}")
            + f" (tokenizer.ggml.pre); known are {', '.join([*_RULES, *_ALIASES])}",
            "use the model's safetensors with its tokenizer.json, or a GGUF file made by a current llama.cpp",
        )
    normalizer, pre_tokenizer, ignore_merges, add_bos = rule
    merges = []
    for merge in vocabulary.strings("merges"):
        # a part is never empty, so the space that parts them is not the first character
        at = merge.find(" ", 1)
        if at < 0:
            vocabulary.damaged(f"the merge {merge!r} has no two parts")
        merges.append([merge[:at], merge[at + 1 :]])
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "add_bos": add_bos,
        "model": _bpe(merges, ignore_merges=ignore_merges),
    }


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise UnsupportedError(
            "TOKENIZER_FORMAT",
            f"{vocabulary.path}: its SentencePiece tokenizer removes repeated spaces, which cannot be rebuilt",
            "use the model's safetensors with its tokenizer.json",
        )
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), space],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *back,
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "add_bos": True,
        "model": _bpe(
            _merges_from_scores(vocabulary.tokens, vocabulary.types, vocabulary.scores()),
            unk_token=unknown[0] if unknown else None,
            byte_fallback=_BYTE in vocabulary.types,
        ),
    }


def _merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first; ties in transformers' order."""
    ordinary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind not in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    }
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, index in ordinary.items():
        made = [
            (ordinary[token[:at]], ordinary[token[at:]], at)
            for at in range(1, len(token))
            if token[:at] in ordinary and token[at:] in ordinary
        ]
        for _, _, at in sorted(made):
            pairs.append((scores[index], at, len(token) - at, token[:at], token[at:]))
    # the sort is stable, and with reverse=True it stays so: pairs that tie in all three keep the order of their ids
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [[left, right] for *_, left, right in pairs]


def _bpe(
    merges: list[list[str]], *, ignore_merges: bool = False, unk_token: str | None = None, byte_fallback: bool = False
) -> dict[str, Any]:
    return {
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "merges": merges,
    }


def _check(text: str, vocabulary: _Vocabulary) -> None:
    """The library that will read the file must accept it, and give every token its own id."""
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for every kind of damage
        vocabulary.damaged(f"its vocabulary and merges do not fit together ({error})")
    for entry in vocabulary.added():
        if fast.token_to_id(entry["content"]) != entry["id"]:
            vocabulary.damaged(f"the added token {entry['content']!r} did not keep its id {entry['id']}")
