"""Greedy texts: what the CPU engine writes and how sure it is, and where another engine parts from it.

Two engines that round differently part where two tokens are about equally likely, and write different texts from
there on. So a parting is reported with its gap: the logit of the token the CPU engine chose minus that of the token the
other engine chose, both by the CPU engine. Beside the free texts every position is also compared alone: the other
engine reads the CPU engine's text and says at each position which token it would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.models.spec import Frozen
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.executor import Executor
from trtllm_cli.runtime.generate import Request, generate
from trtllm_cli.runtime.tokenizer import Tokenizer

PROMPTS, NEW = 32, 64
#: of NEW tokens so many must be equal
EQUAL = 60
#: best logits kept of each position, to look a parting's gap up in
_KEPT = 16
#: below this gap a choice is a tie in 16-bit arithmetic (logits of 16 or more are multiples of 1/8 in bfloat16)
TIE = 0.5


class Text(Frozen):
    """A prompt, the CPU engine's greedy continuation, and per new token its best logits: (token, logit), falling."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    best: tuple[tuple[tuple[int, float], ...], ...]


class Parting(Frozen):
    """How another engine's text compares.

    ``same`` new tokens are equal before the first that is not, at which the gap is ``gap`` (None: nothing differs, or
    the other token is not among the best). ``agree`` counts the positions at which the other engine, reading the CPU
    engine's text, chooses the same token; ``worst`` is the largest gap among the others, ``unlisted`` how many of these
    chose a token that is not among the best.
    """

    same: int
    gap: float | None = None
    agree: int
    worst: float | None = None
    unlisted: int = 0

    @property
    def tie(self) -> bool:
        """Whether the engines part where the CPU engine is not sure."""
        return self.gap is not None and self.gap < TIE


def prompts(tokens: Sequence[int], count: int = PROMPTS) -> list[list[int]]:
    """``count`` prompts of 16 to 140 tokens, from places of a tokenized text that lie 512 tokens apart."""
    if len(tokens) < 512 * count:
        raise SystemExit(f"the text has {len(tokens)} tokens, {count} prompts take {512 * count}")
    return [list(tokens[512 * index : 512 * index + 16 + 4 * index]) for index in range(count)]


def write(executor: Executor, tokenizer: Tokenizer, given: Sequence[Sequence[int]], new: int = NEW) -> list[list[int]]:
    """Greedy continuations of all prompts, which share the executor's slots."""
    requests = [Request(tokens=tuple(prompt), max_new_tokens=new, ignore_eos=True) for prompt in given]
    return [list(done.tokens) for done in generate(executor, tokenizer, requests)]


def read(executor: Executor, prompt: Sequence[int], continuation: Sequence[int]) -> NDArray[np.float32]:
    """Logits [new, vocab] of each token of a continuation, given all before it."""
    if len(prompt) > 1:
        executor.forward([Segment(0, 0, np.array(prompt[:-1], np.int32), "none")])
    ids = np.array([prompt[-1], *continuation[:-1]], np.int32)
    return executor.forward([Segment(0, len(prompt) - 1, ids, "all")])


def reference(executor: Executor, tokenizer: Tokenizer, given: Sequence[Sequence[int]]) -> list[Text]:
    """What the CPU engine writes."""
    found = []
    for prompt, tokens in zip(given, write(executor, tokenizer, given), strict=True):
        logits = read(executor, prompt, tokens)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :_KEPT]
        best = tuple(
            tuple((int(token), float(row[token])) for token in chosen)
            for row, chosen in zip(logits, order, strict=True)
        )
        found.append(Text(prompt=tuple(prompt), tokens=tuple(tokens), best=best))
    return found


def gap(best: Sequence[tuple[int, float]], chosen: int, other: int) -> float | None:
    """The logit of ``chosen`` minus that of ``other``; None where one of them is not among ``best``."""
    logits = dict(best)
    return logits[chosen] - logits[other] if chosen in logits and other in logits else None


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def compare(text: Text, tokens: Sequence[int], logits: NDArray[np.float32]) -> Parting:
    """``tokens`` are another engine's continuation, ``logits`` [new, vocab] its logits along the CPU engine's text."""
    same = first_difference(text.tokens, tokens)
    parted = same < len(text.tokens)
    choices = logits.argmax(axis=1).tolist()
    others = [index for index, (a, b) in enumerate(zip(text.tokens, choices, strict=True)) if a != b]
    gaps = [gap(text.best[index], text.tokens[index], choices[index]) for index in others]
    return Parting(
        same=same,
        gap=gap(text.best[same], text.tokens[same], tokens[same]) if parted else None,
        agree=len(text.tokens) - len(others),
        worst=max((one for one in gaps if one is not None), default=None),
        unlisted=gaps.count(None),
    )


def itself(given: Sequence[Text]) -> dict[str, Any]:
    """How often the CPU engine, reading in one pass what it wrote token by token, prefers another token; by how much.

    Where its arithmetic amplifies the last place of a sum, as quantized inputs do, no other engine can be closer to it.
    """
    gaps = [
        best[0][1] - dict(best).get(token, best[-1][1])
        for text in given
        for token, best in zip(text.tokens, text.best, strict=True)
        if token != best[0][0]
    ]
    return {
        "positions": sum(len(text.tokens) for text in given),
        "others": len(gaps),
        "largest_gap": max(gaps, default=0.0),
    }


def verdict(partings: Sequence[Parting]) -> dict[str, Any]:
    """Of all prompts: how many texts are equal long enough, how many part before at a tie, and the rest."""
    equal = [one for one in partings if one.same >= EQUAL]
    tied = [one for one in partings if one.same < EQUAL and one.tie]
    early = [one.gap for one in partings if one.same < EQUAL and not one.tie]
    return {
        "prompts": len(partings),
        f"equal_for_{EQUAL}_of_{NEW}": len(equal),
        "part_at_a_tie": len(tied),
        "part_elsewhere": len(early),
        "largest_gap_at_a_parting": max((one.gap for one in partings if one.gap is not None), default=None),
        "least_agreeing_positions": min((one.agree for one in partings), default=None),
        "agreeing_positions": sum(one.agree for one in partings) / max(1, len(partings) * NEW),
        "met": not early,
    }
