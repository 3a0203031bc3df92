"""What changing a part of a model does to its predictions, computed only from the layer where the change begins.

The reference model runs once over some windows of tokens, and the residual stream is kept at every layer boundary. A
:class:`Change` names tensors, input quantizers and caches that differ; running it starts from the kept residual before
the first layer it touches. The figure is KL(reference || changed) = sum p (ln p - ln q) in nats, averaged over the
scored positions, and the share of positions whose most likely token stays.

Memory, for W windows of S tokens, L layers, hidden size H, vocabulary V and E bytes an element of the compute dtype:
(L + 1) W S H E for the residuals; 4 V a scored position for the reference's log-probabilities where they fit
``keep_bytes``, else they are made again from the last residual each time; one batch of windows through a layer; and
some chunks of logits of 32 MiB. Weights are the providers' own (:class:`StoredWeights` bounds them).

Windows begin at position 0, attention is causal (with the model's own windows), nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trtllm_cli.artifacts.schema import KvCacheScheme
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.decoder import attend, feed, head
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.models.weights import InputQuantizer
from trtllm_cli.ops.api import KvCache
from trtllm_cli.ops.torch_ops import QuantizedKvCache, TorchOps, Weights

#: called as (batches of windows done, batches in all)
Progress = Callable[[int, int], None]

_CHUNK_BYTES = 32 << 20
#: what the comparison of two chunks works on at once, so that its passes stay in a processor's cache
_CACHE_BYTES = 1 << 20
#: positions that run through a layer at once
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class LayerCache:
    """How one layer keeps keys and values: the scheme and its scales, float32 [kv_heads] each."""

    scheme: KvCacheScheme
    k_scale: Tensor
    v_scale: Tensor


@dataclass(frozen=True)
class Change:
    """What differs from the reference: dense tensors by canonical name, input quantizers by module, caches by layer.

    ``tensors`` is asked for a layer's tensors by every batch, so it may make them then. An input quantizer of None
    takes the reference's own away.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, InputQuantizer | None] = field(default_factory=dict)
    caches: Mapping[int, LayerCache] = field(default_factory=dict)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || changed) in nats and whether the most likely token stays, float64 [positions] in window order."""

    kl: Tensor
    agree: Tensor

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def top1_agreement(self) -> float:
        return float(self.agree.mean())


class StoredWeights:
    """Tensors of an unquantized checkpoint's files in ``dtype`` on ``device``; keeps at most ``keep_bytes`` of them."""

    kv_cache: KvCacheScheme | None = None

    def __init__(self, store: TensorStore, dtype: torch.dtype, device: str = "cpu", keep_bytes: int = 8 << 30) -> None:
        self._store, self._dtype, self._device, self._limit = store, dtype, device, keep_bytes
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def has(self, name: str) -> bool:
        return name in self._store

    def dense(self, name: str) -> Tensor:
        found = self._kept.pop(name, None)
        if found is None:
            found = self._store.tensor(name).to(self._device).to(self._dtype)
            self._bytes += found.nbytes
        self._kept[name] = found  # the latest used is the last to go
        while self._bytes > self._limit and len(self._kept) > 1:
            oldest = next(iter(self._kept))
            self._bytes -= self._kept.pop(oldest).nbytes
        return found

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        return None

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        raise KeyError(layer)


class _Changed:
    """The reference's weights with a change on top."""

    kv_cache: KvCacheScheme | None = None  # caches are made here, not by an executor

    def __init__(self, base: Weights, change: Change, dtype: torch.dtype, device: str) -> None:
        self._base, self._change = base, change
        self._dtype, self._device = dtype, device
        self._outer: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._change.tensors or self._base.has(name)

    def dense(self, name: str) -> Tensor:
        if name not in self._change.tensors:
            return self._base.dense(name)
        if name in self._outer:
            return self._outer[name]
        found = self._change.tensors[name].to(self._device).to(self._dtype)
        if not name.startswith("layers."):
            self._outer[name] = found  # the head is asked for by every chunk of logits
        return found

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        if module in self._change.inputs:
            return self._change.inputs[module]
        return self._base.input_quantizer(module)

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._base.kv_scales(layer)


class _Ops(TorchOps):
    """The reference operations, with float32 products on the CPU by oneDNN.

    torch gives those to MKL, which on processors of other makers than its own takes three times as long for the same
    result to a rounding.
    """

    def linear(self, x: Tensor, module: str) -> Tensor:
        fast = x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.enabled
        if not fast or self._weights.input_quantizer(module) is not None:
            return super().linear(x, module)
        bias = self._weights.dense(f"{module}.bias") if self._weights.has(f"{module}.bias") else None
        weight = self._weights.dense(f"{module}.weight")
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product


