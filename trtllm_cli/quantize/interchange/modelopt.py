"""FP8 checkpoints of NVIDIA ModelOpt's unified Hugging Face export.

``weight`` E4M3 [N, K] with ``weight_scale`` [] (algorithm ``FP8``, with a calibrated ``input_scale`` []) or [N]
(``FP8_PER_CHANNEL_PER_TOKEN``, inputs scaled at run time). With an FP8 cache ``k_proj.k_scale`` and ``v_proj.v_scale``
are scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme, WeightScheme
from trtllm_cli.quantize.interchange.base import (
    SCALE_TYPES,
    Description,
    KvSource,
    Linear,
    Needed,
    Planned,
    Shape,
    Tensors,
    finite,
    positive,
    section,
    text,
    unsupported,
)

if TYPE_CHECKING:
    import torch

_SCALAR: tuple[Shape, ...] = ((), (1,), (1, 1))


class ModelOptLayout:
    """See the module. ``config`` is config.json's quantization_config or the file hf_quant_config.json."""

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, where: str) -> None:
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        settings = section(config, "quantization", where) or config
        algorithm = text(settings, "quant_algo", where)
        if algorithm not in ("fp8", "fp8_per_channel_per_token"):
            raise unsupported(where, f"ModelOpt's {algorithm.upper() or 'unnamed algorithm'}; FP8 is read")
        self._per_channel = algorithm != "fp8"
        self.kv = self._cache(settings, where)
        producer = section(config, "producer", where)
        self.description = Description(
            "fp8",
            "modelopt",
            {"algorithm": algorithm.upper(), **({"version": v} if (v := producer.get("version")) else {})},
        )

    def _cache(self, settings: Mapping[str, Any], where: str) -> KvSource | None:
        # config.json spells it as a scheme, hf_quant_config.json as the algorithm's name
        named = settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme")
        if named is None:
            return None
        if isinstance(named, Mapping):
            named = "FP8" if (named.get("type"), named.get("num_bits")) == ("float", 8) else str(dict(named))
        if named != "FP8":
            raise unsupported(where, f"ModelOpt's {named} cache; FP8 is read")
        return KvSource(KvCacheScheme(type="fp8", granularity="tensor"), "k_proj.k_scale", "v_proj.v_scale")

    def quantized(self, linear: Linear) -> bool:
        return f"{linear.published}.weight_scale" in self._names

    def needed(self, linear: Linear) -> dict[str, Needed]:
        n, k, p = linear.out_features, linear.in_features, linear.published
        if linear.module == "embed":
            raise unsupported(p, "an fp8 embedding")
        needed = {
            f"{p}.weight": Needed(((n, k),), ("F8_E4M3",)),
            f"{p}.weight_scale": Needed(((n,), (n, 1)) if self._per_channel else _SCALAR, SCALE_TYPES),
        }
        if not self._per_channel:
            needed[f"{p}.input_scale"] = Needed(_SCALAR, SCALE_TYPES)
        return needed

    def plan(self, linear: Linear) -> Planned:
        n, k = linear.out_features, linear.in_features
        tensors: dict[str, tuple[str, Shape]] = {
            "weight": ("F8_E4M3", (n, k)),
            "weight_scale": ("F32", (n,) if self._per_channel else (1,)),
        }
        if self._per_channel:
            return Planned(
                WeightScheme(type="fp8", granularity="channel"),
                ActivationScheme(type="fp8", granularity="token"),
                tensors,
            )
        tensors["input_scale"] = ("F32", (1,))
        return Planned(
            WeightScheme(type="fp8", granularity="tensor"), ActivationScheme(type="fp8", granularity="tensor"), tensors
        )

    def read(self, linear: Linear, planned: Planned) -> dict[str, torch.Tensor]:
        p = linear.published
        made = {"weight": finite(self._tensors.tensor(f"{p}.weight"), f"{p}.weight")}
        for suffix in list(planned.tensors)[1:]:
            name = f"{p}.{suffix}"
            tensor = self._tensors.tensor(name)
            checked = positive(tensor, name) if suffix == "input_scale" else finite(tensor, name).float()
            made[suffix] = checked.reshape(planned.tensors[suffix][1])
        return made
