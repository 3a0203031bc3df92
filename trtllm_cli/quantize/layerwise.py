"""One decoder layer quantized with calibration: statistics, moved scales, rounding, and the residual for the next one.

Two ways through a layer. *Together* (smoothquant, awq, static activations, cache scales): one pass over the tokens with
the layer as it is gives every input's statistics and moves the residual on; then scales are moved between neighbours
and each weight is rounded. *Sequential* (gptq): each group of linears sees the inputs that the already quantized
groups before it produce, so errors are corrected as they arise (true-sequential, Frantar et al., 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trtllm_cli.artifacts.schema import LayerQuantization
from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.quantized import Type8
from trtllm_cli.quantize.groups import GROUPS, Group, LayerResult, output_error
from trtllm_cli.quantize.methods import awq, kv_cache, smoothquant
from trtllm_cli.quantize.methods.base import QuantizedRows
from trtllm_cli.quantize.methods.gptq import gptq
from trtllm_cli.quantize.methods.grid import encode, fit, pack
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.quantize.selection import Choice
from trtllm_cli.quantize.statistics import Collector, Statistics
from trtllm_cli.quantize.streaming import Store, Streamer

_GPTQ = ("gptq", "awq-gptq")
_AWQ = ("awq", "awq-gptq")
_MIGRATING = ("smoothquant", *_AWQ)


class LayerQuantizer:
    """Quantizes the streamer's current layer. ``dtypes`` are the stored types of the unquantized tensors."""

    def __init__(
        self,
        streamer: Streamer,
        options: QuantizeOptions,
        choices: Mapping[str, Choice],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._s = streamer
        self._o = options
        self._choices = choices
        self._dtypes = dtypes

    def sequential(self, layer: int) -> bool:
        """Whether the layer is quantized group by group, each seeing the quantized ones before it."""
        return any(self._method(layer, module) in _GPTQ for group in GROUPS for module in group.modules)

    def run(self, layer: int) -> LayerResult:
        """Quantize layer ``layer`` (loaded in the streamer) and move the residual past it."""
        self._result = LayerResult()
        self._decided: dict[str, dict[str, Any]] = {}
        self._cache: kv_cache.KvStatistics | None = None
        self._input_scales: dict[tuple[str, Type8], float] = {}
        sequential = self.sequential(layer)
        watched = [group for group in GROUPS if self._watched(layer, group, sequential)]
        found: dict[str, Statistics] = {}
        if watched or self._o.kv_cache is not None or not sequential:
            found = self._observe(layer, watched, move=not sequential)
        for group in watched:
            found[group.key] = self._migrate(layer, group, found[group.key])
        if self._o.kv_cache is not None:
            if self._o.kv_cache == "int8":
                self._smooth_keys(layer)
            self._scale_cache(layer, self._o.kv_cache)
        if sequential:
            self._sweep(layer, found)
        else:
            for group in GROUPS:
                self._round(layer, group, found.get(group.key))
        order = {f"layers.{layer}.{module}": i for i, module in enumerate(m for g in GROUPS for m in g.modules)}
        self._result.records.sort(key=lambda record: order[record.module])
        return self._result

    # ---- looking ----------------------------------------------------------------------------------------------------

    def _choice(self, layer: int, module: str) -> Choice | None:
        return self._choices.get(f"layers.{layer}.{module}")

    def _method(self, layer: int, module: str) -> str | None:
        choice = self._choice(layer, module)
        return None if choice is None else choice.method

    def _watched(self, layer: int, group: Group, sequential: bool) -> bool:
        """Whether the group's input must be seen before anything is quantized."""
        for module in group.modules:
            choice = self._choice(layer, module)
            if choice is None:
                continue
            static = choice.activation is not None and choice.activation.granularity == "tensor"
            if choice.method in _MIGRATING or static or (choice.activation is not None and not sequential):
                return True
        return False

    def _collector(self, layer: int, group: Group, *, hessian: bool) -> Collector:
        width = self._s.weights.master[f"layers.{layer}.{group.modules[0]}.weight"].shape[1]
        where = f"the input of layers.{layer}.{group.modules[0]}"
        return Collector(width, self._s.total, self._s.device, where, hessian=hessian)

    def _observe(self, layer: int, watched: list[Group], *, move: bool) -> dict[str, Statistics]:
        s = self._s
        collectors = {
            group.key: self._collector(
                layer, group, hessian=any(self._method(layer, module) in _AWQ for module in group.modules)
            )
            for group in watched
        }
        if self._o.kv_cache is not None:
            self._cache = kv_cache.KvStatistics(s.spec.num_kv_heads, s.device)
            s.ops.on_cache = self._cache.add

        def see(key: str, x: Tensor) -> None:
            if key in collectors:
                collectors[key].add(x)

        norm = f"layers.{layer}.mlp_norm"
        for index in s.batches():
            x = s.normed(layer, "attn_norm", index)
            see("attn.qkv", x)
            x = s.attended(layer, x)
            see("attn.o", x)
            residual = s.residual.get(index) + s.ops.linear(x, f"layers.{layer}.attn.o")
            x = s.ops.norm(residual, norm, s.spec.norm).to(s.compute)
            see("mlp.gate_up", x)
            x = s.fed(layer, x)
            see("mlp.down", x)
            if move:
                s.residual.put(index, residual + s.ops.linear(x, f"layers.{layer}.mlp.down"))
        s.ops.on_cache = None
        return {key: collector.finish() for key, collector in collectors.items()}

    def _smooth_keys(self, layer: int) -> None:
        """Divide keys and multiply queries channel by channel, in the head norms or in the rows of k and q."""
        assert self._cache is not None
        spec = self._s.spec
        modules = [self._choice(layer, module) for module in ("attn.q", "attn.k")]
        if not spec.qk_norm and any(c is not None and c.scheme.granularity == "tensor" for c in modules):
            return  # one scale for the whole matrix: rows of other sizes would cost it precision
        s = kv_cache.key_smoothing(self._cache.largest()[0], spec.rotary.dim, shared=spec.qk_norm)
        self._cache.divide_keys(s)
        if spec.qk_norm:
            self._scale_rows(f"layers.{layer}.attn.k_norm", 1 / s[0], True)
            self._scale_rows(f"layers.{layer}.attn.q_norm", s[0], True)
            return
        queries = s.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0).flatten()
        for module, rows, choice in zip(("q", "k"), (queries, 1 / s.flatten()), modules, strict=True):
            self._scale_rows(f"layers.{layer}.attn.{module}", rows, choice is None)

    def _scale_rows(self, module: str, rows: Tensor, stored: bool) -> None:
        """Multiply a module's weight and bias by powers of two; ``stored``: no quantized weight will stand for it."""
        master = self._s.weights.master
        for name in (f"{module}.weight", f"{module}.bias"):
            if name in master:
                value = master[name] * rows.to(master[name].device).view(-1, *[1] * (master[name].dim() - 1))
                if stored or name.endswith(".bias"):
                    self._keep(name, value.to(self._dtypes[name]))
                else:
                    self._s.weights.set(name, value)

    def _scale_cache(self, layer: int, type: Type8) -> None:
        assert self._cache is not None
        k, v = self._cache.scales(type, self._o.kv_scales)
        kv_cache.check(k, v, layer, self._cache)
        self._result.tensors[f"layers.{layer}.attn.k_scale"] = k.cpu()
        self._result.tensors[f"layers.{layer}.attn.v_scale"] = v.cpu()

    # ---- moving scale -----------------------------------------------------------------------------------------------

    def _migrate(self, layer: int, group: Group, found: Statistics) -> Statistics:
        """Move scale from the group's input into what precedes it; the statistics of the input afterwards."""
        methods = {self._method(layer, module) for module in group.modules}
        method = next(iter(methods))
        if len(methods) != 1 or method not in _MIGRATING:
            return found
        if not group.norm and self._choice(layer, group.source) is None:
            self._decided[group.key] = {"note": f"no scale moved: {group.source} stays as it is"}
            return found
        weights = [self._weight(layer, module) for module in group.modules]
        s, decided = self._search(layer, group, weights, found)
        self._decided[group.key] = decided
        if s is None:
            return found
        self._fold(layer, group, s)
        return found.divided(s)

    def _realizable(self, layer: int, group: Group, s: Tensor) -> Tensor:
        """The scale nearest to s [K] that the group's source can give up exactly."""
        if group.norm:
            return smoothquant.fold_into_norm(self._norm(layer, group), s)[1]
        if group.key == "attn.o":
            spec = self._s.spec
            return smoothquant.share_across_heads(s, spec.num_heads, spec.num_kv_heads, spec.head_dim)[0]
        return s

    def _norm(self, layer: int, group: Group) -> Tensor:
        """The weight of the norm before the group as it is stored: its rounding is part of what can be moved."""
        name = f"layers.{layer}.{group.source}.weight"
        return self._s.weights.master[name].to(self._dtypes[name])

    def _fold(self, layer: int, group: Group, s: Tensor) -> None:
        """Multiply the group's columns by s, a realizable scale, and divide its source."""
        master = self._s.weights.master
        source = f"layers.{layer}.{group.source}"
        if group.norm:
            self._keep(f"{source}.weight", smoothquant.fold_into_norm(self._norm(layer, group), s)[0])
        else:
            rows = s
            if group.key == "attn.o":
                spec = self._s.spec
                rows = smoothquant.share_across_heads(s, spec.num_heads, spec.num_kv_heads, spec.head_dim)[1]
                if self._cache is not None:
                    self._cache.divide_values(rows)
            self._s.weights.set(f"{source}.weight", master[f"{source}.weight"] / rows[:, None])
            if f"{source}.bias" in master:
                self._keep(f"{source}.bias", master[f"{source}.bias"] / rows)
        for module in group.modules:
            name = f"layers.{layer}.{module}.weight"
            self._s.weights.set(name, master[name] * s[None, :])

    def _search(
        self, layer: int, group: Group, weights: list[Tensor], found: Statistics
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The scale to move, None where none is better, and what was decided."""
        choice = self._choice(layer, group.modules[0])
        assert choice is not None

        def realize(s: Tensor) -> Tensor:
            return self._realizable(layer, group, s)

        if choice.method == "smoothquant":
            assert choice.activation is not None
            if self._o.alpha is not None:
                s = realize(smoothquant.migration(found.act_max, weights, self._o.alpha))
                return s, {"alpha": self._o.alpha}
            granularity: Literal["channel", "tensor"] = self._o.weights
            best = smoothquant.search_alpha(
                found.sample, weights, found.act_max, choice.activation, granularity, realize=realize
            )
            return (None if best.alpha is None else best.s), {"alpha": best.alpha, "spread": best.spread}
        assert found.hessian is not None
        scales = awq.search(weights, found.hessian, found.mean_abs, awq.rounding(choice.scheme), realize=realize)
        return (None if scales.ratio is None else scales.scales), {"ratio": scales.ratio}

    # ---- rounding ---------------------------------------------------------------------------------------------------

    def _sweep(self, layer: int, found: Mapping[str, Statistics]) -> None:
        """Group by group: look at its input, quantize it, and let the next group see the result."""
        s = self._s
        spec = s.spec

        def look(group: Group, stage: Any, keep: Store | None) -> Statistics:
            wanted = any(self._method(layer, module) in _GPTQ for module in group.modules)
            collector = self._collector(layer, group, hessian=wanted)
            for index in s.batches():
                x = stage(index)
                collector.add(x)
                if keep is not None:
                    keep.put(index, x)
            return collector.finish()

        def between(group: Group, stage: Any, width: int) -> Any:
            """Quantize a group whose input is costly; returns how to get that input again."""
            keep = s.store(width, s.compute) if s.fits(width, s.compute) else None
            self._round(layer, group, look(group, stage, keep))
            return keep, (keep.get if keep is not None else stage)

        qkv, out, gate_up, down = GROUPS
        self._round(layer, qkv, look(qkv, lambda i: s.normed(layer, "attn_norm", i), None))
        keep, again = between(out, lambda i: s.attended(layer, s.normed(layer, "attn_norm", i)), spec.q_size)
        for index in s.batches():
            s.add(layer, "attn.o", again(index), index)
        if keep is not None:
            s.release(keep)
        self._round(layer, gate_up, look(gate_up, lambda i: s.normed(layer, "mlp_norm", i), None))
        keep, again = between(down, lambda i: s.fed(layer, s.normed(layer, "mlp_norm", i)), spec.intermediate_size)
        for index in s.batches():
            s.add(layer, "mlp.down", again(index), index)
        if keep is not None:
            s.release(keep)

    def _round(self, layer: int, group: Group, found: Statistics | None) -> None:
        """Quantize the group's modules; in a sweep the streamer goes on with what they stand for."""
        together = [m for m in group.modules if self._method(layer, m) in _GPTQ]
        for module in group.modules:
            choice = self._choice(layer, module)
            if choice is None or module in together:
                continue
            weight = self._weight(layer, module)
            parameters: dict[str, Any] = {}
            if choice.method == "smoothquant":
                made = smoothquant.quantize_w8(weight, choice.scheme)
            elif choice.method == "awq":
                made = self._clipped(module, weight, choice, found)
            else:
                made = choice.rounder.quantize(weight, choice.scheme, self._o.searches(choice.method))
            self._finish(layer, group, module, weight, made, found, parameters, choice.note)
        if together:
            self._gptq(layer, group, together, found)

    def _clipped(self, module: str, weight: Tensor, choice: Choice, found: Statistics | None) -> QuantizedRows:
        """The weight rounded, row by row the better of two: groups' ranges cut where the output gains, or their scales
        of least error weighted by the inputs' power. q and k keep their ranges, as in the paper: cutting moves
        attention logits all the same way, which the error of single outputs does not show."""
        assert found is not None
        assert found.hessian is not None
        hessian, scheme = found.hessian, choice.scheme
        if not self._o.searches(choice.method):
            return choice.rounder.quantize(weight, scheme)
        grid = fit(weight, scheme, hessian.diagonal(), search=True)
        candidates = [pack(encode(weight, grid), grid, scheme)]
        if module not in ("attn.q", "attn.k"):
            assert scheme.group_size is not None
            clipped = awq.clip(weight, hessian, awq.rounding(scheme), scheme.group_size).weight
            candidates.append(choice.rounder.quantize(clipped, scheme))
        else:
            candidates.append(choice.rounder.quantize(weight, scheme))
        return awq.best_rows(weight, hessian, candidates)

    def _gptq(self, layer: int, group: Group, modules: list[str], found: Statistics | None) -> None:
        assert found is not None
        assert found.hessian is not None
        choices = [self._choice(layer, module) for module in modules]
        schemes = {choice.scheme for choice in choices if choice is not None}
        for scheme in sorted(schemes, key=str):
            same = [m for m, c in zip(modules, choices, strict=True) if c is not None and c.scheme == scheme]
            weights = [self._weight(layer, module) for module in same]
            made = gptq(
                torch.cat(weights),
                found.hessian,
                scheme,
                act_order=self._o.act_order,
                damping=self._o.damping,
                search=self._o.searches("gptq"),
            )
            first = 0
            for module, weight in zip(same, weights, strict=True):
                rows = slice(first, first + weight.shape[0])
                first += weight.shape[0]
                part = QuantizedRows(
                    {
                        suffix: tensor if suffix == "weight_group" else tensor[rows].contiguous()
                        for suffix, tensor in made.quantized.tensors.items()
                    },
                    made.quantized.dequantized[rows],
                )
                choice = self._choice(layer, module)
                assert choice is not None
                notes = "; ".join(note for note in (choice.note, made.note) if note)
                self._finish(layer, group, module, weight, part, found, {"damping": made.damping}, notes or None)

    def _finish(
        self,
        layer: int,
        group: Group,
        module: str,
        weight: Tensor,
        made: QuantizedRows,
        found: Statistics | None,
        parameters: dict[str, Any],
        note: str | None,
    ) -> None:
        name = f"layers.{layer}.{module}"
        choice = self._choices[name]
        for suffix, tensor in made.tensors.items():
            self._result.tensors[f"{name}.{suffix}"] = tensor.cpu()
        scale: Tensor | None = None
        if choice.activation is not None and choice.activation.granularity == "tensor":
            assert found is not None
            kind = choice.activation.type
            if (group.key, kind) not in self._input_scales:
                self._input_scales[group.key, kind] = smoothquant.static_input_scale(found.sample, found.act_max, kind)
            value = self._input_scales[group.key, kind]
            scale = torch.tensor([value], dtype=torch.float32, device=weight.device)
            self._result.tensors[f"{name}.input_scale"] = scale.cpu()
        difference = made.dequantized - weight
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        error = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        decided = dict(self._decided.get(group.key, {}))
        moved = decided.pop("note", None)
        self._result.records.append(
            LayerQuantization(
                module=name,
                scheme=choice.scheme,
                relative_error=error / norm if norm else 0.0,
                max_error=float(difference.abs().max()),
                note="; ".join(text for text in (note, moved) if text) or None,
                activation=choice.activation,
                method=choice.method,
                output_error=None if found is None else output_error(found, weight, made.dequantized, choice, scale),
                parameters={**decided, **parameters},
            )
        )
        self._s.weights.set(f"{name}.weight", made.dequantized)

    def _weight(self, layer: int, module: str) -> Tensor:
        weight = self._s.weights.master[f"layers.{layer}.{module}.weight"]
        if not bool(torch.isfinite(weight).all()):
            raise BadInputError(
                "TENSOR_NOT_FINITE", f"layers.{layer}.{module}.weight holds NaN or infinite values", "convert it again"
            )
        return weight

    def _keep(self, name: str, value: Tensor) -> None:
        """An unquantized tensor that changed."""
        self._result.tensors[name] = value.cpu()
        self._s.weights.set(name, value)
