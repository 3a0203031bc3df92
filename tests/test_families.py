"""The one forward pass against Hugging Face: every family, prefill, cached decoding, ragged batches, to 1e-4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_models import CASES, published_config, tiny_model
from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.models.families import family_of, supported
from trtllm_cli.runtime.executor import Segment
from trtllm_cli.runtime.torch_executor import TorchExecutor

TOLERANCE = 1e-4


class StateDict:
    """A Hugging Face state dict under canonical names."""

    def __init__(self, model, spec, family) -> None:
        state = model.state_dict()
        self.tensors = {ours: state[theirs] for ours, theirs in family.published_names(spec).items()}

    def dense(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    kv_cache = None

    def input_quantizer(self, module: str) -> None:
        return None


def load(case: str, slots: int = 3, context: int = 64):
    model = tiny_model(case)
    config = published_config(model)
    family = family_of(config, case)
    spec = family.spec(config, case)
    weights = StateDict(model, spec, family)
    assert {name: tuple(t.shape) for name, t in weights.tensors.items()} == spec.tensor_shapes()
    return model, TorchExecutor(spec, weights, context, slots, torch.float32, None)


def reference(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].float().numpy()


def random_tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, count).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_prefill_matches_transformers(case):
    model, executor = load(case)
    tokens = random_tokens(40, 1)
    ours = executor.forward([Segment(0, 0, tokens, "all")])
    theirs = reference(model, tokens)
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_ragged_cached_decoding_matches_transformers(case):
    model, executor = load(case)
    sequences = [random_tokens(count, count) for count in (23, 9, 31)]
    begins = (11, 1, 30)
    executor.forward([Segment(slot, 0, seq[:n], "last") for slot, (seq, n) in enumerate(zip(sequences, begins))])
    # uneven chunks, then single tokens, in whatever batch is left
    positions = list(begins)
    while any(p < len(s) for p, s in zip(positions, sequences)):
        segments = []
        for slot, seq in enumerate(sequences):
            if positions[slot] < len(seq):
                chunk = 3 if slot == 0 and positions[slot] < 14 else 1
                segments.append(Segment(slot, positions[slot], seq[positions[slot] : positions[slot] + chunk], "last"))
        logits = executor.forward(segments)
        for row, segment in zip(logits, segments):
            end = segment.start + len(segment.tokens)
            expected = reference(model, sequences[segment.slot][:end])[-1]
            assert np.abs(row - expected).max() < TOLERANCE, (segment.slot, end)
            positions[segment.slot] = end


def test_a_used_slot_forgets_its_former_sequence():
    model, executor = load("llama-gqa")
    executor.forward([Segment(1, 0, random_tokens(50, 3), "last")])
    tokens = random_tokens(7, 4)
    ours = executor.forward([Segment(1, 0, tokens, "all")])
    assert np.abs(ours - reference(model, tokens)).max() < TOLERANCE


def test_unknown_architecture_is_named():
    with pytest.raises(UnsupportedError) as caught:
        family_of({"architectures": ["GPT2LMHeadModel"]}, "model/config.json")
    assert "GPT2LMHeadModel" in caught.value.message
    assert all(name in caught.value.message for name in supported())


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": 5, "head_dim": 8}, "num_heads 5"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": -3}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_a_bad_config_names_its_key(change, needle):
    config = {**published_config(tiny_model("llama-gqa")), **change}
    with pytest.raises((BadInputError, UnsupportedError)) as caught:
        family_of(config, "config.json").spec(config, "config.json")
    assert needle in caught.value.message


def test_older_configs_spell_rotary_theta_and_scaling_apart():
    config = published_config(tiny_model("llama-llama3"))
    parameters = config.pop("rope_parameters")
    older = {**config, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    family = family_of(config, "new")
    newer = published_config(tiny_model("llama-llama3"))
    assert family.spec(older, "old") == family.spec(newer, "new")