class _Recorder(_Ops):
    """Also keeps what each linear takes."""

    def __init__(self, weights: Weights, positions: int, visit: Callable[[str, Tensor], None]) -> None:
        super().__init__(weights, positions)
        self._visit = visit

    def linear(self, x: Tensor, module: str) -> Tensor:
        self._visit(module, x)
        return super().linear(x, module)


class Replay:
    """The reference model over ``tokens`` [W, S], ready to be changed.

    ``scored`` says for each window the index of the first token whose prediction counts (1 or more, the default 1): the
    positions before it see their tokens but are not scored. ``products`` ``bfloat16`` lets float32 products round their
    factors to bfloat16 where the processor is faster with them (sums and everything else stay float32): it adds a
    divergence of some 1e-5 to every change, little beside that of 4-bit weights. ``weights`` must give tensors in
    ``dtype`` on ``device``; quantized inputs and caches of its own are honoured.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        tokens: Tensor,
        *,
        scored: Sequence[int] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_bytes: int = 1 << 30,
        progress: Progress | None = None,
    ) -> None:
        """Runs the reference once. Raises BadInputError when a token or a logit is out of range."""
        if int(tokens.min()) < 0 or int(tokens.max()) >= spec.vocab_size:
            raise BadInputError(
                "TOKEN_OUT_OF_RANGE",
                f"the windows hold token ids outside 0..{spec.vocab_size - 1}",
                "use the tokenizer of the model itself",
            )
        self.spec = spec
        self._weights = weights
        self._tokens = tokens.to(device)
        count, self._length = tokens.shape
        first = [1] * count if scored is None else list(scored)
        index = torch.arange(self._length - 1)
        # position t predicts token t + 1
        self._rows = index[None, :] >= torch.tensor(first)[:, None] - 1
        #: positions scored over all windows
        self.positions = int(self._rows.sum())
        self._device, self._dtype = device, dtype
        batch = max(1, _BATCH_TOKENS // self._length)
        self._batches = [slice(begin, min(begin + batch, count)) for begin in range(0, count, batch)]
        #: [L + 1] residual before each layer and after the last, [W, S, H]
        self._residuals: list[Tensor] = []
        keep = 4 * spec.vocab_size * self.positions <= keep_bytes
        self._reference: list[list[Tensor]] | None = [] if keep else None
        self._run_reference(progress)

    def run(self, change: Change) -> Divergence:
        """The divergence that ``change`` alone makes. Raises BadInputError when its logits are NaN or infinite."""
        first = first_layer(self.spec, change)
        kls: list[Tensor] = []
        agree: list[Tensor] = []
        with torch.inference_mode():
            ops = _Ops(_Changed(self._weights, change, self._dtype, self._device), self._length)
            plain = _Ops(self._weights, self._length)
            embeds = "embed.weight" in change.tensors
            for number, batch in enumerate(self._batches):
                residual = ops.embedding(self._tokens[batch], "embed") if embeds else self._residuals[first][batch]
                for layer in range(first, self.spec.num_layers):
                    residual = self._layer(ops, layer, residual, change)
                hidden, last = self._scored(residual, batch), self._scored(self._residuals[-1][batch], batch)
                for part, rows in enumerate(self._chunks(len(hidden))):
                    if self._reference is not None:
                        reference = self._reference[number][part]
                    else:
                        reference = torch.log_softmax(self._logits(plain, last[rows]), dim=-1)
                    kl, same = _compare(reference, self._logits(ops, hidden[rows]))
                    kls.append(kl)
                    agree.append(same)
        found = torch.cat(kls)
        if not bool(torch.isfinite(found).all()):
            names = ", ".join([*change.tensors, *change.inputs, *(f"layer {i} cache" for i in change.caches)][:3])
            raise BadInputError(
                "LOGITS_NOT_FINITE",
                f"with {names} changed the model returns NaN or infinite logits",
                "quantize the checkpoint again",
            )
        return Divergence(found, torch.cat(agree))

    def inputs(self, layer: int) -> dict[str, Tensor]:
        """What each linear of ``layer`` takes in the reference, [W * S, K] by module, in the compute dtype.

        With ``layer`` the number of layers: what the head takes, at the scored positions.
        """
        found: dict[str, list[Tensor]] = {}
        ops = _Recorder(
            self._weights, self._length, lambda name, x: found.setdefault(name, []).append(x.flatten(0, -2))
        )
        with torch.inference_mode():
            for batch in self._batches:
                if layer < self.spec.num_layers:
                    self._layer(ops, layer, self._residuals[layer][batch], Change())
                else:
                    hidden = self._scored(self._residuals[-1][batch], batch)
                    found.setdefault(head(self.spec), []).append(ops.norm(hidden, "norm", self.spec.norm))
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.inference_mode()
    def _run_reference(self, progress: Progress | None) -> None:
        spec, ops = self.spec, TorchOps(self._weights, self._length)
        shape = (*self._tokens.shape, spec.hidden_size)
        self._residuals = [
            torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(spec.num_layers + 1)
        ]
        for number, batch in enumerate(self._batches):
            residual = ops.embedding(self._tokens[batch], "embed")
            self._residuals[0][batch] = residual
            for layer in range(spec.num_layers):
                residual = self._layer(ops, layer, residual, Change())
                self._residuals[layer + 1][batch] = residual
            if self._reference is not None:
                hidden = self._scored(residual, batch)
                parts = [
                    torch.log_softmax(self._logits(ops, hidden[rows]), dim=-1) for rows in self._chunks(len(hidden))
                ]
                if not all(bool(torch.isfinite(part).all()) for part in parts):
                    raise BadInputError(
                        "LOGITS_NOT_FINITE",
                        "the reference model returns NaN or infinite logits",
                        "trtllm-cli verify the source checkpoint; convert it again",
                    )
                self._reference.append(parts)
            if progress is not None:
                progress(number + 1, len(self._batches))

    def _layer(self, ops: TorchOps, layer: int, residual: Tensor, change: Change) -> Tensor:
        """The residual [B, S, H] after one layer."""
        spec, p = self.spec, f"layers.{layer}"
        batch = residual.shape[0]
        starts = torch.zeros(batch, dtype=torch.long, device=residual.device)
        positions = torch.arange(self._length, device=residual.device)[None, :].expand(batch, -1)
        x = ops.norm(residual, f"{p}.attn_norm", spec.norm)
        attended, _ = attend(ops, spec, layer, x, self._cache(layer, batch, change), positions, starts)
        residual, x = ops.add_norm(residual, ops.linear(attended, f"{p}.attn.o"), f"{p}.mlp_norm", spec.norm)
        return ops.add(residual, ops.linear(feed(ops, spec, layer, x), f"{p}.mlp.down"))

    def _cache(self, layer: int, batch: int, change: Change) -> KvCache[Tensor]:
        spec = self.spec
        shape = (batch, spec.num_kv_heads, self._length, spec.head_dim)
        k, v = (torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        quantized = change.caches.get(layer)
        if quantized is None and self._weights.kv_cache is not None:
            quantized = LayerCache(self._weights.kv_cache, *self._weights.kv_scales(layer))
        if quantized is None:
            return KvCache(k, v)
        scales = quantized.k_scale.to(self._device), quantized.v_scale.to(self._device)
        return QuantizedKvCache(k, v, quantized.scheme, *scales)

    def _scored(self, residual: Tensor, batch: slice) -> Tensor:
        """The rows [n, H] of a batch's residual [B, S, H] that predict scored tokens."""
        return residual[:, :-1][self._rows[batch].to(self._device)]

    def _logits(self, ops: TorchOps, hidden: Tensor) -> Tensor:
        """Residual rows [n, H] to float32 logits [n, V]."""
        return ops.linear(ops.norm(hidden, "norm", self.spec.norm), head(self.spec)).float()

    def _chunks(self, rows: int) -> Iterator[slice]:
        step = max(1, _CHUNK_BYTES // (4 * self.spec.vocab_size))
        for begin in range(0, rows, step):
            yield slice(begin, min(begin + step, rows))


def first_layer(spec: DecoderSpec, change: Change) -> int:
    """The first layer whose output ``change`` can alter; the number of layers for the final norm and the head."""
    modules = [name.rpartition(".")[0] for name in change.tensors] + list(change.inputs)
    layers = [_layer_of(spec, module) for module in modules] + list(change.caches)
    return min(layers, default=spec.num_layers)


def _compare(log_p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL per row of log-probabilities and logits [n, V], and whether the largest agree; float64 [n] on the CPU.

    The sum is over p (ln p - ln q) + q - p: as both sum to one that changes nothing, but every term is non-negative and
    an error of a normaliser cancels to first order, so that float32 resolves divergences below 1e-7.
    """
    kl = torch.empty(len(logits), dtype=torch.float64)
    agree = torch.empty(len(logits), dtype=torch.float64)
    step = max(1, _CACHE_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        log_q = torch.log_softmax(logits[rows], dim=-1)
        agree[rows] = log_p[rows].argmax(-1) == log_q.argmax(-1)
        p = log_p[rows].exp()
        terms = (log_p[rows] - log_q).mul_(p).sub_(p).add_(log_q.exp_())
        kl[rows] = terms.sum(dim=-1).double().clamp(min=0).cpu()
    return kl, agree


def _layer_of(spec: DecoderSpec, module: str) -> int:
    parts = module.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return 0 if module == "embed" else spec.num_layers
