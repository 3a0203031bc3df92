"""What a TensorRT engine says of its plan: the optimization profiles, what they compiled to, and what must be bound.

Written by the build as the engine's ``tactics``, read by the runtime and by ``inspect``.
"""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from trtllm_cli.artifacts.schema import Dtype, EngineBody, LayerQuantization, RelativePath
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen

#: smallest, usual and largest value of one dynamic size
Range = tuple[int, int, int]


class ProfileTactics(Frozen):
    """One optimization profile: the sizes it takes, and what its part of the plan compiled to.

    ``batch`` sequences take ``tokens`` new tokens each, ``rows`` of these tokens have their logits returned, and
    attention walks the first ``seen`` positions of each cache.
    ``attention`` counts fused attention kernels by name, ``products`` the model's matrix products by what their kernels
    read (:mod:`trtllm_cli.build.tensorrt.linears`), and ``fallbacks`` names the modules that did not become what they
    were meant to. ``scratch_bytes`` is the memory of activations at the largest sizes.
    """

    name: str
    batch: Range
    tokens: Range
    rows: Range
    seen: Range
    kernels: int = 0
    attention: dict[str, int] = Field(default_factory=dict)
    gemms: int = 0
    products: dict[str, int] = Field(default_factory=dict)
    fallbacks: dict[str, str] = Field(default_factory=dict)
    scratch_bytes: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> ProfileTactics:
        for name in ("batch", "tokens", "rows", "seen"):
            least, usual, most = getattr(self, name)
            if not 0 < least <= usual <= most:
                raise ValueError(f"{name} of profile {self.name} is {least}, {usual}, {most}: not in order")
        return self

    def takes(self, batch: int, tokens: int, rows: int) -> bool:
        """Whether a step of these sizes lies in the profile."""
        sizes = ((batch, self.batch), (tokens, self.tokens), (rows, self.rows))
        return all(least <= size <= most for size, (least, _, most) in sizes)


class TensorRTTactics(Frozen):
    """``profiles`` in the order of their indices in the plan: context first, then generation by growing batch.

    ``complete`` says whether the build log was understood (kernels are recorded), ``network_layers`` counts layers
    before fusion. Where the weights are inputs of the plan, ``weight_inputs`` names them and ``weight_file`` is the
    safetensors file that holds tensors of these names, in the type and shape to bind. ``plan_digests`` are the sha256
    of each 64 MiB of the plan; engines of older versions have none.
    """

    network_layers: int
    complete: bool
    profiles: tuple[ProfileTactics, ...] = Field(min_length=2)
    weight_file: RelativePath | None = None
    weight_inputs: tuple[str, ...] = ()
    fp8_attention: bool = False
    plan_digests: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _covering(self) -> TensorRTTactics:
        first, *generation = self.profiles
        if first.name != "context":
            raise ValueError(f"the first profile is {first.name}, not context")
        expected = 1
        for profile in generation:
            if profile.batch[0] != expected:
                raise ValueError(f"profile {profile.name} begins at batch {profile.batch[0]}, not {expected}")
            expected = profile.batch[2] + 1
        if bool(self.weight_inputs) != (self.weight_file is not None):
            raise ValueError("weights that are inputs have a file, and only these")
        return self

    @property
    def context(self) -> ProfileTactics:
        """The profile (index 0) of several new tokens a sequence."""
        return self.profiles[0]

    def generation(self, batch: int) -> int:
        """Index of the profile in which ``batch`` sequences take one new token each.

        Raises ValueError for a batch of 0 or beyond the engine's concurrency.
        """
        for index, profile in enumerate(self.profiles[1:], 1):
            if profile.batch[0] <= batch <= profile.batch[2]:
                return index
        raise ValueError(f"no generation profile takes a batch of {batch}")


def intended(layer: LayerQuantization | None, dtype: Dtype) -> str:
    """What the kernel of a module's product is meant to read: low-bit weights, 8-bit operands, or the compute type."""
    if layer is None:
        return dtype
    return f"{layer.scheme.type} {'products' if layer.activation is not None else 'weights'}"


def kernels_by_module(engine: EngineBody) -> dict[str, tuple[str, ...]]:
    """What each product and each attention became in every profile, in the order of execution.

    Raises BadInputError as :func:`tensorrt_tactics`.
    """
    tactics, spec = tensorrt_tactics(engine), engine.spec
    layers = {layer.module: layer for layer in engine.quantization.layers} if engine.quantization else {}
    attention = "fused, fp8" if tactics.fp8_attention else "fused"
    meant: dict[str, str] = {}
    for module in (*spec.linears(), *(("embed",) if spec.tie_embeddings else ())):
        if module.endswith(".attn.o"):
            meant[module.removesuffix(".o")] = attention
        meant[module] = intended(layers.get(module), engine.dtype)
    return {
        module: tuple(
            profile.fallbacks.get(module, what) if tactics.complete else "unknown" for profile in tactics.profiles
        )
        for module, what in meant.items()
    }


def tensorrt_tactics(engine: EngineBody) -> TensorRTTactics:
    """The tactics of a TensorRT engine. Raises BadInputError for those of another version or backend."""
    try:
        return TensorRTTactics.model_validate(engine.tactics)
    except ValidationError as error:
        raise BadInputError(
            "TACTICS_UNREADABLE",
            f"the {engine.backend} engine does not describe its profiles as this version does"
            f" ({error.errors()[0]['msg']})",
            "repeat `trtllm-cli build --backend tensorrt` with --force",
        ) from error
