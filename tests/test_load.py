"""A machine that computes otherwise than the engine was built for says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trtllm_cli.artifacts.schema import EngineBody
from trtllm_cli.runtime.load import shortfall


@pytest.mark.parametrize(("built", "used", "told"), [("bfloat16", "float32", True), ("bfloat16", "bfloat16", False)])
def test_products_that_fall_back_are_told(built, used, told):
    body = EngineBody.model_construct(executor="native", tactics={"products": built})
    model = SimpleNamespace(
        artifact=SimpleNamespace(manifest=SimpleNamespace(body=body)),
        executor=SimpleNamespace(describe=lambda: {"products": used}),
    )
    note = shortfall(model)
    assert (note is not None) == told
    assert note is None or (built in note and used in note)
