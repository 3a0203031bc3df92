"""Memory, stream and graphs of the device an execution context works on: a GPU by torch, or the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: what TensorRT wants addresses to be a multiple of
ALIGNMENT = 256


class Memory:
    """One device. On a GPU all work runs on a stream of its own: TensorRT synchronises more on the default one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        make: Any = torch.cuda.Stream
        self._stream = make(device) if device.type == "cuda" else None
        #: the handle that TensorRT takes
        self.stream = 0 if self._stream is None else int(self._stream.cuda_stream)
        #: where recorded work has its intermediate results: one place for all, since it is replayed in turn
        self._pool: Any = None

    @property
    def has_graphs(self) -> bool:
        """Whether work can be captured and replayed."""
        return self._stream is not None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An aligned tensor of zeros. A torch.OutOfMemoryError is the caller's to explain."""
        size = dtype.itemsize
        count = 1
        for extent in shape:
            count *= extent
        with self.active():
            raw = torch.zeros(count * size + ALIGNMENT, dtype=torch.uint8, device=self.device)
        skip = -raw.data_ptr() % ALIGNMENT
        return raw[skip : skip + count * size].view(dtype).view(shape)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """An aligned copy on the device."""
        placed = self.zeros(tuple(values.shape), values.dtype)
        with self.active():
            placed.copy_(values)
        return placed

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Torch work inside runs on this device's stream, without gradients."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield

    def synchronize(self) -> None:
        """Wait until all work is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` puts on the stream, without running it; the result replays it.

        ``work`` must have run before, so that nothing is allocated or compiled while recording.
        """
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            new: Any = torch.cuda.graph_pool_handle
            self._pool = new()
        with self.active():
            self.synchronize()
            # TensorRT's own threads may allocate meanwhile; that concerns this recording only if they were this thread
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()

        # made once: a step may take as long to prepare as to run
        here: Any = torch.cuda.stream(self._stream)

        def replay() -> None:
            with here:
                graph.replay()

        return replay
