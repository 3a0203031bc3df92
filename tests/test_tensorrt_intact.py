"""A plan is compared with the digests its build recorded, before TensorRT reads it."""

from __future__ import annotations

import hashlib

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import raises
from tests.support_tensorrt_runtime import checkpoint_of, engine_of, family_model
from trtllm_cli.artifacts.store import open_artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt import plan as plans
from trtllm_cli.build.tensorrt.build import PLAN
from trtllm_cli.runtime.tensorrt.intact import Intact


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("intact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "_PIECE", 1 << 16)
        return engine_of(checkpoint_of(family_model("llama"), directory), directory / "engine")


def test_a_build_records_a_digest_of_each_piece_of_the_plan(engine):
    content = engine.file(PLAN).read_bytes()
    pieces = [content[at : at + (1 << 16)] for at in range(0, len(content), 1 << 16)]
    assert len(pieces) > 3
    assert tensorrt_tactics(engine.engine).plan_digests == tuple(hashlib.sha256(one).hexdigest() for one in pieces)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_changed_byte_is_found(engine, monkeypatch, place):
    monkeypatch.setattr(plans, "_PIECE", 1 << 16)
    path = engine.file(PLAN)
    content = path.read_bytes()
    at = int(place * len(content))
    try:
        Intact(engine).require()
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with raises("PLAN_DAMAGED", 3, "1 of its"):
            Intact(open_artifact(engine.path, "engine")).require()
    finally:
        path.write_bytes(content)


def test_an_engine_of_an_older_version_has_no_digests_to_compare_with(engine):
    manifest = engine.manifest.model_copy(deep=True)
    tactics = {key: value for key, value in engine.engine.tactics.items() if key != "plan_digests"}
    older = type(engine)(
        engine.path, manifest.model_copy(update={"body": engine.engine.model_copy(update={"tactics": tactics})})
    )
    Intact(older).require()
