"""Small checkpoints quantized by each scheme that the TensorRT backend takes, made by the real stages."""

from __future__ import annotations

from typing import Any

from tests.support_artifacts import CORPUS, convert_to, quantize_to, save_folder, source_of, text_model
from trtllm_cli.artifacts.store import Artifact

_CALIBRATED = {"calib_rows": 4, "calib_length": 32}

#: scheme -> options of `quantize`
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8-weight-only", "embedding": True},
    "int4-g64": {"method": "int4-weight-only", "group_size": 64},
    "int4-g128": {"method": "int4-weight-only", "group_size": 128, "scale_search": False},
    "int4-g32": {"method": "int4-weight-only", "group_size": 32},
    "int4-rows": {"method": "int4-weight-only", "group_size": -1},
    "int4-everywhere": {
        "method": "int4-weight-only",
        "overrides": ("embed=int4-weight-only", "lm_head=int4-weight-only"),
    },
    "gptq-by-activation": {"method": "gptq", "act_order": "dynamic", **_CALIBRATED},
    "awq": {"method": "awq", **_CALIBRATED},
    "fp8-static": {"method": "fp8", "weights": "tensor", "activations": "tensor", **_CALIBRATED},
    "fp8-static-rows": {"method": "fp8", "activations": "tensor", **_CALIBRATED},
    "fp8-token": {"method": "fp8", "activations": "token"},
    "w8a8-static": {"method": "smoothquant", "activations": "tensor", "alpha": 0.5, **_CALIBRATED},
    "w8a8-token": {"method": "smoothquant", "activations": "token", "alpha": 0.5, **_CALIBRATED},
    "mixed": {
        "method": "int4-weight-only",
        "overrides": ("layers.0.attn.*=int8-weight-only", "layers.1.mlp.*=none", "*.down=fp8", "lm_head=none"),
    },
}


class Checkpoints:
    """Checkpoints of one random float32 Llama by scheme, each made when it is first asked for and then kept.

    Widths are multiples of 128, so that every group size divides them.
    """

    def __init__(self, factory: Any) -> None:
        self._factory = factory
        self._dense: dict[bool, Artifact] = {}
        self._made: dict[tuple[str, bool], Artifact] = {}

    def dense(self, tied: bool = False) -> Artifact:
        """The unquantized model, its embedding tied to the head or not."""
        if tied not in self._dense:
            directory = self._factory.mktemp("tied" if tied else "untied")
            folder = save_folder(text_model(tie_word_embeddings=tied), directory / "published", tokenizer=True)
            self._dense[tied] = convert_to(source_of(folder, directory / "source").path, directory / "checkpoint")
        return self._dense[tied]

    def __call__(self, scheme: str, tied: bool = False) -> Artifact:
        if (scheme, tied) not in self._made:
            directory = self._factory.mktemp(scheme)
            options = dict(SCHEMES[scheme])
            if "calib_rows" in options:
                (directory / "calibration.txt").write_text(CORPUS * 8)
                options["calib"] = str(directory / "calibration.txt")
            self._made[scheme, tied] = quantize_to(self.dense(tied).path, directory / "quantized", **options)
        return self._made[scheme, tied]
