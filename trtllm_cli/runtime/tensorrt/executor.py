"""TensorRT behind the runtime's executor interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trtllm_cli.artifacts.tensorrt import TensorRTTactics
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UserError
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.ops.segment import Logits, Segment
from trtllm_cli.runtime import sampling_torch
from trtllm_cli.runtime.executor import check_segments
from trtllm_cli.runtime.sampling import Sampler, not_finite
from trtllm_cli.runtime.tensorrt.memory import ALIGNMENT, Memory
from trtllm_cli.runtime.tensorrt.passes import Pass, Planner

#: cache input -> its updated self, an output that TensorRT writes in place
_UPDATED = ".updated"
#: of the likeliest token of a row: its id, int64, and its logit, float32
_BEST_BYTES = 12
#: a generation step (see :attr:`Pass.key`), and whether its likeliest tokens are wanted
_Key = tuple[tuple[int, int, int, int], bool]


class Session(Protocol):
    """An opened engine: TensorRT's own, or the reference's."""

    def context(self, profile: int) -> Any:
        """A new execution context, with TensorRT's interface, in which the profile is chosen.

        Raises UserError when it cannot be made.
        """
        ...

    def complaints(self) -> str:
        """What was recorded since the last call, in one sentence."""
        ...

    def settled(self) -> None:
        """Called after work with new contexts: kernels compiled meanwhile can be kept."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for reports."""
        ...

    def close(self) -> None:
        """Release the engine."""
        ...


