"""What a decoder-only transformer is, as data: everything the forward pass needs to know besides the weights.

A family module (:mod:`trtllm_cli.models.families`) turns a published ``config.json`` into a :class:`DecoderSpec`; the
one forward pass (:mod:`trtllm_cli.models.decoder`) reads nothing else. Every field is plain data, so a spec is stored
in the manifest of checkpoints and engines and two specs compare by value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Base of all value objects: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RotaryScaling(Frozen):
    """How rotary frequencies are stretched beyond the trained context.

    ``linear`` divides every frequency by ``factor`` (Chen et al., 2023). ``llama3`` divides only the long wavelengths
    and blends in between (Llama 3.1 release). ``yarn`` blends by the number of rotations inside the original context
    and scales attention by ``attention_factor`` (Peng et al., 2023).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_max_positions: int | None = Field(default=None, gt=0)
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _complete(self) -> RotaryScaling:
        if self.kind == "llama3" and None in (
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_positions,
        ):
            raise ValueError("llama3 scaling needs low_freq_factor, high_freq_factor and original_max_positions")
        if self.kind == "yarn" and self.original_max_positions is None:
            raise ValueError("yarn scaling needs original_max_positions")
        return self


class RotarySpec(Frozen):
    """Rotary position embedding of the first ``dim`` elements of each head, half-rotation layout.

    Element ``i`` pairs with ``i + dim/2`` (the layout of published Hugging Face checkpoints; GGUF's interleaved llama
    layout is undone on import).
    """

    theta: float = Field(gt=0)
    dim: int = Field(gt=0, multiple_of=2)
    scaling: RotaryScaling | None = None


class NormSpec(Frozen):
    """Normalisation over the last dimension; ``rms`` is x / sqrt(mean(x^2) + eps) * weight, in float32."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(gt=0)


class DecoderSpec(Frozen):
    """A decoder-only transformer with pre-normalisation and a gated MLP. Sizes count elements."""

    family: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    norm: NormSpec
    activation: Literal["silu", "gelu", "gelu_tanh"]
    rotary: RotarySpec
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    #: per layer: how many of the latest positions (itself included) a token may attend to; None for all of them
    windows: tuple[int | None, ...]

    @model_validator(mode="after")
    def _consistent(self) -> DecoderSpec:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if any(w is not None and w <= 0 for w in self.windows):
            raise ValueError("a sliding window must be positive")
        if self.rotary.dim > self.head_dim:
            raise ValueError(f"rotary dim {self.rotary.dim} exceeds head_dim {self.head_dim}")
        return self

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layer_linears(self, layer: int) -> dict[str, tuple[int, int, bool]]:
        """Linear modules of one layer: canonical name -> (out_features, in_features, has_bias)."""
        p = f"layers.{layer}"
        h, m = self.hidden_size, self.intermediate_size
        return {
            f"{p}.attn.q": (self.q_size, h, self.qkv_bias),
            f"{p}.attn.k": (self.kv_size, h, self.qkv_bias),
            f"{p}.attn.v": (self.kv_size, h, self.qkv_bias),
            f"{p}.attn.o": (h, self.q_size, self.attention_out_bias),
            f"{p}.mlp.gate": (m, h, self.mlp_bias),
            f"{p}.mlp.up": (m, h, self.mlp_bias),
            f"{p}.mlp.down": (h, m, self.mlp_bias),
        }

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """All linear modules in execution order, ``lm_head`` last (absent when tied to ``embed``)."""
        found: dict[str, tuple[int, int, bool]] = {}
        for layer in range(self.num_layers):
            found.update(self.layer_linears(layer))
        if not self.tie_embeddings:
            found["lm_head"] = (self.vocab_size, self.hidden_size, False)
        return found

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every canonical tensor of the unquantized checkpoint and its shape, in execution order."""
        h = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, h)}
        for layer in range(self.num_layers):
            p = f"layers.{layer}"
            shapes[f"{p}.attn_norm.weight"] = (h,)
            for name, (out, inp, bias) in self.layer_linears(layer).items():
                if name == f"{p}.mlp.gate":
                    shapes[f"{p}.mlp_norm.weight"] = (h,)
                shapes[f"{name}.weight"] = (out, inp)
                if bias:
                    shapes[f"{name}.bias"] = (out,)
                if self.qk_norm and name in (f"{p}.attn.q", f"{p}.attn.k"):
                    shapes[f"{name}_norm.weight"] = (self.head_dim,)
        shapes["norm.weight"] = (h,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes
