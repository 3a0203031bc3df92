"""compressed-tensors (see :mod:`trtllm_cli.quantize.interchange.compressed`): int4, int8 and fp8 weights and inputs.

Modules with equal schemes make a group. One group targets every ``Linear`` and lists what stays unquantized under
``ignore``; several name their modules. An embedding, tied to the head or not, is written dequantized: most loaders
read it dense, and a tied head has to be the same tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme, WeightScheme
from trtllm_cli.export.formats import Described, Subject, listed, quantized_record, refused

if TYPE_CHECKING:
    import torch

_Key = tuple[WeightScheme, ActivationScheme | None]


class CompressedTensorsFormat:
    """See the module and :class:`~trtllm_cli.export.formats.Format`."""

    def __init__(self, subject: Subject) -> None:
        self._record = quantized_record(subject, "compressed-tensors")
        self._subject = subject
        self.dense = tuple(name for name in subject.layers if name == "embed")
        self._groups: dict[_Key, list[str]] = {}
        for name, layer in subject.layers.items():
            if name not in self.dense:
                # scales of different types share a group: the config does not say how they are stored
                scheme = layer.scheme.model_copy(update={"scale_dtype": "float32"})
                self._groups.setdefault((scheme, layer.activation), []).append(name)
        self.notes = tuple(_notes(subject))
        ordered = [name for name, layer in subject.layers.items() if layer.scheme.group_index]
        if ordered:
            raise refused(
                f"{listed(ordered)}: groups that are not consecutive (act-order), which compressed-tensors no longer "
                "reads",
                "--format gptq",
            )
        if not self._groups and self._record.kv_cache is None:
            raise refused("only the embedding is quantized, which this format does not hold", "quantize linears too")

    def config(self) -> dict[str, Any] | None:
        groups: dict[str, Any] = {}
        single = len(self._groups) == 1
        for number, ((scheme, activation), modules) in enumerate(self._groups.items()):
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if single else [self._subject.published[module] for module in modules],
                "weights": _weights(scheme),
                "input_activations": None if activation is None else _inputs(activation),
                "output_activations": None,
                "format": _format(scheme, activation),
            }
        formats = {group["format"] for group in groups.values()}
        cache = self._record.kv_cache
        return {
            "quant_method": "compressed-tensors",
            "format": _whole(formats),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
            "kv_cache_scheme": None if cache is None else _cache(cache),
        }

    def _ignored(self) -> list[str]:
        kept = {module for modules in self._groups.values() for module in modules}
        plain = [self._subject.published[name] for name in self._subject.spec.linears() if name not in kept]
        # the tied head is a module of its own there, though its weight is the embedding's
        return [*plain, "lm_head"] if self._subject.spec.tie_embeddings else plain

    def described(self, module: str) -> Described:
        n, k = self._subject.size(module)
        layer = self._subject.layers[module]
        scheme = layer.scheme
        if _format(scheme, layer.activation) == "pack-quantized":
            words = -(-k * scheme.bits // 32)
            made: Described = {"weight_packed": ("I32", (n, words)), "weight_shape": ("I64", (2,))}
        else:
            made = {"weight": ("I8" if scheme.type == "int8" else "F8_E4M3", (n, k))}
        scale, shape = self._subject.store.entry(f"{module}.weight_scale"), (n, 1)
        made["weight_scale"] = (scale.dtype, scale.shape if len(scale.shape) == 2 else _column(scheme, shape))
        if not scheme.symmetric:
            made["weight_zero_point"] = ("I32", (-(-n // 8), scale.shape[1]))
        if layer.activation is not None and layer.activation.granularity == "tensor":
            made["input_scale"] = (self._subject.code(f"{module}.input_scale"), (1,))
        return made

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        import torch

        from trtllm_cli.quantize.interchange.packing import bytes_to_words, pack_columns

        described = self.described(module)
        weight = self._subject.tensor(f"{module}.weight")
        made: dict[str, torch.Tensor] = {}
        if "weight_packed" in described:
            # four bits hold value + 8 in either format; eight bits 128 above the value here
            made["weight_packed"] = bytes_to_words(weight if weight.dtype == torch.uint8 else _above(weight))
            made["weight_shape"] = torch.tensor(self._subject.size(module))
        else:
            made["weight"] = weight
        made["weight_scale"] = self._subject.tensor(f"{module}.weight_scale").reshape(described["weight_scale"][1])
        if "weight_zero_point" in described:
            zero = self._subject.tensor(f"{module}.weight_zero")
            made["weight_zero_point"] = pack_columns(zero.T.contiguous()).T.contiguous()
        if "input_scale" in described:
            made["input_scale"] = self._subject.tensor(f"{module}.input_scale").reshape(1)
        return made

    def _scale_names(self) -> dict[str, str]:
        """Published -> canonical name of every cache scale."""
        if self._record.kv_cache is None:
            return {}
        names = {}
        for layer in range(self._subject.spec.num_layers):
            attention = self._subject.published[f"layers.{layer}.attn.k"].rpartition(".")[0]
            for kind in ("k_scale", "v_scale"):
                names[f"{attention}.{kind}"] = f"layers.{layer}.attn.{kind}"
        return names

    def scales(self) -> Described:
        cache = self._record.kv_cache
        heads = cache is not None and cache.granularity == "head"
        shape = (self._subject.spec.num_kv_heads, 1, 1) if heads else (1,)
        return dict.fromkeys(self._scale_names(), ("F32", shape))

    def scale(self, name: str) -> torch.Tensor:
        scale = self._subject.tensor(self._scale_names()[name]).float()
        shape = self.scales()[name][1]
        return scale.reshape(shape) if len(shape) == 3 else scale[:1]


def _notes(subject: Subject) -> list[str]:
    notes = []
    if any(not layer.scheme.symmetric for layer in subject.layers.values()):
        notes.append(
            "compressed-tensors 0.20 loads zero points in transformers only when asked to dequantize: "
            "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))"
        )
    activations = [layer.activation for layer in subject.layers.values() if layer.activation is not None]
    if any(activation.type == "int8" and activation.granularity == "token" for activation in activations):
        notes.append(
            "transformers emulates int8 inputs with max|x| / 127.5 a token where kernels, and this tool, divide "
            "by 127: its logits differ a little"
        )
    return notes


def _whole(formats: set[str]) -> str:
    """The format of the whole checkpoint; nothing but a cache is quantized where there is none."""
    if not formats:
        return "naive-quantized"
    return next(iter(formats)) if len(formats) == 1 else "mixed-precision"


def _column(scheme: WeightScheme, shape: tuple[int, int]) -> tuple[int, ...]:
    return (1,) if scheme.granularity == "tensor" else shape


def _above(weight: torch.Tensor) -> torch.Tensor:
    """int8 -> uint8, 128 more, modulo 256."""
    import torch

    return weight.view(torch.uint8) ^ 128


def _format(scheme: WeightScheme, activation: ActivationScheme | None) -> str:
    if scheme.type == "fp8":
        return "float-quantized" if activation is not None else "naive-quantized"
    return "int-quantized" if activation is not None else "pack-quantized"


def _weights(scheme: WeightScheme) -> dict[str, Any]:
    whole_row = scheme.granularity == "group" and scheme.group_size in (None, -1)
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.type == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" and not whole_row else None,
        "dynamic": False,
    }


def _inputs(activation: ActivationScheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float" if activation.type == "fp8" else "int",
        "symmetric": True,
        "strategy": activation.granularity,
        "dynamic": activation.granularity == "token",
    }


def _cache(cache: KvCacheScheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float" if cache.type == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor" if cache.granularity == "tensor" else "attn_head",
        "dynamic": False,
    }
