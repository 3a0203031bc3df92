"""An engine in memory: packed weights, a cache of keys and values, and the forward pass.

>>> model = NativeModel(plan, modules, tensors, context=2048, slots=2)
>>> logits = model.forward([Segment(slot=0, start=0, tokens=prompt, want="last")])
>>> logits = model.forward([Segment(slot=0, start=len(prompt), tokens=[next_token], want="last")])

A *slot* holds one sequence's cache. Segments of one call are packed along one token axis without padding: prompts,
chunks of prompts and single tokens mix freely. The weights are used where they lie (memory-mapped files are fine) and
must not change.

Arithmetic. In the float32 mode activations are float32 throughout. In the bfloat16 mode products of up to four rows
(decoding a few sequences) keep float32 activations, except against int4 weights, where each is the sum of two bfloat16
numbers (relative error 2^-17); products of more rows round activations to bfloat16. Sums, norms, softmax and the
residual are float32 always. Modules with quantized activations take int8 rows into exact integer sums, or E4M3 rows
into float32 sums of exact products, times the scales of row and output. An int8 or fp8 cache rounds keys and values
once, when they are written. Results are the same bits for any number of threads. A sequence's results depend on what
else is in the batch only through the number of rows: up to four (eight in the float32 mode) decoding gives the same
bits as alone, and beyond that the same bits for every larger batch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError
from trtllm_cli.models.rotary import tables
from trtllm_cli.ops.native import library
from trtllm_cli.ops.native.lowering import lower
from trtllm_cli.ops.native.packing import PackedModule, kv_scale_names, packed_layout, padded
from trtllm_cli.ops.native.plan import Plan
from trtllm_cli.ops.segment import Segment

Floats = NDArray[np.float32]
Gemm = Literal["bfloat16", "float32"]
KvDtype = Literal["float16", "float32", "int8", "fp8"]

_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "fp8": 5, "int8_dot": 6}
_CACHES = {"float16": 0, "float32": 1, "int8": 2, "fp8": 3}
_WANTS = {"none": 0, "last": 1, "all": 2}
_MAX_HEAD_DIM = 1024
_BAD_INPUT, _DOES_NOT_FIT, _NO_MEMORY = 2, 3, 4


class NativeModel:
    """A model ready to run on the CPU.

    ``modules`` describes every matrix of the plan and ``tensors`` holds the packed arrays
    (:mod:`trtllm_cli.ops.native.packing`). ``context`` positions for each of ``slots`` sequences are reserved but take
    memory only as they fill. ``gemm`` is the arithmetic of products of many rows: bfloat16 operands with float32
    sums (where the processor has them, else float32), or float32 (see the module). ``kv_dtype`` is how keys and values
    are kept; int8 and fp8 need the scales of each layer (:func:`~trtllm_cli.ops.native.packing.pack_kv_scales`).
    ``threads`` defaults to the processors this process may use. ``chunk`` bounds the tokens of one pass, and with them
    the scratch memory.

    Raises BadInputError where tensors do not fit the plan, UnsupportedError where there is no native library, and
    DoesNotFitError where the cache cannot be reserved. ``close()`` frees everything.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, PackedModule],
        tensors: Mapping[str, NDArray[Any]],
        *,
        context: int,
        slots: int = 1,
        gemm: Gemm = "bfloat16",
        kv_dtype: KvDtype = "float16",
        threads: int | None = None,
        chunk: int = 512,
        native: library.NativeLibrary | None = None,
    ) -> None:
        self.plan, self.context, self.slots = plan, context, slots
        self._model: ctypes.c_void_p | None = None
        self._check_sizes(context, slots, chunk, 1 if threads is None else threads)
        self.library = native or library.load()
        self._c = self.library.handle
        # everything the library points into must outlive it
        self._kept: list[NDArray[Any]] = []
        self.threads = threads or len(os.sched_getaffinity(0))
        handle = ctypes.c_void_p()
        status = self._c.tn_new(
            self.threads,
            chunk,
            int(gemm == "bfloat16"),
            plan.vocab_size,
            slots,
            plan.num_layers,
            plan.num_kv_heads,
            context,
            plan.head_dim,
            _CACHES[kv_dtype],
            ctypes.byref(handle),
        )
        self._checked(status)
        self._model = handle
        #: what products of many rows really use
        self.kv_dtype = kv_dtype
        self.gemm: Gemm = "bfloat16" if gemm == "bfloat16" and self.library.isa == "avx512bf16" else "float32"
        try:
            self._load(plan, modules, tensors)
        except BaseException:
            self.close()
            raise
        lengths = self._c.tn_lengths(self._model)
        self._lengths: NDArray[np.int32] = np.ctypeslib.as_array(lengths, shape=(slots,))

    def _check_sizes(self, context: int, slots: int, chunk: int, threads: int) -> None:
        if min(context, slots, chunk, threads) < 1:
            raise BadInputError(
                "ENGINE_LIMITS",
                f"context {context}, slots {slots}, chunk {chunk} and threads {threads} must be positive",
                "",
            )
        if context > self.plan.max_positions:
            raise DoesNotFitError(
                "CONTEXT_TOO_LONG",
                f"context {context} exceeds the {self.plan.max_positions} positions the model was trained for",
                f"--context {self.plan.max_positions}",
            )
        if self.plan.head_dim > _MAX_HEAD_DIM:
            raise UnsupportedError(
                "HEAD_DIM", f"head size {self.plan.head_dim} exceeds {_MAX_HEAD_DIM}", "build for another backend"
            )

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _load(self, plan: Plan, modules: Mapping[str, PackedModule], tensors: Mapping[str, NDArray[Any]]) -> None:
        for name in plan.matrices:
            self._add_matrix(plan, name, modules, tensors)
        program = lower(plan, modules)
        for name in program.vectors:
            length = -(-plan.vectors[name] // 16) * 16
            values = self._tensor(tensors, f"{name}.weight", np.dtype(np.float32), length)
            self._checked(self._c.tn_add_vector(self._model, values.ctypes.data))
        for width in program.buffer_widths:
            self._checked(self._c.tn_add_buffer(self._model, width))
        for rotary in plan.rotaries:
            cos, sin = (np.ascontiguousarray(t, dtype=np.float32) for t in tables(rotary, self.context))
            self._kept += [cos, sin]
            self._checked(self._c.tn_add_rotary(self._model, cos.ctypes.data, sin.ctypes.data, rotary.dim))
        for name in program.orders:
            self._add_order(name, modules, tensors)
        if self.kv_dtype in ("int8", "fp8"):
            self._add_kv_scales(plan, tensors)
        for ints, floats in program.ops:
            packed_ints = (ctypes.c_int64 * len(ints))(*ints)
            self._checked(self._c.tn_add_op(self._model, packed_ints, (ctypes.c_float * 3)(*floats)))
        self._checked(self._c.tn_finish(self._model))

    def _add_matrix(
        self, plan: Plan, name: str, modules: Mapping[str, PackedModule], tensors: Mapping[str, NDArray[Any]]
    ) -> None:
        use, module = plan.matrices[name], modules.get(name)
        if module is None:
            raise BadInputError("ENGINE_MODULE_MISSING", f"the engine lacks module {name}", "build the engine again")
        if (module.n, module.k) != (use.n, use.k) or (use.bias and not module.has_bias):
            raise BadInputError(
                "ENGINE_MODULE_SHAPE",
                f"module {name} is packed as [{module.n}, {module.k}]{' without bias' if use.bias else ''} "
                f"and the plan needs [{use.n}, {use.k}]",
                "build the engine again",
            )
        found = {
            key: self._tensor(tensors, key, dtype, size) for key, (dtype, size) in packed_layout(name, module).items()
        }

        def address(part: str) -> int | None:
            array = found.get(f"{name}.{part}")
            return None if array is None else array.ctypes.data

        self._checked(
            self._c.tn_add_weight(
                self._model,
                _FORMATS[module.format],
                module.n,
                module.k,
                module.group_size or 0,
                int(module.scale_dtype == "float16"),
                address("packed"),
                address("scale"),
                address("zero"),
                address("bias"),
            )
        )

    def _add_order(self, name: str, modules: Mapping[str, PackedModule], tensors: Mapping[str, NDArray[Any]]) -> None:
        (k, *others) = {module.k for module in modules.values() if module.order == name}
        order = self._tensor(tensors, name, np.dtype(np.int32), padded(k, 4))
        if others or not np.array_equal(np.sort(order[:k]), np.arange(k)):
            raise BadInputError(
                "ENGINE_ORDER", f"tensor {name} is not an order of {k} inputs for all its modules", "build it again"
            )
        self._checked(self._c.tn_add_order(self._model, order.ctypes.data))

    def _add_kv_scales(self, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> None:
        for layer in range(plan.num_layers):
            size = padded(plan.num_kv_heads, 4)
            scales = [self._tensor(tensors, name, np.dtype(np.float32), size) for name in kv_scale_names(layer)]
            self._checked(self._c.tn_add_kv_scales(self._model, *(array.ctypes.data for array in scales)))

    def _tensor(self, tensors: Mapping[str, NDArray[Any]], name: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        array = tensors.get(name)
        if array is None:
            raise BadInputError("ENGINE_TENSOR_MISSING", f"the engine lacks tensor {name}", "build the engine again")
        # float16 and uint16, int8 and uint8 are the same bytes: what a container calls them does not matter
        if array.dtype.itemsize != dtype.itemsize or array.size != size or not array.flags.c_contiguous:
            raise BadInputError(
                "ENGINE_TENSOR_SHAPE",
                f"tensor {name} has {array.size} elements of {array.dtype}, not {size} of {dtype}",
                "build the engine again",
            )
        self._kept.append(array)
        return array

    # ---- running ---------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Cached positions of each slot (a copy)."""
        found: NDArray[np.int32] = self._lengths.copy()
        return found

    @staticmethod
    def rows(segments: Sequence[Segment]) -> int:
        """Rows of logits :meth:`forward` returns for these segments."""
        return sum({"none": 0, "last": 1}.get(s.want, len(s.tokens)) for s in segments)

    def forward(self, segments: Sequence[Segment], out: Floats | None = None) -> Floats:
        """Run the segments' tokens; wanted logits [rows, vocab] in segment order, float32.

        A segment may start at or before its slot's length (what lay beyond is forgotten). ``out``, C-contiguous
        [rows, vocab], receives the result in place of a new array. The GIL is released meanwhile. Raises BadInputError
        for bad ids, slots or positions and DoesNotFitError CONTEXT_EXCEEDED; nothing has run then.
        """
        if self._model is None:
            raise ValueError("the model is closed")
        count = len(segments)
        table = np.empty((count, 4), dtype=np.int64)
        arrays = [np.asarray(s.tokens) for s in segments]
        for i, (s, tokens) in enumerate(zip(segments, arrays, strict=True)):
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                raise BadInputError("TOKENS_SHAPE", f"segment {i} is not a row of integer token ids", "")
            if tokens.size and tokens.dtype != np.int32:
                # a wrapped id would name another token
                tokens = arrays[i] = np.clip(tokens, -1, np.iinfo(np.int32).max).astype(np.int32)
            table[i] = s.slot, s.start, tokens.size, _WANTS[s.want]
        ids = np.ascontiguousarray(np.concatenate(arrays), dtype=np.int32) if arrays else np.empty(0, np.int32)
        shape = (self.rows(segments), self.plan.vocab_size)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise BadInputError("OUTPUT_SHAPE", f"the output is {out.dtype} {out.shape}, not float32 {shape}", "")
        self._checked(self._c.tn_forward(self._model, count, table.ctypes.data, ids.ctypes.data, out.ctypes.data))
        return out

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Give ``target`` the first ``length`` cached positions of ``source``."""
        for slot in (source, target):
            if not 0 <= slot < self.slots:
                raise BadInputError("SLOT_OUT_OF_RANGE", f"slot {slot} of {self.slots}", "")
        if not 0 <= length <= self._lengths[source]:
            raise BadInputError(
                "POSITION_GAP", f"slot {source} holds {self._lengths[source]} positions, not {length}", ""
            )
        if source != target:
            self._checked(self._c.tn_copy_slot(self._model, source, target, length))

    def reset(self, slot: int) -> None:
        """Forget what a slot holds."""
        if not 0 <= slot < self.slots:
            raise BadInputError("SLOT_OUT_OF_RANGE", f"slot {slot} of {self.slots}", "")
        self._lengths[slot] = 0

    def memory(self) -> dict[str, int]:
        """Bytes reserved: ``kv`` for the cache, ``scratch`` for activations (touched memory is less)."""
        return {
            "kv": int(self._c.tn_cache_bytes(self._model)),
            "scratch": int(self._c.tn_scratch_bytes(self._model)),
        }

    def poison(self) -> None:
        """Fill the scratch buffers with NaN: a debugging aid that shows reads of what was never written."""
        self._c.tn_poison(self._model)

    def close(self) -> None:
        """Stop the threads and free the cache. The model cannot be used afterwards."""
        if self._model is not None:
            self._lengths = np.zeros(self.slots, dtype=np.int32)
            self._c.tn_free(self._model)
            self._model = None

    def __enter__(self) -> NativeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()

    def _checked(self, status: int) -> None:
        if status == 0:
            return
        text = self._c.tn_message().decode()
        code, _, sentence = text.partition("|")
        if status == _BAD_INPUT:
            raise BadInputError(code, sentence, "")
        if status == _DOES_NOT_FIT:
            raise DoesNotFitError(code, sentence, "a shorter prompt, or build with a larger --context")
        if status == _NO_MEMORY:
            raise DoesNotFitError("OUT_OF_MEMORY", text, "a smaller --context or fewer slots")
        raise RuntimeError(f"native library: {text}")
