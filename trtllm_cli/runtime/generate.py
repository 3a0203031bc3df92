"""Generation: requests share the executor's slots, each one leaves when it is done and the next takes its place."""

from __future__ import annotations

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from trtllm_cli.errors import BadInputError, DoesNotFitError
from trtllm_cli.models.spec import Frozen
from trtllm_cli.runtime.executor import ChoosingExecutor, Executor, Segment
from trtllm_cli.runtime.sampling import Sampler, Sampling
from trtllm_cli.runtime.tokenizer import TextStream, Tokenizer

FinishReason = Literal["eos", "length", "stop", "context"]


class Request(Frozen):
    """One prompt, as token ids, and how to continue it."""

    tokens: tuple[int, ...]
    max_new_tokens: int = Field(default=128, gt=0)
    sampling: Sampling = Sampling()
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    ignore_eos: bool = False


class Completion(Frozen):
    """What came of a request. ``text`` ends before a stop string; times are seconds from the start of the call."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_s: float
    total_s: float


#: called with (index of the request, a piece of its text)
OnText = Callable[[int, str], None]


class _Active:
    """A request in a slot."""

    def __init__(self, index: int, request: Request, repeat: int, slot: int, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.slot = slot
        self.tokens: list[int] = []
        self.sampler = Sampler(request.sampling, repeat, request.tokens)
        self.stream = TextStream(tokenizer)
        self.text = ""
        self.emitted = 0
        self.first_token_s = 0.0

    @property
    def length(self) -> int:
        """Tokens in the cache once the newest one has run."""
        return len(self.request.tokens) + len(self.tokens)

    def take(self, token: int, eos: frozenset[int], context: int) -> FinishReason | None:
        """Take the next token; the reason when it ends the request."""
        if token in eos and not self.request.ignore_eos:
            return "eos"
        self.tokens.append(token)
        self.text += self.stream.push(token)
        if self._stopped():
            return "stop"
        if len(self.tokens) >= self.request.max_new_tokens:
            return "length"
        # the newest token still has to run, which takes a place in the cache
        return "context" if self.length > context else None

    def _stopped(self) -> bool:
        places = [place for place in (self.text.find(stop) for stop in self.request.stop) if place >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def fresh_text(self, finished: FinishReason | None) -> str:
        """Text not shown yet, holding back what could become a stop string."""
        if finished is not None:
            if finished != "stop":
                self.text += self.stream.flush()
                self._stopped()
            end = len(self.text)
        else:
            end = len(self.text) - max((_overlap(self.text, stop) for stop in self.request.stop), default=0)
        piece = self.text[self.emitted : end]
        self.emitted = max(self.emitted, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def check_prompt(tokens: Sequence[int], context: int, which: str) -> None:
    """Raises BadInputError for an empty prompt, DoesNotFitError for one that leaves no room for a new token."""
    if not tokens:
        raise BadInputError("PROMPT_EMPTY", f"{which} has no tokens", "give at least one character of text")
    if len(tokens) >= context + 1:
        raise DoesNotFitError(
            "PROMPT_TOO_LONG",
            f"{which} has {len(tokens)} tokens, the engine's context holds {context}",
            f"shorten it, or build the engine with --context {len(tokens) + 128}",
        )


def generate(
    executor: Executor,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    on_text: OnText | None = None,
) -> list[Completion]:
    """Continue every request; completions in the order of the requests.

    A prompt runs through the model alone and generation steps run together, so a request's prefill does not depend on
    its neighbours. Raises as :func:`check_prompt` before anything runs.
    """
    for index, request in enumerate(requests):
        check_prompt(request.tokens, executor.context, f"prompt {index + 1}" if len(requests) > 1 else "the prompt")
    started = time.perf_counter()
    eos = frozenset(tokenizer.info.eos_ids)
    waiting = deque(enumerate(requests))
    free = list(range(executor.slots))  # a heap: low slots first, so that batches of few sequences stay narrow
    choose, release = _choice(executor)
    active: list[_Active] = []
    done: dict[int, Completion] = {}
    repeats: Counter[tuple[tuple[int, ...], int]] = Counter()

    def advance(one: _Active, token: int) -> bool:
        reason = one.take(token, eos, executor.context)
        now = time.perf_counter() - started
        one.first_token_s = one.first_token_s or now
        piece = one.fresh_text(reason)
        if on_text is not None and piece:
            on_text(one.index, piece)
        if reason is None:
            return True
        heapq.heappush(free, one.slot)
        release(one.slot)
        done[one.index] = Completion(
            text=one.text,
            tokens=tuple(one.tokens),
            finish_reason=reason,
            prompt_tokens=len(one.request.tokens),
            first_token_s=one.first_token_s,
            total_s=now,
        )
        return False

    while waiting or active:
        while waiting and free:
            index, request = waiting.popleft()
            what = (request.tokens, request.sampling.seed)
            one = _Active(index, request, repeats[what], heapq.heappop(free), tokenizer)
            repeats[what] += 1
            prompt = np.asarray(request.tokens, np.int32)
            if advance(one, choose([Segment(one.slot, 0, prompt)], [one.sampler])[0]):
                active.append(one)
        if active:
            active.sort(key=lambda one: one.slot)
            steps = [Segment(one.slot, one.length - 1, np.array(one.tokens[-1:], np.int32)) for one in active]
            tokens = choose(steps, [one.sampler for one in active])
            active = [one for one, token in zip(active, tokens, strict=True) if advance(one, token)]
    return [done[index] for index in range(len(requests))]


def _choice(
    executor: Executor,
) -> tuple[Callable[[Sequence[Segment], Sequence[Sampler]], list[int]], Callable[[int], None]]:
    """How to run segments and choose a token after each, where the executor can or here; how to free a slot."""
    if isinstance(executor, ChoosingExecutor):
        return executor.choose, executor.release

    def choose(segments: Sequence[Segment], samplers: Sequence[Sampler]) -> list[int]:
        logits = executor.forward(segments)
        return [sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)]

    return choose, lambda slot: None
