"""The next token of each request from its logits, on the GPU: greedy or sampled, reproducible by seed and step.

The order of the filters is that of :mod:`trtllm_cli.runtime.sampling`: penalties, temperature, top-k, top-p, min-p. The
random numbers are others: Philox4x32-10 with the request's seed as key and its step as counter. A row's token depends
on nothing else, not on the batch it is in, and :mod:`trtllm_cli.ops.cuda.sampling_twin` gives the same one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trtllm_cli.ops.cuda import library, sampling_twin
from trtllm_cli.ops.cuda.pointwise import check_device, check_rows, plain, refused

_i64, _i32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p

#: arrays with an entry a request, in the order of the operator's arguments
_ARRAYS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition": torch.float32,
    "frequency": torch.float32,
    "presence": torch.float32,
    "seeds": torch.int64,
    "steps": torch.int32,
}


class SamplingParams(ctypes.Structure):
    """trtllm_sampling_params."""

    _fields_ = [
        *((name, _ptr) for name in ("logits", "counts", *_ARRAYS, "tokens")),
        *((name, _i64) for name in ("logits_stride", "counts_stride")),
        *((name, _i32) for name in ("batch", "vocab", "dtype", "advance", "cluster", "pdl")),
    ]


def argmax(logits: Tensor, pdl: int = 0) -> Tensor:
    """int32 [batch]: the largest of logits [batch, vocab], the least id among equals; -1 as for ``sample``."""
    return sample(logits, pdl=pdl)


def prompt_counts(prompts: Sequence[Sequence[int]], vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """``counts`` int16 [batch, vocab] of requests without generated tokens: the sign bit of a prompt's tokens."""
    counts = torch.zeros(len(prompts), vocab, dtype=torch.int16)
    for row, prompt in zip(counts, prompts, strict=True):
        row[torch.tensor(sorted(set(prompt)), dtype=torch.int64)] = -(2**15)
    return counts.to(device)


def sample(
    logits: Tensor,
    counts: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition: Tensor | None = None,
    frequency: Tensor | None = None,
    presence: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    advance: bool = False,
    cluster: int = 0,
    pdl: int = 0,
) -> Tensor:
    """int32 [batch]: the next tokens for logits [batch, vocab] of float16, bfloat16 or float32, rows may be strided.

    All others are arrays [batch] on the same device, None for the neutral value: ``temperature`` (0: greedy),
    ``top_p``, ``min_p``, ``repetition``, ``frequency``, ``presence`` float32, ``top_k`` (0: all) and ``steps`` int32,
    ``seeds`` int64; ``counts`` int16 [batch, vocab] holds what was seen (``prompt_counts``; the low 15 bits count
    generated tokens) and is needed for penalties. ``advance`` counts the chosen token there and adds one to ``steps``.
    -1 stands for a row whose logits hold NaN or infinity, or nothing but negative infinity. ``cluster`` is the number
    of thread blocks a row is spread over, 0 chooses; ``pdl`` 1 overlaps with the kernel before.
    Raises UnsupportedError KERNEL_REFUSED for other shapes and types.
    """
    tokens: Tensor = _sample(
        logits,
        counts,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition,
        frequency,
        presence,
        seeds,
        steps,
        advance,
        cluster,
        pdl,
    )
    return tokens


# Without default values: torch 2.11 leaves out trailing arguments that equal theirs, and misses the mutated ones then.
@torch.library.custom_op("trtllm_cli::sample", mutates_args=("counts", "steps"), device_types="cuda")
def _sample(
    logits: Tensor,
    counts: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    advance: bool,
    cluster: int,
    pdl: int,
) -> Tensor:
    arrays = dict(
        zip(_ARRAYS, (temperature, top_k, top_p, min_p, repetition, frequency, presence, seeds, steps), strict=True)
    )
    _check(logits, counts, arrays)
    tokens = torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)
    params = SamplingParams(
        logits=logits.data_ptr(),
        tokens=tokens.data_ptr(),
        logits_stride=logits.stride(0),
        batch=logits.shape[0],
        vocab=logits.shape[1],
        dtype=library.dtype_code(logits.dtype),
        advance=int(advance),
        cluster=cluster,
        pdl=pdl,
    )
    if counts is not None:
        params.counts, params.counts_stride = counts.data_ptr(), counts.stride(0)
    for name, array in arrays.items():
        if array is not None:
            setattr(params, name, array.data_ptr())
    library.load().launch("sampling", params)
    return tokens


@_sample.register_kernel("cpu")
def _(
    logits: Tensor,
    counts: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    advance: bool,
    cluster: int,
    pdl: int,
) -> Tensor:
    arrays = dict(
        zip(_ARRAYS, (temperature, top_k, top_p, min_p, repetition, frequency, presence, seeds, steps), strict=True)
    )
    _check(logits, counts, arrays)
    names = {"seeds": "seed", "steps": "step"}
    tokens = torch.empty(logits.shape[0], dtype=torch.int32)
    for row in range(logits.shape[0]):
        given: dict[str, Any] = {
            names.get(name, name): array[row].item() for name, array in arrays.items() if array is not None
        }
        seen = None if counts is None else counts[row]
        token = sampling_twin.choose(logits[row], seen, sampling_twin.Request(**given))
        tokens[row] = token
        if advance and token >= 0:
            if steps is not None:
                steps[row] += 1
            if seen is not None and int(seen[token]) & 0x7FFF != 0x7FFF:
                seen[token] += 1
    return tokens


@_sample.register_fake
def _(
    logits: Tensor,
    counts: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition: Tensor | None,
    frequency: Tensor | None,
    presence: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    advance: bool,
    cluster: int,
    pdl: int,
) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int32)


def _check(logits: Tensor, counts: Tensor | None, arrays: dict[str, Tensor | None]) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not logits.shape[1]:
        raise refused(
            f"sampling needs logits [batch, vocab] of float16, bfloat16 or float32, not {logits.dtype} "
            f"{tuple(logits.shape)}",
            "convert them",
        )
    if counts is not None and (counts.shape != logits.shape or counts.dtype != torch.int16):
        raise refused(
            f"sampling needs counts int16 {tuple(logits.shape)}, not {counts.dtype} {tuple(counts.shape)}",
            "prompt_counts makes them",
        )
    if counts is None and any(arrays[name] is not None for name in ("repetition", "frequency", "presence")):
        raise refused("sampling with penalties needs counts", "prompt_counts makes them")
    for name, array in arrays.items():
        if array is not None and (array.shape != logits.shape[:1] or not plain(array, _ARRAYS[name])):
            raise refused(
                f"sampling needs {name} {_ARRAYS[name]} [{logits.shape[0]}], not {array.dtype} {tuple(array.shape)}",
                "one entry a request",
            )
    check_rows("sampling", logits=logits, counts=counts)
    check_device("sampling", logits, counts=counts, **arrays)
