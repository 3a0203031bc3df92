"""Text to tokens and back, streamed, and chat templates as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models

from tests.support_artifacts import CHAT_TEMPLATE, fast_tokenizer, raises
from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.runtime.tokenizer import TextStream, Tokenizer


def tokenizer(directory: Path, fast: Any = None, template: str | None = None, **info: Any) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    (fast or fast_tokenizer()).save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, "utf-8")
    values = {"vocab_size": 300, "bos_id": 0, "eos_ids": (1,), "bos_token": "<s>", "eos_token": "</s>", **info}
    return Tokenizer(directory, TokenizerInfo(**values, chat_template="chat_template.jinja" if template else None))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """As SentencePiece models are published: metaspace words, and bytes for what has no word."""
    words = ["<unk>", "<s>", "</s>", "▁the", "▁dog", "▁", "s", "a", "é", "▁é"]
    vocabulary = words + [f"<0x{byte:02X}>" for byte in range(256)]
    fast = Fast(models.BPE(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    return tokenizer(tmp_path_factory.mktemp("fallback"), fast, vocab_size=len(vocabulary))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(TEXTS)
@example("Grüße 👋🏽 an 世界\n\ttabs  and   spaces")
@example("👩‍👩‍👧‍👦🏴‍☠️")
@example("\x00\x7f\u2028\ufffd")
def test_text_survives(byte_level, text):
    ids = byte_level.encode(text)
    assert ids[0] == 0
    assert ids[1:] == byte_level.encode(text, special=False)
    assert byte_level.decode(ids) == text


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@given(TEXTS)
@example("👋 世界 é")
def test_streamed_text_is_the_text(byte_level, text):
    ids = byte_level.encode(text)
    pieces = streamed(byte_level, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@given(st.lists(st.integers(0, 299), max_size=40))
@example([0, 1, 0])
def test_any_ids_stream_as_they_decode(byte_level, ids):
    """Models emit anything: half characters, lone continuation bytes, special tokens in the middle."""
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


@given(st.lists(st.integers(0, 9) | st.characters(exclude_categories=["Cs"]), max_size=20))
@example([5, 5, 3, 4])
@example([1, 3, 2, 4])
@example(["世", 3, "👋", "a"])
def test_a_byte_fallback_tokenizer_streams_as_it_decodes(byte_fallback, parts):
    """Words, specials, and characters spelled in bytes."""
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else [10 + b for b in part.encode()])]
    assert "".join(streamed(byte_fallback, ids)) == byte_fallback.decode(ids)


def test_a_character_is_shown_once_it_is_whole(byte_level):
    ids = byte_level.encode("a👋b", special=False)
    assert len(ids) > 3
    pieces = streamed(byte_level, ids)
    assert [piece for piece in pieces if piece] == ["a", "👋", "b"]


def test_flush_shows_what_never_became_whole(byte_level):
    ids = byte_level.encode("a👋", special=False)[:-1]
    stream = TextStream(byte_level)
    assert "".join(stream.push(token) for token in ids) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_truncation_and_padding_of_the_published_file_are_off(tmp_path):
    fast = fast_tokenizer()
    fast.enable_truncation(3)
    fast.enable_padding(length=40)
    made = tokenizer(tmp_path, fast)
    assert made.decode(made.encode("a longer text than three tokens")) == "a longer text than three tokens"


@pytest.mark.parametrize("content", ["", "{", "{}", "\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, "latin-1")
    with raises("TOKENIZER_DAMAGED", 3, "tokenizer.json"):
        Tokenizer(tmp_path, TokenizerInfo(vocab_size=300, bos_id=0, eos_ids=(1,)))


def theirs(directory: Path, template: str, messages: list[dict[str, str]]) -> str:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


CHAT = [
    {"role": "system", "content": "  Sei höflich. "},
    {"role": "user", "content": "Wie heißt du? 👋\n{{ not a template }}"},
    {"role": "assistant", "content": "Bär"},
    {"role": "user", "content": "<b>&amp;</b>"},
]
CHATML = (
    "{%- if tools %}\n    {{- 'tools' }}\n{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TEMPLATES = {
    "loop controls": CHAT_TEMPLATE,
    "chatml": CHATML,
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "tojson options": "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "no tools": "{% if tools is none %}a{% endif %}{% if documents is none %}b{% endif %}"
    "{% if tools is not none %}c{% endif %}{% if tools is defined %}d{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if loop.last %}\n    x\n  {% endif %}\n{{ m.role }}\n{% endfor %}\n",
    "strings": "{{ messages[0].content.strip().split('.')[0] | upper }}{{ messages[1]['content'][::-1] }}",
    "macro": "{%- macro show(m) -%}[{{ m.role }}]{%- endmacro -%}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "clock": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, name):
    ours = tokenizer(tmp_path, template=TEMPLATES[name])
    assert ours.chat(CHAT) == theirs(tmp_path, TEMPLATES[name], CHAT)


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "assistant", "content": "first"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "!stop"}, {"role": "user", "content": "y"}],
    ],
)
def test_conversations_render_as_in_transformers(byte_level, tmp_path, chat):
    tokenizer(tmp_path)
    assert byte_level.chat(chat) == theirs(tmp_path, CHAT_TEMPLATE, chat)


def test_a_chat_becomes_the_tokens_of_transformers(byte_level, tmp_path):
    tokenizer(tmp_path)
    text = byte_level.chat(CHAT)
    assert text.startswith("<s>")
    ids = byte_level.encode(text, special=False)
    assert ids.count(0) == 1, "the template's own BOS stays the only one"
    assert ids == Fast.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_a_template_may_refuse(byte_level):
    with raises("CHAT_TEMPLATE_FAILED", 3, "unknown role robot"):
        byte_level.chat([{"role": "robot", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').getcwd() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set x = ''|attr('__class__') %}{{ x.__mro__ }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 5 }}",
        "{{ messages[99].content.strip() }}",
        "{% for x in 5 %}{% endfor %}",
        "{{ unfinished",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error(tmp_path, template):
    made = tokenizer(tmp_path, template=template)
    with raises("CHAT_TEMPLATE_FAILED", 3, "template"):
        made.chat(CHAT)


def test_without_a_template_chat_is_refused(tmp_path):
    with raises("NO_CHAT_TEMPLATE", 4):
        tokenizer(tmp_path).chat(CHAT)


def test_the_info_is_plain_json():
    info = TokenizerInfo(vocab_size=3, bos_id=None, eos_ids=())
    assert TokenizerInfo.model_validate_json(json.dumps(info.model_dump())) == info
