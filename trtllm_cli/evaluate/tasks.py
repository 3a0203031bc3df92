"""Scoring a model on tasks from a JSON-lines file.

Two forms, one a file:

- ``{"query", "choices", "gold"}``: multiple choice. A choice's score is the sum of its tokens' log likelihoods after
  the query, raw and divided by the choice's length in UTF-8 bytes; the best one (the first of equals) is the answer.
- ``{"context", "continuation"}``: last word. Right when greedy decoding would give every token of the continuation.

Boundary between given and scored text, as in EleutherAI's lm-evaluation-harness: the two are joined by one space
unless the first ends or the second begins with white space; white space at the end of the first belongs to the scored
part; joined text and given text are tokenized without special tokens, and of the joined text's tokens those after the
first ``len(tokens of the given text)`` are scored (at least one). The harness feeds the given text's own tokens where
a token would span the boundary; here the joined text's tokens are fed. BOS comes before everything only where asked.

The tokens shared by all choices of a task run once; then one forward pass runs one choice of as many tasks as the
executor has slots for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from trtllm_cli.artifacts.config import describe
from trtllm_cli.artifacts.identity import sha256_file
from trtllm_cli.artifacts.results import TaskResult
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.evaluate.perplexity import exponential
from trtllm_cli.evaluate.scores import check_tokens, mean_and_error, require_context, rows_per_forward, score_rows
from trtllm_cli.models.spec import Frozen
from trtllm_cli.runtime.executor import Executor, Logits, Segment, Tokens
from trtllm_cli.runtime.tokenizer import Tokenizer

#: called after each batch with (tasks done, tasks in all, accuracy so far)
Progress = Callable[[int, int, float], None]

_FORMS = "write one JSON object a line: {query, choices, gold} or {context, continuation}"


class ChoiceTask(Frozen):
    """One multiple-choice line; ``gold`` is the index of the right choice."""

    query: str
    choices: tuple[str, ...] = Field(min_length=2)
    gold: int = Field(ge=0, strict=True)

    @field_validator("query")
    @classmethod
    def _query(cls, value: str) -> str:
        return _not_blank(value)

    @field_validator("choices")
    @classmethod
    def _choices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_not_blank(choice) for choice in value)

    @model_validator(mode="after")
    def _gold(self) -> ChoiceTask:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold {self.gold} is not the index of one of {len(self.choices)} choices")
        return self


class ContinuationTask(Frozen):
    """One last-word line."""

    context: str
    continuation: str

    @field_validator("context", "continuation")
    @classmethod
    def _texts(cls, value: str) -> str:
        return _not_blank(value)


@dataclass(frozen=True)
class TaskFile:
    """A checked task file: all of one form. ``where`` names each task's line for errors."""

    name: str
    form: Literal["choice", "continuation"]
    sha256: str
    tasks: tuple[ChoiceTask | ContinuationTask, ...]
    where: tuple[str, ...]


def read_tasks(path: Path, limit: int | None = None) -> TaskFile:
    """Read and check a task file; ``limit`` keeps its first tasks. Blank lines are skipped.

    Raises BadInputError that names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError("FILE_UNREADABLE", f"cannot read {path}: {error.strerror}", "check the path") from error
    tasks: list[ChoiceTask | ContinuationTask] = []
    where: list[str] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if limit is not None and len(tasks) >= limit:
            break
        if not line.strip():
            continue
        task = _read_line(line, f"{path}:{number}")
        if tasks and type(task) is not type(tasks[0]):
            raise BadInputError(
                "TASK_INVALID", f"{path}:{number} has another form than the lines before it", "split the file by form"
            )
        tasks.append(task)
        where.append(f"{path}:{number}")
    if not tasks:
        raise BadInputError("TASK_FILE_EMPTY", f"{path} holds no tasks", _FORMS)
    return TaskFile(
        name=path.stem,
        form="choice" if isinstance(tasks[0], ChoiceTask) else "continuation",
        sha256=sha256_file(path),
        tasks=tuple(tasks),
        where=tuple(where),
    )


def split_text(tokenizer: Tokenizer, given: str, scored: str) -> tuple[list[int], int]:
    """(token ids of both texts joined, index of the first scored one). See the module's docstring for the rule."""
    stripped = given.rstrip()
    joint = given[len(stripped) :] + scored
    if joint == scored and not scored[:1].isspace():
        joint = " " + scored
    ids = tokenizer.encode(stripped + joint, special=False)
    return ids, min(len(tokenizer.encode(stripped, special=False)), len(ids) - 1)


@dataclass
class _Candidate:
    """One given-and-scored sequence, and what was found: ``nll`` in nats over tokens ``split`` and later."""

    ids: Tokens
    split: int
    nll: float = 0.0
    greedy: bool = True


@dataclass
class _Item:
    """One task: its candidates share their first ``shared`` tokens, which run once."""

    where: str
    candidates: list[_Candidate]
    shared: int = field(init=False)

    def __post_init__(self) -> None:
        first = self.candidates[0].ids
        self.shared = min(candidate.split for candidate in self.candidates)
        for candidate in self.candidates[1:]:
            size = min(self.shared, len(candidate.ids))
            different = np.flatnonzero(candidate.ids[:size] != first[:size])
            self.shared = int(different[0]) if len(different) else size

    def rows(self) -> int:
        """The most rows of logits one forward pass returns for this task."""
        return max(1, *(len(candidate.ids) - 1 - self.shared for candidate in self.candidates))


