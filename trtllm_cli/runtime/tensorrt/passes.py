"""From segments to passes: which profile runs what, on which slots, and where the wanted logits come out.

A batch of an execution context is a run of neighbouring slots, because it is bound to one address in each cache. New
tokens of prompts run on exactly their own slots. Single tokens (generation) run as one batch from the lowest to the
highest slot among them, widened to the size its profile was tuned for: so each profile sees few batch sizes, for which
kernels are specialised and CUDA graphs are kept. A slot between them that has no token runs an idle one, whose key and
value go just beyond what the slot holds, where its next token overwrites them before anything attends to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.tensorrt import TensorRTTactics
from trtllm_cli.ops.segment import Segment

Ints = NDArray[np.int32]
#: a batch of prompts may be padded to at most this many times its tokens; beyond, splitting it is faster
_MOST_PADDING = 1.5
#: attention walks at least so many positions; fewer are no faster
_LEAST_SEEN = 256


def reach(end: int, context: int) -> int:
    """How many positions attention walks for tokens up to position ``end - 1``: 256, 384, 512, 768, 1024, 1536, ...

    Few different lengths, because kernels are specialised for each and CUDA graphs are kept; at most a third is walked
    in vain. Never more than the context.
    """
    length = _LEAST_SEEN
    while length < end:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return min(length, context)


@dataclass(frozen=True)
class Pass:
    """One execution: ``profile`` index; caches bound from slot ``base`` on; ``tokens`` [B, S], ``starts`` [B].

    ``rows`` [R] are the flat indices (b * S + s) whose logits come out, ``owners`` [R] the indices of the segments they
    belong to, -1 for a row that nobody wants. Attention walks the first ``seen`` positions of the caches.
    """

    profile: int
    base: int
    tokens: Ints
    starts: Ints
    rows: Ints
    owners: Ints
    seen: int

    @property
    def key(self) -> tuple[int, int, int, int] | None:
        """(profile, base, batch, seen) of a generation step, whose shapes follow from these; None for prompts."""
        return (self.profile, self.base, len(self.starts), self.seen) if self.profile else None


class _Piece(NamedTuple):
    """A part of a segment that one pass takes; ``wanted`` of its last tokens have their logits returned."""

    owner: int
    slot: int
    start: int
    tokens: Ints | NDArray[Any] | Sequence[int]
    wanted: int


@dataclass
class _Steady:
    """A generation step that was one pass, as the one after it would be: ``starts`` of its segments, on ``rows``."""

    slots: list[int]
    starts: list[int]
    wants: list[str]
    rows: Ints
    latest: Pass


class Planner:
    """Plans passes for an engine of ``slots`` slots of ``context`` positions, keeping account of what slots hold."""

    def __init__(self, tactics: TensorRTTactics, context: int, slots: int) -> None:
        self._tactics = tactics
        self._context = context
        self._slots = slots
        #: positions of each slot that may hold something; of those in ``_steady`` only once that is settled
        self._lengths = [0] * slots
        self._steady: _Steady | None = None

    def steady(self, segments: Sequence[Segment], vocab_size: int) -> Pass | None:
        """The pass of a generation step that goes on with all sequences of the step before, and no other.

        None for any other step, and for segments that are not valid: the steps of long texts are mostly such, and the
        time that planning takes is time in which a GPU waits.
        """
        known = self._steady
        if known is None or [segment.slot for segment in segments] != known.slots:
            return None
        if [segment.start for segment in segments] != known.starts or max(known.starts) >= known.latest.seen:
            return None
        if [segment.want for segment in segments] != known.wants or any(len(one.tokens) != 1 for one in segments):
            return None
        new = np.array([segment.tokens[0] for segment in segments], np.int32)
        if new.min() < 0 or new.max() >= vocab_size:
            return None
        tokens, starts = known.latest.tokens.copy(), known.latest.starts.copy()
        tokens[known.rows, 0] = new
        starts[known.rows] += 1
        known.starts = [start + 1 for start in known.starts]
        known.latest = replace(known.latest, tokens=tokens, starts=starts)
        return known.latest

    def plan(self, segments: Sequence[Segment]) -> Iterator[Pass]:
        """The passes, in order. The segments must be valid (:func:`trtllm_cli.runtime.executor.check_segments`).

        A segment's rows come out in order, but passes of different segments may alternate.
        """
        self._settle()
        if all(len(segment.tokens) == 1 for segment in segments):
            # every step of generation comes here: no detours
            pieces = [
                _Piece(index, segment.slot, segment.start, segment.tokens, int(segment.want != "none"))
                for index, segment in enumerate(segments)
            ]
            pieces.sort(key=_slot)
            self._account(pieces)
            steps = list(self._steps(pieces))
            if len(steps) == 1:
                slots = [segment.slot for segment in segments]
                self._steady = _Steady(
                    slots=slots,
                    starts=[segment.start + 1 for segment in segments],
                    wants=[segment.want for segment in segments],
                    rows=np.array(slots, np.int32) - steps[0].base,
                    latest=steps[0],
                )
            yield from steps
            return
        queues = [self._pieces(index, segment) for index, segment in enumerate(segments)]
        for turn in range(max(map(len, queues), default=0)):
            pieces = sorted((queue[turn] for queue in queues if turn < len(queue)), key=_slot)
            self._account(pieces)
            for group in self._neighbours([piece for piece in pieces if len(piece.tokens) > 1]):
                yield self._prompts(group)
            yield from self._steps([piece for piece in pieces if len(piece.tokens) == 1])

    def release(self, slot: int) -> None:
        """Nothing that the slot holds is needed any more: idle tokens may run anywhere in it."""
        self._settle()
        self._lengths[slot] = 0

    def _settle(self) -> None:
        """Account for the steps that :meth:`steady` planned."""
        if self._steady is not None:
            for slot, end in zip(self._steady.slots, self._steady.starts, strict=True):
                self._lengths[slot] = max(end, self._lengths[slot])
            self._steady = None

    def _reach(self, profile: int, end: int) -> int:
        least, _, most = self._tactics.profiles[profile].seen
        return min(max(reach(end, self._context), least), most)

    def _account(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            end = piece.start + len(piece.tokens)
            self._lengths[piece.slot] = max(end, self._lengths[piece.slot]) if piece.start else end

    def _pieces(self, owner: int, segment: Segment) -> list[_Piece]:
        """A segment cut to what the context profile takes at once."""
        tokens = np.asarray(segment.tokens, np.int32)
        profile = self._tactics.context
        most = min(profile.tokens[2], profile.rows[2]) if segment.want == "all" else profile.tokens[2]
        pieces = []
        for begin in range(0, len(tokens), most):
            part = tokens[begin : begin + most]
            last = begin + len(part) == len(tokens)
            wanted = len(part) if segment.want == "all" else int(segment.want == "last" and last)
            pieces.append(_Piece(owner, segment.slot, segment.start + begin, part, wanted))
        return pieces

    def _neighbours(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces of prompts, sorted by slot, in groups that can share a batch and are worth padding."""
        profile = self._tactics.context
        group: list[_Piece] = []
        for piece in pieces:
            longer = [*group, piece]
            width = max(len(one.tokens) for one in longer)
            joins = (
                group
                and piece.slot == group[-1].slot + 1
                and len(longer) <= profile.batch[2]
                and sum(one.wanted for one in longer) <= profile.rows[2]
                and all(one.start + width <= self._context for one in longer)
                and len(longer) * width <= _MOST_PADDING * sum(len(one.tokens) for one in longer)
            )
            if group and not joins:
                yield group
                group = []
            group.append(piece)
        if group:
            yield group

    def _prompts(self, group: Sequence[_Piece]) -> Pass:
        width = max(len(piece.tokens) for piece in group)
        tokens = np.zeros((len(group), width), np.int32)
        rows: list[int] = []
        owners: list[int] = []
        for index, piece in enumerate(group):
            size = len(piece.tokens)
            tokens[index, :size] = piece.tokens
            rows += range(index * width + size - piece.wanted, index * width + size)
            owners += [piece.owner] * piece.wanted
        # a context returns at least so many rows
        for _ in range(len(rows), self._tactics.context.rows[0]):
            rows.append(0)
            owners.append(-1)
        starts = np.array([piece.start for piece in group], np.int32)
        # padding counts too: a token that sees no position of its window writes NaN, which masks do not keep out
        seen = self._reach(0, int(starts.max()) + width)
        return Pass(0, group[0].slot, tokens, starts, np.array(rows, np.int32), np.array(owners, np.int32), seen)

    def _steps(self, pieces: Sequence[_Piece]) -> Iterator[Pass]:
        """Single tokens, sorted by slot, as few batches as possible."""
        if not pieces:
            return
        low, high = pieces[0].slot, pieces[-1].slot
        span = high - low + 1
        profile = self._tactics.generation(span)
        _, usual, most = self._tactics.profiles[profile].batch
        tuned = min(usual if span <= usual else most, self._slots)  # a profile may take more than there are
        base = 0 if high < tuned else min(low, self._slots - tuned)
        taken = {piece.slot for piece in pieces}
        for first, batch in ((base, tuned), (low, span)):
            idle = set(range(first, first + batch)) - taken
            if all(self._lengths[slot] < self._context for slot in idle):
                yield self._step(profile, first, batch, pieces)
                return
        # a slot between them is full to its last position: no idle token can run there
        full = next(slot for slot in range(low, high) if slot not in taken and self._lengths[slot] >= self._context)
        yield from self._steps([piece for piece in pieces if piece.slot < full])
        yield from self._steps([piece for piece in pieces if piece.slot > full])

    def _step(self, profile: int, base: int, batch: int, pieces: Sequence[_Piece]) -> Pass:
        tokens = [0] * batch
        starts = self._lengths[base : base + batch]
        owners = [-1] * batch
        for piece in pieces:
            row = piece.slot - base
            tokens[row] = int(piece.tokens[0])
            starts[row] = piece.start
            if piece.wanted:
                owners[row] = piece.owner
        return Pass(
            profile,
            base,
            np.array(tokens, np.int32)[:, None],
            np.array(starts, np.int32),
            np.arange(batch, dtype=np.int32),
            np.array(owners, np.int32),
            self._reach(profile, 1 + max(starts)),  # idle tokens too, for the reason that padding counts
        )


def _slot(piece: _Piece) -> int:
    return piece.slot
