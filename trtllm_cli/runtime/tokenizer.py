"""Text to tokens and back, and chat templates, from the files an artifact carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.errors import BadInputError, UnsupportedError


class Tokenizer:
    """The model's tokenizer (Hugging Face ``tokenizers`` format) with its special ids and chat template."""

    def __init__(self, directory: Path, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer as Fast

        self.info = info
        path = directory / info.file
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise BadInputError(
                "TOKENIZER_DAMAGED",
                f"{path} cannot be read ({error})",
                "trtllm-cli verify the artifact; convert it again",
            ) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._template = (directory / info.chat_template).read_text("utf-8") if info.chat_template else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (the model's vocabulary may be padded beyond it)."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids. ``special`` adds what the model expects around a text (such as BOS)."""
        return list(self._fast.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not valid UTF-8 become the replacement character."""
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages (``role``, ``content``) through the model's chat template, ready for ``encode(special=False)``."""
        if self._template is None:
            raise UnsupportedError(
                "NO_CHAT_TEMPLATE", "this model carries no chat template", "leave out --chat and give the whole prompt"
            )
        from trtllm_cli.runtime.template import render

        return render(
            self._template,
            messages=[dict(message) for message in messages],
            bos_token=self.info.bos_token or "",
            eos_token=self.info.eos_token or "",
        )


class TextStream:
    """Turns a growing list of ids into pieces of text, holding back bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # decoded again each time, because a tokenizer may join or strip around a boundary
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly empty."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._prefix : self._shown])
        after = self._tokenizer.decode(self._ids[self._prefix :])
        if after.endswith("�") or len(after) <= len(before):
            return ""
        self._prefix, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Whatever is still held back, unfinished characters as replacement characters."""
        before = self._tokenizer.decode(self._ids[self._prefix : self._shown])
        after = self._tokenizer.decode(self._ids[self._prefix :])
        self._prefix = self._shown = len(self._ids)
        return after[len(before) :]