class TensorRTExecutor:
    """See :class:`trtllm_cli.runtime.executor.ChoosingExecutor`; owns ``session`` and ``memory``.

    Caches, zeroed, are one tensor [slots, kv_heads, context, head_dim] an input, shared by the contexts of all
    profiles; a batch is bound to the address of its first slot. ``weights`` are inputs that stay the same. With
    ``graphs`` a generation step is captured as a CUDA graph when it comes for the second time, and replayed from then
    on: the copy of its tokens, the pass, and, where all texts are greedy, the choice and its copy back.
    """

    def __init__(
        self,
        session: Session,
        memory: Memory,
        spec: DecoderSpec,
        dtype: torch.dtype,
        tactics: TensorRTTactics,
        context: int,
        slots: int,
        weights: Mapping[str, torch.Tensor],
        graphs: bool = True,
    ) -> None:
        self.context = context
        self.slots = slots
        self.vocab_size = spec.vocab_size
        self._session = session
        self._memory = memory
        self._tactics = tactics
        self._planner = Planner(tactics, context, slots)
        self._graphs = graphs and memory.has_graphs
        shape = (slots, spec.num_kv_heads, context, spec.head_dim)
        self._stride = dtype.itemsize * spec.num_kv_heads * context * spec.head_dim
        if slots > 1 and self._stride % ALIGNMENT:
            raise UnsupportedError(
                "CACHE_UNALIGNED",
                f"a sequence's cache of {self._stride} bytes a layer is not a multiple of the {ALIGNMENT} that TensorRT"
                " wants addresses to be",
                f"build the engine with --context {_aligned(context, self._stride)}",
            )
        most_tokens = max(profile.batch[2] * profile.tokens[2] for profile in tactics.profiles)
        most_rows = max(profile.rows[2] for profile in tactics.profiles)
        # starts, rows and tokens go to the device in one copy, each from an aligned place
        places = ALIGNMENT // 4
        self._rows_at = -(-slots // places) * places
        self._tokens_at = self._rows_at + -(-most_rows // places) * places
        with _explained(slots, context):
            self._inputs = memory.zeros((self._tokens_at + most_tokens,), torch.int32)
            self._logits = memory.zeros((most_rows, spec.vocab_size), torch.float32)
            self._caches = {
                f"layers.{layer}.{part}_cache": memory.zeros(shape, dtype)
                for layer in range(spec.num_layers)
                for part in "kv"
            }
            self._positions = memory.upload(torch.arange(context, dtype=torch.int32))
            self._weights = {name: memory.upload(values) for name, values in weights.items()}
            self._best = memory.zeros((most_rows * _BEST_BYTES,), torch.uint8)
        self._staging = torch.zeros(self._inputs.shape, dtype=torch.int32, pin_memory=memory.has_graphs)
        self._best_here = torch.zeros(self._best.shape, dtype=torch.uint8, pin_memory=memory.has_graphs)
        best, ids = _best_of(self._best_here)
        self._found = best.numpy(), ids.numpy()
        #: whether the device may still read the staging buffer
        self._reading = False
        self._owners: tuple[Any, NDArray[np.intp], list[int]] = (None, np.empty(0, np.intp), [])
        self._contexts: dict[int, Any] = {}
        self._bound: dict[int, tuple[Any, ...]] = {}
        self._ran: set[_Key] = set()
        self._replays: dict[_Key, Callable[[], None]] = {}
        #: whether kernels were compiled since they were last kept
        self._fresh = False

    # ---- what the runtime calls -------------------------------------------------------------------------------------

    def forward(self, segments: Sequence[Segment]) -> Logits:
        """See :class:`trtllm_cli.runtime.executor.Executor`."""
        parts: list[list[Logits]] = [[] for _ in segments]
        for one, logits in self._run(segments):
            if (one.owners < 0).all():
                continue
            with self._memory.active():
                # a copy on the host too: the next pass overwrites them
                found = logits.to("cpu", copy=True).numpy()
            self._reading = False  # that waited
            for row, owner in enumerate(one.owners):
                if owner >= 0:
                    parts[owner].append(found[row : row + 1])
        rows = [row for part in parts for row in part]
        return np.concatenate(rows) if rows else np.empty((0, self.vocab_size), np.float32)

    def choose(self, segments: Sequence[Segment], samplers: Sequence[Sampler]) -> list[int]:
        """See :class:`trtllm_cli.runtime.executor.ChoosingExecutor`."""
        tokens: dict[int, int | None] = {}
        greedy = all(one.greedy for one in samplers)
        for one, logits in self._run(segments, greedy):
            wanted, owners = self._wanted(one)
            if not owners:
                continue
            if greedy:
                chosen = self._likeliest(wanted)
                for owner, token in zip(owners, chosen, strict=True):
                    if token is not None:
                        samplers[owner].take(token)
            else:
                with self._memory.active():
                    rows = logits
                    if len(owners) < len(one.owners):
                        rows = logits[torch.from_numpy(wanted).to(logits.device)]
                    chosen = sampling_torch.choose(rows, [samplers[owner] for owner in owners])
                self._reading = False  # that waited
            tokens.update(zip(owners, chosen, strict=True))
        found = [tokens[index] for index in range(len(segments))]
        if any(token is None for token in found):
            # a masked position contributes 0 times its value, and 0 times NaN is NaN: nothing of it may stay
            with self._memory.active():
                for cache in self._caches.values():
                    cache.zero_()
            raise not_finite("build it with --dtype bfloat16, or --dtype float32")
        return [token for token in found if token is not None]

    def release(self, slot: int) -> None:
        """See :class:`trtllm_cli.runtime.executor.ChoosingExecutor`."""
        self._planner.release(slot)

    def describe(self) -> dict[str, Any]:
        return {**self._session.describe(), "graphs": self._graphs, "profiles": len(self._tactics.profiles)}

    def close(self) -> None:
        self._memory.synchronize()
        self._replays.clear()
        self._contexts.clear()
        self._session.close()
        self._caches.clear()
        self._weights.clear()

    # ---- passes -----------------------------------------------------------------------------------------------------

    def _run(self, segments: Sequence[Segment], greedy: bool = False) -> Iterator[tuple[Pass, torch.Tensor]]:
        """Each pass with its logits [R, vocab], which the next one overwrites; ``greedy``: see :meth:`_likeliest`."""
        passes: Iterable[Pass]
        if (steady := self._planner.steady(segments, self.vocab_size)) is not None:
            passes = (steady,)
        else:
            check_segments(segments, self.context, self.slots, self.vocab_size)
            passes = self._planner.plan(segments)
        for one in passes:
            self._execute(one, greedy)
            yield one, self._logits[: len(one.rows)]
        if self._fresh:
            self._wait()
            self._session.settled()
            self._fresh = False

    def _execute(self, one: Pass, greedy: bool) -> None:
        self._stage(one)
        key = None if one.key is None else (one.key, greedy)
        if key is not None and key in self._replays:
            self._replays[key]()
            return
        context = self._bind(one)

        def work() -> None:
            self._send(one)
            self._enqueue(context)
            if greedy:
                self._pick(len(one.rows))

        with self._memory.active():
            work()
        if key is None:
            return
        if key not in self._ran:
            self._ran.add(key)
            self._fresh = True
        elif self._graphs:
            # right after it ran with these shapes: TensorRT prepares itself for new ones while it enqueues
            self._replays[key] = self._memory.capture(work)

    def _stage(self, one: Pass) -> None:
        """Put starts, rows and tokens where the device reads them."""
        if self._reading:
            self._wait()
        staging = self._staging.numpy()
        staging[: len(one.starts)] = one.starts
        staging[self._rows_at : self._rows_at + len(one.rows)] = one.rows
        staging[self._tokens_at : self._tokens_at + one.tokens.size] = one.tokens.reshape(-1)
        self._reading = True

    def _send(self, one: Pass) -> None:
        """Enqueue the copy of what is staged."""
        used = self._tokens_at + one.tokens.size
        self._inputs[:used].copy_(self._staging[:used], non_blocking=True)

    def _pick(self, rows: int) -> None:
        """Enqueue the search for the likeliest token of each row, and the copy of what was found."""
        best, ids = _best_of(self._best)
        torch.max(self._logits[:rows], dim=1, out=(best[:rows], ids[:rows]))
        self._best_here.copy_(self._best, non_blocking=True)

    def _likeliest(self, wanted: NDArray[np.intp]) -> list[int | None]:
        """The likeliest tokens of some rows of the pass enqueued with ``greedy``; None where one is not finite."""
        self._wait()
        best, ids = self._found
        tokens: list[int | None] = ids[wanted].tolist()
        finite = np.isfinite(best[wanted])  # a NaN anywhere is the maximum
        return tokens if finite.all() else [token if fine else None for token, fine in zip(tokens, finite, strict=True)]

    def _wanted(self, one: Pass) -> tuple[NDArray[np.intp], list[int]]:
        """The rows of a pass that somebody wants, and who; kept while passes share their owners."""
        if one.owners is not self._owners[0]:
            rows = np.flatnonzero(one.owners >= 0)
            self._owners = one.owners, rows, one.owners[rows].tolist()
        return self._owners[1], self._owners[2]

    def _wait(self) -> None:
        self._memory.synchronize()
        self._reading = False

    def _bind(self, one: Pass) -> Any:
        """The context of the profile with the pass's shapes and addresses."""
        context = self._contexts.get(one.profile)
        if context is None:
            context = self._contexts[one.profile] = self._session.context(one.profile)
            self._fresh = True
            for name, weight in self._weights.items():
                self._set_address(context, name, weight.data_ptr())
            self._set_address(context, "logits", self._logits.data_ptr())
            self._set_address(context, "seen", self._positions.data_ptr())
            for name, at in (("starts", 0), ("rows", self._rows_at), ("token_ids", self._tokens_at)):
                self._set_address(context, name, self._inputs.data_ptr() + 4 * at)
        bound = (one.base, one.tokens.shape, len(one.rows), one.seen)
        if self._bound.get(one.profile) == bound:
            return context
        batch = len(one.starts)
        self._set_shape(context, "token_ids", one.tokens.shape)
        self._set_shape(context, "starts", (batch,))
        self._set_shape(context, "rows", (len(one.rows),))
        self._set_shape(context, "seen", (one.seen,))
        for name, cache in self._caches.items():
            address = cache.data_ptr() + one.base * self._stride
            self._set_shape(context, name, (batch, *cache.shape[1:]))
            self._set_address(context, name, address)
            self._set_address(context, name + _UPDATED, address)
        self._bound[one.profile] = bound
        return context

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._memory.stream):
            raise self._refused("to run")

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise self._refused(f"shape {shape} for {name}")

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._refused(f"an address for {name}")

    def _refused(self, what: str) -> UserError:
        reason = self._session.complaints() or "it gave no reason"
        return BadInputError(
            "ENGINE_REFUSED",
            f"the engine refused {what}: {reason}",
            "repeat `trtllm-cli build --backend tensorrt` with --force; if that does not help, report this message",
        )


def _best_of(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits, float32 [R], and their ids, int64 [R], in a block of bytes."""
    most = len(block) // _BEST_BYTES
    return block[8 * most :].view(torch.float32), block[: 8 * most].view(torch.int64)


@contextlib.contextmanager
def _explained(slots: int, context: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            "GPU_MEMORY",
            f"the caches of {slots} sequences of {context} tokens do not fit the GPU's memory"
            f" ({str(error).partition('. ')[0]})",
            "build the engine with a smaller --context or --concurrency",
        ) from error


def _aligned(context: int, stride: int) -> int:
    """The next larger context whose cache is a multiple of the alignment."""
    position = stride // context
    while context * position % ALIGNMENT:
        context += 1
    return context
