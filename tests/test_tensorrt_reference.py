"""The reference execution context refuses what TensorRT refuses, with a reason, and runs only what fits together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_tensorrt import FAMILIES, Network, random_weights
from trtllm_cli.artifacts.tensorrt import ProfileTactics, TensorRTTactics
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import cache_names, define, new_definition, updated
from trtllm_cli.errors import BadInputError
from trtllm_cli.runtime.tensorrt.memory import ALIGNMENT, Memory
from trtllm_cli.runtime.tensorrt.reference import ReferenceContext, ReferenceSession

CONTEXT = 32
SEEN = (1, CONTEXT, CONTEXT)
SPEC = FAMILIES["qwen3"]
TACTICS = TensorRTTactics(
    network_layers=1,
    complete=False,
    profiles=(
        ProfileTactics(name="context", batch=(1, 1, 2), tokens=(1, 8, 16), rows=(1, 1, 8), seen=SEEN),
        ProfileTactics(name="generation-1", batch=(1, 1, 1), tokens=(1, 1, 1), rows=(1, 1, 1), seen=SEEN),
        ProfileTactics(name="generation-4", batch=(2, 4, 4), tokens=(1, 1, 1), rows=(2, 4, 4), seen=SEEN),
    ),
)
CACHES = [name for layer in range(SPEC.num_layers) for name in cache_names(layer)]


class Bound:
    """A context of one profile with memory for ``batch`` sequences of ``tokens`` tokens, everything set."""

    def __init__(self, profile: int, batch: int, tokens: int, rows: int) -> None:
        layers = new_definition(load()).layers
        define(layers, SPEC, random_weights(SPEC), "float32", CONTEXT)
        self.session = ReferenceSession(layers, TACTICS)
        self.context: ReferenceContext = self.session.context(profile)
        memory = Memory(torch.device("cpu"))
        cache = (batch, SPEC.num_kv_heads, CONTEXT, SPEC.head_dim)
        shapes = {
            "token_ids": (batch, tokens),
            "starts": (batch,),
            "rows": (rows,),
            "seen": (tokens,),
            **dict.fromkeys(CACHES, cache),
        }
        self.tensors = {
            name: memory.zeros(shape, torch.float32 if name in CACHES else torch.int32)
            for name, shape in shapes.items()
        }
        self.tensors["seen"].copy_(torch.arange(tokens))
        self.tensors["logits"] = memory.zeros((rows, SPEC.vocab_size), torch.float32)
        for name, shape in shapes.items():
            assert self.context.set_input_shape(name, shape), self.session.complaints()
        for name, tensor in self.tensors.items():
            assert self.context.set_tensor_address(name, tensor.data_ptr())
        for name in CACHES:
            assert self.context.set_tensor_address(updated(name), self.tensors[name].data_ptr())

    def refuses(self, *needles: str) -> None:
        """Nothing runs, for a reason."""
        before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        assert self.context.execute_async_v3(0) is False
        reason = self.session.complaints()
        assert all(needle in reason for needle in needles), reason
        assert all(torch.equal(before[name], tensor) for name, tensor in self.tensors.items())


def test_it_computes_in_place_what_the_evaluator_computes():
    bound = Bound(0, batch=2, tokens=5, rows=3)
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    bound.tensors["token_ids"].copy_(torch.from_numpy(ids))
    bound.tensors["rows"].copy_(torch.tensor([4, 9, 7]))
    assert bound.context.execute_async_v3(0)
    network = Network(SPEC, random_weights(SPEC), "float32", CONTEXT, 2)
    expected = network.step(ids, [0, 0], [4, 4])
    logits = bound.tensors["logits"].numpy()
    np.testing.assert_allclose(logits[:2], expected, atol=1e-6)
    assert np.abs(logits[2] - expected[1]).max() > 0.01
    for name in CACHES:
        torch.testing.assert_close(bound.tensors[name][:, :, :5], network.caches[name][:, :, :5])
        assert not bound.tensors[name][:, :, 5:].any()


def test_a_smaller_batch_at_another_slot_leaves_the_others_alone():
    bound = Bound(0, batch=2, tokens=5, rows=1)
    for name, shape in (("token_ids", (1, 5)), ("starts", (1,))):
        assert bound.context.set_input_shape(name, shape)
    for name in CACHES:
        cache = bound.tensors[name]
        assert bound.context.set_input_shape(name, (1, *cache.shape[1:]))
        for bind in (name, updated(name)):
            assert bound.context.set_tensor_address(bind, cache[1].data_ptr())
    assert bound.context.execute_async_v3(0)
    for name in CACHES:
        assert not bound.tensors[name][0].any()
        assert bound.tensors[name][1, :, :5].any()


@pytest.mark.parametrize(
    ("profile", "name", "shape"),
    [
        (0, "token_ids", (3, 5)),
        (0, "token_ids", (1, 17)),
        (0, "token_ids", (0, 5)),
        (0, "token_ids", (5,)),
        (0, "rows", (9,)),
        (0, "starts", (3,)),
        (0, "seen", (CONTEXT + 1,)),
        (0, CACHES[0], (1, SPEC.num_kv_heads, CONTEXT + 1, SPEC.head_dim)),
        (1, "token_ids", (1, 2)),
        (1, "token_ids", (2, 1)),
        (2, "token_ids", (1, 1)),
        (2, "starts", (5,)),
    ],
)
def test_a_shape_outside_the_profile_is_refused(profile, name, shape):
    bound = Bound(profile, *((1, 5, 1), (1, 1, 1), (2, 1, 2))[profile])
    assert bound.context.set_input_shape(name, shape) is False
    reason = bound.session.complaints()
    assert name in reason
    assert str(shape) in reason
    assert bound.context.execute_async_v3(0), "what was set before stays set"


def test_shapes_are_forgotten_with_the_profile():
    bound = Bound(0, batch=2, tokens=1, rows=2)
    assert bound.context.set_optimization_profile_async(2, 0)
    assert bound.context.infer_shapes() == ["token_ids", "starts", "rows", "seen", *CACHES]
    bound.refuses("no shape", "token_ids", CACHES[0])
    assert bound.context.set_optimization_profile_async(3, 0) is False


def test_unknown_tensors_are_refused():
    bound = Bound(1, 1, 1, 1)
    assert bound.context.set_input_shape("last", (1,)) is False
    assert bound.context.set_input_shape("logits", (1, SPEC.vocab_size)) is False
    assert bound.context.set_tensor_address("last", ALIGNMENT) is False


def test_addresses_must_be_set_and_aligned():
    bound = Bound(1, 1, 1, 1)
    assert bound.context.set_tensor_address("logits", bound.tensors["logits"].data_ptr() + 4) is False
    assert "logits" in bound.session.complaints()
    assert bound.context.get_tensor_address("logits") == bound.tensors["logits"].data_ptr()
    assert bound.context.set_tensor_address("logits", 0)
    bound.refuses("no address", "logits")


def test_a_cache_bound_elsewhere_than_its_updated_self_is_refused():
    bound = Bound(1, 1, 1, 1)
    assert bound.context.set_tensor_address(updated(CACHES[1]), bound.tensors[CACHES[0]].data_ptr())
    bound.refuses(CACHES[1], "in place")


def test_batches_must_agree():
    bound = Bound(2, 3, 1, 3)
    assert bound.context.set_input_shape("starts", (2,))
    bound.refuses("batch", "3", "2")


@pytest.mark.parametrize(("name", "value"), [("starts", CONTEXT - 4), ("starts", -1), ("rows", 5), ("rows", -1)])
def test_numbers_that_lead_out_of_memory_are_an_error(name, value):
    bound = Bound(0, batch=1, tokens=5, rows=1)
    bound.tensors[name].fill_(value)
    with pytest.raises(BadInputError, match=f"INPUT_WRONG.*{name}"):
        bound.context.execute_async_v3(0)
