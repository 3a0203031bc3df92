"""Tokenizers rebuilt from GGUF metadata: against the tokenizers and SentencePiece models they were taken from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support_gguf import write_model
from tests.test_gguf_model import tiny_llama
from trtllm_cli.artifacts.schema import TokenizerInfo
from trtllm_cli.convert.gguf_model import GgufModel
from trtllm_cli.convert.gguf_tokenizer import write_gguf_tokenizer
from trtllm_cli.errors import BadInputError, UnsupportedError, UserError
from trtllm_cli.runtime.tokenizer import Tokenizer as Runtime

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = (
    "It's 1234567 o'clock; they'LL pay $3.50, won't they?\r\n\r\n\tDon't!!   Ein Bär läuft über die Straße.\n"
    "日本語のテキスト、数字は12345です。 naïve CamelCaseWord HTTPServer x==y && z||w  \n"
) * 8
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(["'s", "'LL", "12", "3", "½", "é", "é", "日本", " ", "  ", "\n", "\r\n", "\t", "word", "CamelCase",
                     "!", "==", "/", "<|im_end|>", "<tool>", " x", "ﬁ"]), max_size=20
).map("".join)  # fmt: skip

Change = Callable[[gguf.GGUFWriter], None]


def build(directory: Path, change: Change) -> tuple[TokenizerInfo | None, Path]:
    """The tokenizer of a GGUF file whose metadata ``change`` adds."""
    directory.mkdir(parents=True, exist_ok=True)
    path = write_model(directory / "model.gguf", tiny_llama(), change=lambda writer, _: change(writer))
    return write_gguf_tokenizer(GgufModel(path), directory), directory


def byte_level(fast: Tokenizer, pre: str | None, types: dict[str, int] | None = None, **more: Any) -> Change:
    """Metadata of a byte-level BPE tokenizer as llama.cpp's converter writes it."""

    def change(writer: gguf.GGUFWriter) -> None:
        data = json.loads(fast.to_str())
        tokens = sorted(fast.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list([token for token, _ in tokens])
        writer.add_token_types([(types or {}).get(token, NORMAL) for token, _ in tokens])
        writer.add_token_merges([" ".join(merge) for merge in data["model"]["merges"]])
        for key, value in more.items():
            getattr(writer, f"add_{key}")(value)

    return change


def trained(
    pre_tokenizer: Any, normalizer: Any = None, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizer
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([CORPUS], trainer)
    fast.add_tokens(["<tool>"])
    return fast


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def oracle(pre: str) -> Tokenizer:
    """A tokenizer with the rule of that name, as the tokenizers library or transformers has it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return trained(gpt2)
    if pre == "smollm":
        return trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]))
    if pre == "qwen2":
        qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
        return trained(split(qwen2.PRETOKENIZE_REGEX), normalizers.NFC())
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    return trained(split(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre]))


TYPES = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool>": USER}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Rule -> (the tokenizer the file was made from, the rebuilt one)."""
    found = {}
    for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe", "llama-v3", "tekken"):
        original = oracle(pre)
        directory = tmp_path_factory.mktemp(pre)
        build(directory, byte_level(original, pre, TYPES, add_bos_token=False))
        found[pre] = (original, Tokenizer.from_file(str(directory / "tokenizer.json")))
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "llama-v3", "tekken"])
@settings(max_examples=60)
@given(text=TEXTS)
def test_byte_level_tokenizers_come_back(pre: str, text: str, pairs: dict[str, tuple[Tokenizer, Tokenizer]]) -> None:
    original, rebuilt = pairs[pre]
    expected = original.encode(text)
    found = rebuilt.encode(text)
    assert found.ids == expected.ids
    assert rebuilt.decode(found.ids, skip_special_tokens=False) == original.decode(
        expected.ids, skip_special_tokens=False
    )


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_words_of_the_vocabulary_that_no_merge_makes(pre: str, whole: bool, tmp_path: Path) -> None:
    """Llama 3 and Tekken take such a word as it is (``ignore_merges``), the others never reach it."""
    unreachable = Tokenizer(models.BPE(vocab={**oracle("gpt-2").get_vocab(), "quux": 501}, merges=[("o", "n")]))
    _, directory = build(tmp_path, byte_level(unreachable, pre))
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("quux").tokens
    assert tokens == (["quux"] if whole else ["q", "u", "u", "x"])


def test_digits_tell_the_rules_apart(pairs: dict[str, tuple[Tokenizer, Tokenizer]]) -> None:
    """Loaders that take one rule for another differ here, and nowhere in most texts."""
    tokens = {pre: rebuilt.encode("x 12345").tokens for pre, (_, rebuilt) in pairs.items()}
    assert tokens["smollm"] == ["x", "Ġ", "1", "2", "3", "4", "5"]
    assert tokens["gpt-2"] != tokens["smollm"]
    assert tokens["llama-bpe"] != tokens["qwen2"]


