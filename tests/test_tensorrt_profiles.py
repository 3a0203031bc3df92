"""How the two sizing numbers become optimization profiles, and how these are described."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from hypothesis import given
from hypothesis import strategies as st

from tests.support_artifacts import raises
from tests.support_tensorrt import FAMILIES, write_checkpoint
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.schema import EngineBody, EngineLimits
from trtllm_cli.artifacts.tensorrt import ProfileTactics, TensorRTTactics, tensorrt_tactics
from trtllm_cli.build.tensorrt.network import Sizing, generation_batches, profiles
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine, resolve_generation
from trtllm_cli.errors import UsageError


def tactics(sizing: Sizing) -> TensorRTTactics:
    found = tuple(ProfileTactics(**sizes.model_dump()) for sizes in profiles(sizing))
    return TensorRTTactics(network_layers=1, complete=True, profiles=found)


@given(context=st.integers(1, 200_000), concurrency=st.integers(1, 600))
def test_every_batch_has_one_generation_profile_and_prompts_stay_bounded(context, concurrency):
    found = tactics(Sizing(context=context, concurrency=concurrency))
    for batch in {1, 2, 8, 9, concurrency} & set(range(1, concurrency + 1)):
        chosen = found.profiles[found.generation(batch)]
        assert [profile for profile in found.profiles[1:] if profile.takes(batch, 1, batch)] == [chosen]
    with pytest.raises(ValueError, match="no generation profile"):
        found.generation(concurrency + 1)
    prompts = found.context
    assert prompts.takes(1, prompts.tokens[2], 1)
    assert prompts.takes(prompts.batch[2], 1, prompts.batch[2])
    assert prompts.batch[2] <= concurrency
    assert prompts.tokens[2] <= context
    assert prompts.batch[2] * prompts.tokens[2] <= 8192
    # a text is scored in pieces whose rows are all returned
    piece = min(128, prompts.tokens[2])
    assert prompts.takes(1, piece, piece)


def test_a_single_sequence_and_few_have_profiles_of_their_own():
    assert generation_batches(1) == (1,)
    assert generation_batches(8) == (1, 8)
    assert generation_batches(64) == (1, 8, 64)
    found = profiles(Sizing(context=4096, concurrency=64))
    assert [(sizes.name, sizes.batch, sizes.tokens, sizes.rows) for sizes in found] == [
        ("context", (1, 1, 4), (1, 512, 2048), (1, 1, 128)),
        ("generation-1", (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ("generation-8", (2, 8, 8), (1, 1, 1), (2, 8, 8)),
        ("generation-64", (9, 64, 64), (1, 1, 1), (9, 64, 64)),
    ]


def test_low_bit_weights_share_a_profile_of_a_few_that_is_tuned_for_one():
    assert generation_batches(1, low_bit=True) == (2,)
    assert generation_batches(2, low_bit=True) == (2,)
    assert generation_batches(8, low_bit=True) == (8,)
    assert generation_batches(64, low_bit=True) == (8, 64)
    found = profiles(Sizing(context=64, concurrency=64, low_bit=True))
    assert [(sizes.batch, sizes.rows) for sizes in found[1:]] == [((1, 1, 8), (1, 1, 8)), ((9, 64, 64), (9, 64, 64))]
    found = profiles(Sizing(context=64, concurrency=8, generation=(2, 8)))
    assert [sizes.batch for sizes in found[1:]] == [(1, 1, 2), (3, 8, 8)]
    # a head alone: the batch is fixed, the rows of logits are not
    found = profiles(Sizing(context=64, concurrency=8, wide_rows=True))
    assert [(sizes.batch, sizes.rows) for sizes in found[1:]] == [((1, 1, 1), (1, 1, 2)), ((2, 8, 8), (2, 8, 8))]


def test_generation_batches_of_ones_own():
    assert resolve_generation((), 16) == (1, 8, 16)
    assert resolve_generation((16,), 16) == (16,)
    assert resolve_generation((1, 4), 16) == (1, 4, 16)
    found = profiles(Sizing(context=64, concurrency=16, generation=(4, 16)))
    assert [sizes.batch for sizes in found[1:]] == [(1, 4, 4), (5, 16, 16)]
    found = profiles(Sizing(context=64, concurrency=16, generation=(4, 16), low_bit=True))
    assert [sizes.batch for sizes in found[1:]] == [(1, 1, 4), (5, 16, 16)]


@pytest.mark.parametrize(
    ("batches", "code", "needle", "hint"),
    [
        ("1,1,8", "PROFILE_EMPTY", "1,1,8 leave a profile empty: it would take batches 2 to 1", "batches 1,8"),
        ("8,1", "PROFILE_EMPTY", "batches 9 to 1", "--generation-batches 1,8"),
        ("0,8", "PROFILE_EMPTY", "batches 1 to 0", "--generation-batches 8"),
        ("1,16", "PROFILE_BEYOND_CONCURRENCY", "go beyond the concurrency of 8", "--concurrency 16"),
    ],
)
def test_profiles_that_cannot_be(tmp_path, batches, code, needle, hint):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"])
    config = configure(TensorRTOptions, [("command line", {"generation_batches": batches})], "build")
    with raises(code, 2, needle) as caught:
        build_tensorrt_engine(checkpoint, tmp_path / "out", config)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_batches_that_are_no_numbers_are_refused():
    with pytest.raises(UsageError) as caught:
        configure(TensorRTOptions, [("command line", {"generation_batches": "1,many"})], "build")
    assert caught.value.code == "OPTION_INVALID"


def test_the_descriptions_of_another_version_are_told_apart():
    body = EngineBody(
        backend="tensorrt",
        executor="tensorrt_rtx",
        spec=FAMILIES["llama"],
        dtype="float16",
        tokenizer=None,
        limits=EngineLimits(context=8, concurrency=1, weight_bytes=1, cache_bytes=1, scratch_bytes=1),
        tactics={"network_layers": 3, "complete": True, "context": {}, "generation": {}},
    )
    with raises("TACTICS_UNREADABLE", 3, "does not describe its profiles") as caught:
        tensorrt_tactics(body)
    assert "--force" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profiles": []}, "at least 2"),
        ({"weight_inputs": ["embed.weight"]}, "weights that are inputs have a file"),
        ({"weight_file": "weights.safetensors"}, "weights that are inputs have a file"),
    ],
)
def test_contradictions_are_refused(change, message):
    good = tactics(Sizing(context=64, concurrency=4)).model_dump()
    assert TensorRTTactics.model_validate(good)
    with pytest.raises(ValueError, match=message):
        TensorRTTactics.model_validate({**good, **change})


def test_profiles_out_of_order_are_refused():
    good = tactics(Sizing(context=64, concurrency=4)).model_dump()
    first, one, four = good["profiles"]
    for wrong in ([one, first, four], [first, four, one], [first, {**one, "batch": (2, 1, 1)}, four]):
        with pytest.raises(ValueError, match=r"not context|begins at batch|not in order"):
            TensorRTTactics.model_validate({**good, "profiles": wrong})
