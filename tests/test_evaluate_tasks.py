"""Task scoring against a one-sequence-at-a-time reckoning with a transformers model in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support_evaluate import SHARED, Bigram, TinyLlama, make_tokenizer
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError
from trtllm_cli.evaluate import tasks
from trtllm_cli.evaluate.tasks import read_tasks, run_tasks, split_text
from trtllm_cli.runtime.tokenizer import Tokenizer

CHOICES = [
    {"query": "Question: what does the dog do?", "choices": ["it sleeps", "reads books", "x"], "gold": 0},
    {"query": "The fox jumps over ", "choices": ["the lazy dog.", "the library"], "gold": 1},
    {"query": "The library has", "choices": ["many books", "many dogs", "é brown", "many"], "gold": 3},
    {"query": "A", "choices": [" clever fox", "lazy"], "gold": 0},
    {"query": "Answer: the quick brown fox", "choices": ["jumps", "sleeps all day", "reads"], "gold": 1},
]
CONTINUATIONS = [
    {"context": "The quick brown fox jumps over the lazy", "continuation": "dog"},
    {"context": "A clever fox reads the whole ", "continuation": "library."},
    {"context": "It", "continuation": "sleeps all day"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True)


def _write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _reckon(model: TinyLlama, tokenizer: Tokenizer, given: str, scored: str, front: list[int]) -> tuple[float, bool]:
    """Log likelihood and greedy match of one sequence, as lm-evaluation-harness does it, alone."""
    spaces = len(given) - len(given.rstrip())
    continuation = given[len(given) - spaces :] + scored if spaces else scored
    context = given[: len(given) - spaces]
    if not continuation[0].isspace():
        continuation = " " + continuation
    whole = tokenizer.encode(context + continuation, special=False)
    begin = len(tokenizer.encode(context, special=False))
    with torch.no_grad():
        log_p = model.model(torch.tensor([front + whole])).logits[0].double().log_softmax(-1)
    rows = log_p[len(front) + begin - 1 : len(front) + len(whole) - 1]
    targets = torch.tensor(whole[begin:])
    return rows[range(len(targets)), targets].sum().item(), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("slots", [1, 3])
def test_choices_are_those_of_a_plain_reckoning(tmp_path: Path, tokenizer: Tokenizer, slots: int, bos: bool) -> None:
    model = TinyLlama(tokenizer.vocab_size, slots=slots)
    expected, normalized = [], []
    for line in CHOICES:
        query, choices = str(line["query"]), list(line["choices"])  # type: ignore[call-overload]
        found = [_reckon(model, tokenizer, query, choice, [0] if bos else [])[0] for choice in choices]
        expected.append(int(np.argmax(found)) == line["gold"])
        lengths = [len(choice.encode()) for choice in choices]
        normalized.append(int(np.argmax(np.array(found) / lengths)) == line["gold"])
    file = read_tasks(_write(tmp_path / "quiz.jsonl", CHOICES))
    seen: list[int] = []
    result = run_tasks(model, tokenizer, file, bos=bos, progress=lambda done, total, accuracy: seen.append(done))
    assert (result.name, result.form, result.tasks, result.bos) == ("quiz", "choice", 5, bos)
    assert result.accuracy == pytest.approx(np.mean(expected))
    assert result.accuracy_stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(5))
    assert result.accuracy_normalized == pytest.approx(np.mean(normalized))
    assert result.accuracy_normalized_stderr == pytest.approx(np.std(normalized, ddof=1) / math.sqrt(5))
    assert result.perplexity is None
    assert seen == ([1, 2, 3, 4, 5] if slots == 1 else [3, 5])


@pytest.mark.parametrize("slots", [1, 4])
def test_each_candidate_has_its_log_likelihood(
    tokenizer: Tokenizer, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyLlama(tokenizer.vocab_size, slots=slots)
    items = [tasks._item(model, tokenizer, tasks.ChoiceTask.model_validate(line), "here", []) for line in CHOICES]
    for group in tasks._groups(items, model):
        tasks._run_group(model, group)
    for item, line in zip(items, CHOICES, strict=True):
        for candidate, choice in zip(item.candidates, line["choices"], strict=True):  # type: ignore[call-overload]
            log_p, greedy = _reckon(model, tokenizer, str(line["query"]), choice, [])
            assert candidate.nll == pytest.approx(-log_p, rel=1e-5)
            assert candidate.greedy == greedy
    # a tight bound on the logits splits the groups and changes nothing else
    before = [candidate.nll for item in items for candidate in item.candidates]
    monkeypatch.setattr(tasks, "rows_per_forward", lambda vocab_size: 1)
    again = [tasks._item(model, tokenizer, tasks.ChoiceTask.model_validate(line), "here", []) for line in CHOICES]
    for group in tasks._groups(again, model):
        assert len(group) == 1
        tasks._run_group(model, group)
    assert [candidate.nll for item in again for candidate in item.candidates] == pytest.approx(before, rel=1e-5)


def test_last_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = TinyLlama(tokenizer.vocab_size, slots=2)
    # one line whose continuation is what the model itself says, so that not every answer is wrong
    start = tokenizer.encode("The dog", special=False)
    said = int(model.logits(start)[-1].argmax())
    own = {"context": "The dog", "continuation": tokenizer.decode([said], skip_special=False)}
    lines = [*CONTINUATIONS]
    if tokenizer.encode("The dog " + own["continuation"], special=False) == [*start, said]:
        lines.append(own)
    found = [_reckon(model, tokenizer, line["context"], line["continuation"], []) for line in lines]
    result = run_tasks(model, tokenizer, read_tasks(_write(tmp_path / "words.jsonl", lines)))  # type: ignore[arg-type]
    assert result.form == "continuation"
    assert result.accuracy == pytest.approx(np.mean([greedy for _, greedy in found]))
    assert result.perplexity == pytest.approx(math.exp(-np.mean([log_p for log_p, _ in found])), rel=1e-5)
    assert result.accuracy_normalized is None


def test_greedy_means_every_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = {"context": "The lazy", "continuation": "jumps"}
    ids, split = split_text(tokenizer, "The lazy", "jumps")
    assert len(ids) - split >= 3
    assert len(set(ids[split - 1 :])) == len(ids[split - 1 :])  # a bigram model can follow it
    file = read_tasks(_write(tmp_path / "one.jsonl", [line]))
    model = Bigram(tokenizer.vocab_size)
    for before, after in zip(ids[split - 1 :], ids[split:], strict=False):
        model.table[before, after] = 50.0
    result = run_tasks(model, tokenizer, file)
    assert (result.accuracy, result.accuracy_stderr) == (1.0, 0.0)
    assert result.perplexity == pytest.approx(1.0)
    model.table[ids[-2], 5] = 60.0
    assert run_tasks(model, tokenizer, file).accuracy == 0.0


def test_shared_tokens_run_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Bigram(tokenizer.vocab_size)
    run_tasks(model, tokenizer, read_tasks(_write(tmp_path / "a.jsonl", [CHOICES[2]])))
    # the query once, and one pass for every choice longer than a token
    longer = sum(
        len(ids) - split > 1
        for ids, split in (split_text(tokenizer, "The library has", c) for c in CHOICES[2]["choices"])  # type: ignore[attr-defined]
    )
    assert model.calls == 1 + longer


@settings(max_examples=60, deadline=None)
@given(st.text(" \nabcé'.", min_size=1, max_size=12), st.text(" abcé'.", min_size=1, max_size=12))
def test_the_boundary_leaves_something_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, given_: str, scored: str
) -> None:
    tokenizer = _cached_tokenizer(tmp_path_factory)
    if not given_.strip() or not scored.strip():
        return
    ids, split = split_text(tokenizer, given_, scored)
    assert 1 <= split < len(ids)
    text = tokenizer.decode(ids)
    stripped = given_.rstrip()
    assert text.startswith(stripped)
    joined = text[len(stripped) :]
    assert joined.endswith(scored)
    assert joined[: len(joined) - len(scored)] == (given_[len(stripped) :] or ("" if scored[0].isspace() else " "))


_TOKENIZERS: list[Tokenizer] = []


def _cached_tokenizer(factory: pytest.TempPathFactory) -> Tokenizer:
    if not _TOKENIZERS:
        _TOKENIZERS.append(make_tokenizer(factory.mktemp("boundary")))
    return _TOKENIZERS[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "choices"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold 2 is not the index of one of 2 choices"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "1"}', "gold"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold"),
        ('{"query": "q", "choices": ["a", " "], "gold": 0}', "must not be blank"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 0, "extra": 1}', "extra"),
        ('{"query": "q", "choices": ["a", 3], "gold": 0}', "choices.1"),
        ('{"context": "", "continuation": "a"}', "must not be blank"),
        ('{"continuation": "a"}', "context"),
        ('{"context": "a", "continuation": "b"}', "another form"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "query: holds half a character"),
        ("\xff", "is not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(CHOICES[0]).encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(BadInputError) as caught:
        read_tasks(path)
    assert caught.value.code == "TASK_INVALID"
    assert f"{path}:3" in caught.value.message
    assert message in caught.value.message
    assert len(read_tasks(path, limit=1).tasks) == 1


def test_other_refusals(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInputError, match="cannot read"):
        read_tasks(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(BadInputError, match="holds no tasks"):
        read_tasks(tmp_path / "empty.jsonl")
    file = read_tasks(_write(tmp_path / "long.jsonl", [CHOICES[0], {**CHOICES[0], "query": "dog " * 100}]))
    with pytest.raises(DoesNotFitError, match=r"long\.jsonl:2 takes .* positions"):
        run_tasks(Bigram(tokenizer.vocab_size), tokenizer, file)
    with pytest.raises(UnsupportedError, match="no BOS"):
        run_tasks(Bigram(tokenizer.vocab_size), make_tokenizer(tmp_path / "t"), file, bos=True)
    model = Bigram(tokenizer.vocab_size)
    model.table[:] = math.nan
    with pytest.raises(BadInputError, match=r"NaN.*long\.jsonl:1"):
        run_tasks(model, tokenizer, read_tasks(tmp_path / "long.jsonl", limit=1))


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [("arc_easy", "choice", 2376), ("hellaswag", "choice", 2000), ("lambada", "continuation", 5153)],
)
def test_the_real_files_are_read(name: str, form: str, count: int) -> None:
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    file = read_tasks(path)
    assert (file.form, len(file.tasks)) == (form, count)