def test_llama_cpps_own_default(tmp_path: Path) -> None:
    _, directory = build(tmp_path, byte_level(oracle("gpt-2"), "default", TYPES))
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    pieces = [text for text, _ in fast.pre_tokenizer.pre_tokenize_str("a 12345, b<c")]
    assert pieces == ["a", "Ġ", "123", "45", ",", "Ġb", "<", "c"]


@pytest.mark.parametrize("pre", ["poro-chat", "viking", None])
def test_an_unknown_rule_is_refused_by_name(pre: str | None, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build(tmp_path, byte_level(oracle("gpt-2"), pre))
    assert caught.value.code == "PRE_TOKENIZER_UNKNOWN"
    assert (repr(pre) if pre else "does not say") in caught.value.message
    assert not (tmp_path / "tokenizer.json").exists()


def test_special_ids_template_and_bos(tmp_path: Path) -> None:
    fast = trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        special=("<s>", "</s>", "<|eot_id|>", "<|end|>", "<|pad|>", "<|im_end|>"),
    )
    types = {"<s>": CONTROL, "</s>": CONTROL, "<|eot_id|>": CONTROL, "<|pad|>": CONTROL, "<|im_end|>": CONTROL}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}é{% endfor %}"
    info, directory = build(
        tmp_path,
        byte_level(
            fast, "gpt-2", types, bos_token_id=0, eos_token_id=1, eot_token_id=2, pad_token_id=4, add_bos_token=True,
            add_eos_token=True, chat_template=template,
        ),
    )  # fmt: skip
    assert info == TokenizerInfo(
        vocab_size=fast.get_vocab_size(), bos_id=0, eos_ids=(1, 2, 5), pad_id=4, bos_token="<s>", eos_token="</s>",
        chat_template="chat_template.jinja",
    )  # fmt: skip
    runtime = Runtime(directory, info)
    plain = fast.encode("hello").ids
    assert runtime.encode("hello") == [0, *plain, 1]
    assert runtime.encode("hello", special=False) == plain
    assert runtime.encode("<s>hello", special=False) == [0, *plain]
    assert runtime.decode([0, *plain, 1]) == "hello"
    assert runtime.chat([{"role": "user", "content": "hi"}]) == "<s>hié"


@pytest.mark.parametrize(("pre", "added"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_bos_by_default_is_the_rules(pre: str, added: bool, tmp_path: Path) -> None:
    _, directory = build(tmp_path, byte_level(oracle("gpt-2"), pre, TYPES, bos_token_id=0))
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("word").ids
    assert (ids[0] == 0) is added


def test_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    change = byte_level(oracle("gpt-2"), "smollm", TYPES)
    contents = [(build(tmp_path / name, change)[1] / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]


# --- SentencePiece ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, Path]:
    """A BPE model trained by SentencePiece with Llama's settings, and the tokenizer rebuilt from its GGUF metadata."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("spm")
    generator = random.Random(0)
    runs = ["".join(generator.choice(["=", "-", " ", "a", "ab"]) * generator.randint(1, 9) for _ in range(6))
            for _ in range(300)]  # fmt: skip
    (directory / "text").write_text(CORPUS + "\n".join(runs), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "spm"), model_type="bpe", vocab_size=600,
        byte_fallback=True, character_coverage=0.995, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=["<tool>"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spm.model"))
    build(directory, sentencepieces(model, add_bos_token=False))
    return model, Tokenizer.from_file(str(directory / "tokenizer.json")), directory


def sentencepieces(model: Any, **more: Any) -> Change:
    """Metadata as llama.cpp's converter writes it (conversion/base.py, _create_vocab_sentencepiece)."""

    def change(writer: gguf.GGUFWriter) -> None:
        count = model.get_piece_size()
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(index) for index in range(count)])
        writer.add_token_scores([model.get_score(index) for index in range(count)])
        kinds = (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        )
        types = [next((kind for test, kind in kinds if test(index)), NORMAL) for index in range(count)]
        types[model.piece_to_id("<tool>")] = USER
        writer.add_token_types(types)
        writer.add_bos_token_id(model.bos_id())
        writer.add_eos_token_id(model.eos_id())
        for key, value in more.items():
            getattr(writer, f"add_{key}")(value)

    return change


SPM_TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), min_size=1, max_size=60
) | st.lists(
    st.sampled_from(["a", "ab", "=", "-", " ", "    ", "é", "日", "😀", "\n", "12", "Straße", "the", "th", "e"]),
    min_size=1, max_size=40,
).map("".join)  # fmt: skip


@settings(max_examples=300)
@given(text=SPM_TEXTS)
def test_sentencepiece_comes_back(text: str, spm: tuple[Any, Tokenizer, Path]) -> None:
    model, rebuilt, _ = spm
    if "<tool>" in text or any(special in text for special in ("<s>", "</s>", "<unk>")):
        return
    ids = rebuilt.encode(text).ids
    assert ids == model.encode(text)
    assert rebuilt.decode(ids) == text


def test_sentencepiece_on_prose_and_runs(spm: tuple[Any, Tokenizer, Path]) -> None:
    model, rebuilt, _ = spm
    generator = random.Random(7)
    texts = [CORPUS]
    texts += ["".join(generator.choice(["=", "-", " ", "a", "ab"]) * generator.randint(1, 30) for _ in range(6))
              for _ in range(2000)]  # fmt: skip
    assert [rebuilt.encode(text).ids for text in texts] == [model.encode(text) for text in texts]


def test_sentencepiece_merges_are_transformers(spm: tuple[Any, Tokenizer, Path]) -> None:
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    model, _, directory = spm
    ordinary = {
        model.id_to_piece(index): index
        for index in range(model.get_piece_size())
        if not (model.is_unknown(index) or model.is_control(index) or model.is_byte(index))
    }
    scores = {piece: model.get_score(index) for piece, index in ordinary.items()}
    written = json.loads((directory / "tokenizer.json").read_bytes())["model"]["merges"]
    assert [tuple(merge) for merge in written] == convert.generate_merges(ordinary, scores)


def test_sentencepiece_specials(spm: tuple[Any, Tokenizer, Path], tmp_path: Path) -> None:
    model, _, _ = spm
    info, directory = build(tmp_path, sentencepieces(model))
    assert info is not None
    assert (info.bos_id, info.eos_ids, info.bos_token) == (model.bos_id(), (model.eos_id(),), "<s>")
    runtime = Runtime(directory, info)
    assert runtime.encode("the fox") == [model.bos_id(), *model.encode("the fox")]
    assert runtime.decode(runtime.encode("the fox")) == "the fox"
    assert model.piece_to_id("<tool>") in runtime.encode("a<tool>b")
    without, other = build(tmp_path / "plain", sentencepieces(model, add_space_prefix=False, add_bos_token=False))
    assert without is not None
    assert Runtime(other, without).encode("the") == [
        model.piece_to_id(piece) for piece in Tokenizer.from_file(str(other / "tokenizer.json")).encode("the").tokens
    ]
    assert not Tokenizer.from_file(str(other / "tokenizer.json")).encode("the").tokens[0].startswith("▁")


# --- damage ----------------------------------------------------------------------------------------------------------


def altered(**changes: Any) -> Change:
    """The smollm oracle's metadata with some keys replaced (None removes a key)."""

    def change(writer: gguf.GGUFWriter) -> None:
        byte_level(oracle("smollm"), "smollm", TYPES, bos_token_id=0)(writer)
        for name, value in changes.items():
            key = f"tokenizer.ggml.{name}"
            old = writer.kv_data[0].pop(key, None)
            if value is None:
                continue
            value = value(old.value) if callable(value) else value
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            else:
                writer.add_int64(key, value)

    return change


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"model": "bert"}, "TOKENIZER_FORMAT", "'bert'"),
        ({"model": "llama"}, "TOKENIZER_DAMAGED", "scores"),
        ({"tokens": None}, "TOKENIZER_DAMAGED", "tokens is missing"),
        ({"merges": None}, "TOKENIZER_DAMAGED", "merges is missing"),
        ({"merges": lambda old: [*old, "nospace"]}, "TOKENIZER_DAMAGED", "'nospace'"),
        ({"merges": lambda old: [*old, "qq zz"]}, "TOKENIZER_DAMAGED", "do not fit together"),
        ({"token_type": lambda old: old[:-1]}, "TOKENIZER_DAMAGED", "one number for each"),
        ({"tokens": lambda old: [*old[:-1], old[5]]}, "TOKENIZER_DAMAGED", "twice"),
        ({"bos_token_id": 10**6}, "TOKENIZER_DAMAGED", "bos token has the id 1000000"),
        ({"bos_token_id": "one"}, "TOKENIZER_DAMAGED", "bos_token_id is 'one'"),
        ({"add_bos_token": "yes"}, "TOKENIZER_DAMAGED", "not true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "TOKENIZER_DAMAGED", "names none"),
    ],
)
def test_damaged_tokenizers_are_refused(changes: dict[str, Any], code: str, says: str, tmp_path: Path) -> None:
    with pytest.raises((BadInputError, UnsupportedError), match=says) as caught:
        build(tmp_path, altered(**changes))
    error: UserError = caught.value
    assert error.code == code
    assert str(tmp_path) in error.message


def test_a_file_without_tokenizer(tmp_path: Path) -> None:
    assert build(tmp_path, lambda writer: None)[0] is None
    assert build(tmp_path, altered(model="none"))[0] is None
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_ids_that_mean_none(none: int, tmp_path: Path) -> None:
    info, _ = build(tmp_path, altered(bos_token_id=none))
    assert info is not None
    assert info.bos_id is None
