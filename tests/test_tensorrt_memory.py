"""The memory of a build, said before it starts: what it is made of, what it is compared with, and the refusal."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from scripts.llama_shapes import SHAPES
from tests.support_artifacts import raises
from tests.support_tensorrt import FAMILIES, write_checkpoint
from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.memory import available_bytes
from trtllm_cli.artifacts.schema import ActivationScheme, LayerQuantization, WeightScheme
from trtllm_cli.build.tensorrt import prediction
from trtllm_cli.build.tensorrt.network import Sizing, profiles
from trtllm_cli.build.tensorrt.ops import NO_CHOICES, Choices
from trtllm_cli.build.tensorrt.prediction import Memory, predict, require
from trtllm_cli.build.tensorrt.stage import TensorRTOptions, build_tensorrt_engine
from trtllm_cli.errors import UsageError

GIB = 1 << 30
LLAMA = SHAPES["llama-3.1-8b"]
TWO = profiles(Sizing(context=2048, concurrency=8, generation=(8,)))
THREE = profiles(Sizing(context=2048, concurrency=8))


def recorded(kind, activation=None):
    scheme = WeightScheme(type=kind, granularity="group" if kind == "int4" else "channel", group_size=None)
    found = ActivationScheme(type=kind, granularity="token") if activation else None
    return {
        module: LayerQuantization(module=module, scheme=scheme, activation=found)
        for module in LLAMA.linears()
        if module != "lm_head"
    }


def gib(stored="bfloat16", dtype="bfloat16", quantized=None, ranges=TWO, choices=NO_CHOICES):
    return predict(LLAMA, stored, dtype, quantized or {}, ranges, choices).total / GIB


def test_what_makes_a_build_larger():
    plain = gib()
    linears = 2 * sum(out * inputs for name, (out, inputs, _) in LLAMA.linears().items() if name != "lm_head") / GIB
    assert plain > 1.5 * linears
    # a copy in another type, and one in twice the size
    assert gib(dtype="float16") == pytest.approx(plain + linears + 4 * 128256 * 4096 / GIB, rel=0.01)
    assert gib(stored="float32", dtype="float32") == pytest.approx(2 * plain, rel=0.05)
    # a profile of a single sequence keeps merged weights twice
    assert gib(ranges=THREE) > plain + linears
    int4, int8, products = gib(quantized=recorded("int4")), gib(quantized=recorded("int8")), recorded("int8", True)
    assert int8 < plain
    assert gib(quantized=products) <= int8
    # unpacked four-bit weights are no smaller than eight-bit ones while TensorRT works on them
    assert int4 < plain
    assert gib(quantized=recorded("fp8", True), ranges=THREE) < gib(quantized=products, ranges=THREE)
    assert gib(choices=Choices(weights_as_inputs=True)) < 2


def test_the_8b_shapes_fit_where_they_were_built():
    """int4 within 24 GB is promised; 16-bit ones are known not to fit there."""
    assert gib(quantized=recorded("int4")) * GIB < 24e9
    assert gib() * GIB > 24e9


def test_a_build_that_does_not_fit_is_refused_with_the_figures(monkeypatch):
    memory = Memory(weights=30 * GIB, graphs=GIB)
    monkeypatch.setattr(prediction, "available_bytes", lambda: 24 * GIB)
    with raises("BUILD_DOES_NOT_FIT", 5, "takes about 31.0 GiB of memory (30.0 GiB weights") as caught:
        require(memory, None)
    assert "24.0 GiB are available" in caught.value.message
    assert "--max-ram 31GiB" in caught.value.hint
    require(memory, 31 * GIB)
    with raises("BUILD_DOES_NOT_FIT", 5, "30.0 GiB are allowed (--max-ram)"):
        require(memory, 30 * GIB)
    monkeypatch.setattr(prediction, "available_bytes", lambda: None)
    require(memory, None)


def test_nothing_is_built_and_nothing_written_where_memory_lacks(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"])
    monkeypatch.setattr("trtllm_cli.build.tensorrt.stage.build_plan", lambda *_, **__: pytest.fail("it was built"))
    config = configure(TensorRTOptions, [("command line", {"max_ram": "100M"})], "build --backend tensorrt")
    with raises("BUILD_DOES_NOT_FIT", 5, "0.1 GiB are allowed"):
        build_tensorrt_engine(checkpoint, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_the_limit_is_no_part_of_what_an_engine_is(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "in", FAMILIES["llama"])
    configs = [configure(TensorRTOptions, [("command line", given)], "build") for given in ({}, {"max_ram": "20GiB"})]
    first, again = (build_tensorrt_engine(checkpoint, tmp_path / "out", config) for config in configs)
    assert first.id == again.id


def test_a_limit_that_is_no_size_is_refused():
    with pytest.raises(UsageError, match="max_ram: 'much' is not a size such as 4GiB"):
        configure(TensorRTOptions, [("command line", {"max_ram": "much"})], "build --backend tensorrt")


# ---- what is available -----------------------------------------------------------------------------------------------


def system(tmp_path, cgroup="0::/a/b\n"):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    (groups / "a" / "b").mkdir(parents=True)
    return proc, groups


def limit(group, most, anonymous):
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.stat").write_text(f"anon {anonymous}\nfile 999999999\n")


def test_available_memory_is_the_least_that_system_and_groups_leave(tmp_path):
    proc, groups = system(tmp_path)
    assert available_bytes(proc, groups) == 20_000_000 * 1024
    limit(groups / "a" / "b", "max", 5)
    assert available_bytes(proc, groups) == 20_000_000 * 1024
    limit(groups / "a", 8 * GIB, 3 * GIB)
    assert available_bytes(proc, groups) == 5 * GIB
    limit(groups / "a" / "b", GIB, 2 * GIB)
    assert available_bytes(proc, groups) == 0


def test_available_memory_is_unknown_or_the_systems_where_little_is_told(tmp_path):
    assert available_bytes(tmp_path / "nowhere", tmp_path) is None
    proc, groups = system(tmp_path, cgroup="4:memory:/old\n")
    assert available_bytes(proc, groups) == 20_000_000 * 1024
    (proc / "meminfo").write_text("MemTotal: 1 kB\n")
    assert available_bytes(proc, groups) is None
