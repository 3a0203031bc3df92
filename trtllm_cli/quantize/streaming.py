"""The decoder one layer at a time over calibration tokens: memory for one layer's weights and one layer's activations.

Activations are kept between layers in a :class:`Store`: in memory while they fit a budget, in a file beside the work
otherwise. Windows start at position 0, so attention is plainly causal and no cache is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trtllm_cli.artifacts.schema import KvCacheScheme
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import DoesNotFitError, UnsupportedError
from trtllm_cli.models import decoder
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.models.weights import InputQuantizer
from trtllm_cli.ops.api import AttentionSpec, KvCache
from trtllm_cli.ops.torch_ops import TorchOps

#: how the names of files with activations begin
SPILLED = "activations-"


def choose_device(name: str) -> torch.device:
    """Raises UnsupportedError when there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError("DEVICE_UNKNOWN", f"{name!r} is not a device torch knows", "--device cpu") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            "DEVICE_MISSING", f"torch {torch.__version__} sees no device {name!r} on this machine", "--device cpu"
        )
    return device


def choose_compute(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies it in hardware, else float32."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Store:
    """``count`` batches of activations, each [rows, length, width], in memory or in a file.

    ``budget`` is what may still be used of memory, in bytes; a store that does not fit lies in ``directory``.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, budget: int, directory: Path
    ) -> None:
        self.bytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        self.spilled = self.bytes > budget
        self._device = device
        self._parts: list[Tensor] = []
        self._path: Path | None = None
        if not self.spilled:
            self._parts = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{SPILLED}{id(self):x}"
        with self._path.open("wb") as stream:
            try:
                # a hole in the file would end the process where the disk fills, not with an error here
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, self.bytes)
            except OSError as error:
                self._path.unlink(missing_ok=True)
                raise DoesNotFitError(
                    "DISK_FULL",
                    f"{directory} has no room for {self.bytes / 2**30:.2f} GiB of activations ({error.strerror})",
                    "free some space, a larger --max-ram, or a smaller --calib-rows",
                ) from error
        flat = torch.from_file(str(self._path), shared=True, size=self.bytes // dtype.itemsize, dtype=dtype)
        offset = 0
        for shape in shapes:
            size = math.prod(shape)
            self._parts.append(flat[offset : offset + size].view(shape))
            offset += size

    def get(self, index: int) -> Tensor:
        part = self._parts[index]
        return part.to(self._device) if self.spilled else part

    def put(self, index: int, value: Tensor) -> None:
        self._parts[index].copy_(value)

    def close(self) -> None:
        self._parts = []
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class LayerWeights:
    """The tensors of one layer by canonical name: ``master`` float32 and a copy in the compute dtype for products."""

    kv_cache: KvCacheScheme | None = None

    def __init__(self, compute: torch.dtype, device: torch.device) -> None:
        self._compute = compute
        self._device = device
        self.master: dict[str, Tensor] = {}
        self._cast: dict[str, Tensor] = {}

    def set(self, name: str, value: Tensor) -> None:
        """Take a new value, float32 on the device."""
        self.master[name] = value.to(self._device, torch.float32)
        self._cast.pop(name, None)

    def clear(self) -> None:
        """Forget the layer."""
        self.master.clear()
        self._cast.clear()

    def has(self, name: str) -> bool:
        return name in self.master

    def dense(self, name: str) -> Tensor:
        if name not in self._cast:
            # a layer's norms stay float32: their input is the float32 residual
            keep = name.endswith((".attn_norm.weight", ".mlp_norm.weight"))
            self._cast[name] = self.master[name] if keep else self.master[name].to(self._compute)
        return self._cast[name]

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        return None

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("calibration keeps keys and values as they are")


class StreamingOps(TorchOps):
    """Whole windows from position 0. ``on_cache`` sees keys after rotary and values, [B, kv_heads, S, D]."""

    on_cache: Callable[[Tensor, Tensor], None] | None = None

    def cache_update(self, cache: KvCache[Tensor], k: Tensor, v: Tensor, starts: Tensor) -> KvCache[Tensor]:
        if self.on_cache is not None:
            self.on_cache(k, v)
        return KvCache(k, v)

    def attend(self, q: Tensor, cache: KvCache[Tensor], positions: Tensor, spec: AttentionSpec) -> Tensor:
        length = q.shape[2]
        mask = None
        if spec.window is not None and spec.window < length:
            at = torch.arange(length, device=q.device)
            mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - spec.window)
        return F.scaled_dot_product_attention(
            q,
            cache.k,
            cache.v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=spec.scale,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )


class Streamer:
    """Runs calibration tokens through the decoder, a layer at a time.

    ``tokens`` int64 [rows, length]; ``batch_tokens`` bounds what is computed at once; ``budget`` bytes of memory may
    hold activations between passes.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        tokens: Tensor,
        device: torch.device,
        compute: torch.dtype,
        budget: int,
        directory: Path,
        batch_tokens: int = 4096,
    ) -> None:
        self.spec, self.device, self.compute = spec, device, compute
        self.directory, self._budget = directory, budget
        self.total = tokens.numel()
        rows = max(1, batch_tokens // tokens.shape[1])
        self._batches = list(torch.split(tokens, rows))
        self.weights = LayerWeights(compute, device)
        self.ops = StreamingOps(self.weights, tokens.shape[1])
        self.length = tokens.shape[1]
        self.residual = self.store(spec.hidden_size, torch.float32)

    def store(self, width: int, dtype: torch.dtype) -> Store:
        """Room for activations of every token; spilled to a file where the budget is used up."""
        shapes = [(*batch.shape, width) for batch in self._batches]
        store = Store(shapes, dtype, self.device, self._budget, self.directory)
        if not store.spilled:
            self._budget -= store.bytes
        return store

    def fits(self, width: int, dtype: torch.dtype) -> bool:
        """Whether :meth:`store` would stay in memory."""
        return self.total * width * dtype.itemsize <= self._budget

    def release(self, store: Store) -> None:
        if not store.spilled:
            self._budget += store.bytes
        store.close()

    def embed(self, store: TensorStore) -> None:
        """Begin: the residual is the embedding of every token."""
        table = store.array("embed.weight")
        bf16 = store.entry("embed.weight").dtype == "BF16"
        for index, batch in enumerate(self._batches):
            rows = torch.from_numpy(table[batch.reshape(-1).numpy()])
            wide = rows.view(torch.bfloat16) if bf16 else rows
            self.residual.put(index, wide.float().view(*batch.shape, -1))

    def load(self, store: TensorStore, layer: int) -> None:
        """Make ``layer`` the current one."""
        self.weights.clear()
        prefix = f"layers.{layer}."
        for name in store:
            if name.startswith(prefix):
                self.weights.set(name, store.tensor(name))

    def batches(self) -> Iterator[int]:
        return iter(range(len(self._batches)))

    # ---- pieces of a layer ------------------------------------------------------------------------------------------

    def normed(self, layer: int, which: str, index: int) -> Tensor:
        """The residual of a batch after the norm ``attn_norm`` or ``mlp_norm``."""
        module = f"layers.{layer}.{which}"
        return self.ops.norm(self.residual.get(index), module, self.spec.norm).to(self.compute)

    def attended(self, layer: int, x: Tensor) -> Tensor:
        """What the output projection takes, from the normalised input of the layer."""
        positions = torch.arange(self.length, device=self.device)[None].expand(x.shape[0], -1)
        starts = torch.zeros(x.shape[0], dtype=torch.long, device=self.device)
        return decoder.attend(self.ops, self.spec, layer, x, KvCache(x, x), positions, starts)[0]

    def fed(self, layer: int, x: Tensor) -> Tensor:
        """What the down projection takes, from the second normalised input of the layer."""
        return decoder.feed(self.ops, self.spec, layer, x)

    def add(self, layer: int, module: str, x: Tensor, index: int) -> None:
        """residual += linear(x), for the modules ``attn.o`` and ``mlp.down``."""
        delta = self.ops.linear(x, f"layers.{layer}.{module}")
        self.residual.put(index, self.residual.get(index) + delta)

    def advance(self, layer: int) -> None:
        """The whole layer with its current weights: the residual moves to the next layer."""
        for index in self.batches():
            self.add(layer, "attn.o", self.attended(layer, self.normed(layer, "attn_norm", index)), index)
            self.add(layer, "mlp.down", self.fed(layer, self.normed(layer, "mlp_norm", index)), index)