def run_tasks(
    executor: Executor,
    tokenizer: Tokenizer,
    file: TaskFile,
    *,
    bos: bool = False,
    progress: Progress | None = None,
) -> TaskResult:
    """Score every task of ``file``.

    Raises DoesNotFitError naming the line of a task longer than the engine's context, BadInputError for ids outside
    the vocabulary or senseless logits, and UnsupportedError when BOS is wanted and the model has none.
    """
    if bos and tokenizer.info.bos_id is None:
        raise UnsupportedError("NO_BOS", "this model has no BOS token", "evaluate without --bos")
    front = [tokenizer.info.bos_id] if bos and tokenizer.info.bos_id is not None else []
    items = [_item(executor, tokenizer, task, where, front) for task, where in zip(file.tasks, file.where, strict=True)]
    right: list[bool] = []
    right_normalized: list[bool] = []
    nlls: list[float] = []
    done = 0
    for group in _groups(items, executor):
        _run_group(executor, group)
        for item, task in zip(group, file.tasks[done : done + len(group)], strict=True):
            if isinstance(task, ChoiceTask):
                scores = np.array([-candidate.nll for candidate in item.candidates])
                lengths = np.array([len(choice.encode()) for choice in task.choices])
                right.append(int(scores.argmax()) == task.gold)
                right_normalized.append(int((scores / lengths).argmax()) == task.gold)
            else:
                right.append(item.candidates[0].greedy)
                nlls.append(item.candidates[0].nll)
        done += len(group)
        if progress is not None:
            progress(done, len(items), sum(right) / len(right))
    accuracy, error = mean_and_error(np.array(right))
    normalized, normalized_error = mean_and_error(np.array(right_normalized)) if right_normalized else (None, None)
    return TaskResult(
        name=file.name,
        form=file.form,
        file_sha256=file.sha256,
        tasks=len(items),
        bos=bos,
        accuracy=accuracy,
        accuracy_stderr=error,
        accuracy_normalized=normalized,
        accuracy_normalized_stderr=normalized_error,
        perplexity=exponential(float(np.mean(nlls))) if nlls else None,
    )


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half a character (a lone surrogate), which no tokenizer takes")
    return value


def _read_line(line: bytes, where: str) -> ChoiceTask | ContinuationTask:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError("TASK_INVALID", f"{where} is not JSON ({error})", _FORMS) from error
    if not isinstance(data, dict):
        raise BadInputError("TASK_INVALID", f"{where} is not a JSON object", _FORMS)
    try:
        return (ContinuationTask if "continuation" in data else ChoiceTask).model_validate(data)
    except ValidationError as error:
        raise BadInputError("TASK_INVALID", f"{where}: {describe(error)}", _FORMS) from error


def _item(
    executor: Executor, tokenizer: Tokenizer, task: ChoiceTask | ContinuationTask, where: str, front: Sequence[int]
) -> _Item:
    given = task.query if isinstance(task, ChoiceTask) else task.context
    scored = task.choices if isinstance(task, ChoiceTask) else (task.continuation,)
    candidates = []
    for text in scored:
        ids, split = split_text(tokenizer, given, text)
        tokens = check_tokens(executor, [*front, *ids], where)
        require_context(executor, len(tokens), where)
        if split + len(front) < 1:
            raise BadInputError(
                "TASK_INVALID", f"{where}: the tokenizer leaves nothing before the scored text", "evaluate with --bos"
            )
        candidates.append(_Candidate(tokens, split + len(front)))
    return _Item(where, candidates)


def _groups(items: Sequence[_Item], executor: Executor) -> Iterator[list[_Item]]:
    """Consecutive tasks that run together: one a slot, and bounded logits."""
    budget = rows_per_forward(executor.vocab_size)
    group: list[_Item] = []
    rows = 0
    for item in items:
        if group and (len(group) == executor.slots or rows + item.rows() > budget):
            yield group
            group, rows = [], 0
        group.append(item)
        rows += item.rows()
    yield group


def _run_group(executor: Executor, group: Sequence[_Item]) -> None:
    """Fill in the candidates: the shared tokens of all tasks at once, then the first candidates, the second, ..."""
    prefixes = [
        Segment(slot, 0, item.candidates[0].ids[: item.shared]) for slot, item in enumerate(group) if item.shared
    ]
    if prefixes:
        logits = executor.forward(prefixes)
        for row, segment in enumerate(prefixes):
            item = group[segment.slot]
            for candidate in item.candidates:
                # the prefix's last row predicts the token after it, which is scored where the scored part starts there
                if candidate.split == item.shared:
                    _add(candidate, item.shared, item.shared + 1, logits[row : row + 1], item.where)
    for number in range(max(len(item.candidates) for item in group)):
        segments: list[Segment] = []
        owners: list[tuple[_Item, _Candidate]] = []
        for slot, item in enumerate(group):
            if number < len(item.candidates):
                candidate = item.candidates[number]
                rest = candidate.ids[item.shared : -1]  # the last token predicts nothing that is scored
                if len(rest):
                    segments.append(Segment(slot, item.shared, rest, "all"))
                    owners.append((item, candidate))
        if not segments:
            continue
        logits = executor.forward(segments)
        row = 0
        for segment, (item, candidate) in zip(segments, owners, strict=True):
            begin = max(candidate.split, item.shared + 1)
            end = len(candidate.ids)
            if begin < end:
                # row r of the segment predicts token shared + r + 1
                _add(
                    candidate, begin, end, logits[row + begin - item.shared - 1 : row + len(segment.tokens)], item.where
                )
            row += len(segment.tokens)


def _add(candidate: _Candidate, begin: int, end: int, logits: Logits, where: str) -> None:
    scores = score_rows(logits, candidate.ids[begin:end], where)
    candidate.nll += float(scores.nll.sum())
    candidate.greedy = candidate.greedy and bool(scores.greedy.all())
