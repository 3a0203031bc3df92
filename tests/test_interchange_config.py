"""A spec written as a published config: read back it is the same spec, and transformers builds the same network."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support_models import CASES, published_config, tiny_model
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.models.families import family_of
from trtllm_cli.models.published import published_config as written_config
from trtllm_cli.models.spec import DecoderSpec


def spec_of(config) -> DecoderSpec:
    return family_of(config, "config.json").spec(config, "config.json")


@pytest.mark.parametrize("case", CASES)
def test_the_config_of_a_spec_gives_the_spec_back(case):
    spec = spec_of(published_config(tiny_model(case)))
    written = json.loads(json.dumps(written_config(spec, "float32")))
    assert spec_of(written) == spec


@pytest.mark.parametrize("case", CASES)
def test_transformers_builds_the_same_model_from_it(case, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_model(case)
    written = written_config(spec_of(published_config(model)), "float32")
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path)
    rebuilt = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert type(rebuilt) is type(model)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert rebuilt.dtype == torch.float32
    tokens = torch.arange(40)[None] % 97
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_one_transformers_loads(dtype, tmp_path):
    from transformers import AutoConfig

    spec = spec_of(published_config(tiny_model("llama-gqa")))
    (tmp_path / "config.json").write_text(json.dumps(written_config(spec, dtype)))
    assert AutoConfig.from_pretrained(tmp_path).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("case", "change", "needle"),
    [
        ("qwen2-full", {"qkv_bias": False}, "qkv_bias"),
        ("mistral-full", {"windows": (5, None, None)}, "windows"),
        ("llama-gqa", {"attention_out_bias": True}, "attention_out_bias"),
        ("llama-gqa", {"windows": (3, 4, None)}, "2 sizes"),
        ("llama-gqa", {"family": "mamba"}, "mamba"),
    ],
)
def test_what_a_family_cannot_say_is_refused(case, change, needle):
    spec = spec_of(published_config(tiny_model(case))).model_copy(update=change)
    with pytest.raises(UnsupportedError) as caught:
        written_config(spec, "float32")
    assert needle in caught.value.message


@pytest.mark.parametrize("head_dim", range(2, 130, 2))
def test_partial_rotary_survives_rounding(head_dim):
    spec = spec_of(published_config(tiny_model("llama-head-dim")))
    for dim in range(2, head_dim + 1, 2):
        rotary = spec.rotary.model_copy(update={"dim": dim})
        changed = spec.model_copy(update={"head_dim": head_dim, "rotary": rotary})
        assert spec_of(written_config(changed, "float32")) == changed
