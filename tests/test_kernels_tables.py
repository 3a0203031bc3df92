"""What kernels support and what they take, as data: the questions, and the reports they are answered from."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trtllm_cli.ops.cuda import resources
from trtllm_cli.ops.cuda.capabilities import Capability, find
from trtllm_cli.ops.cuda.resources import Allowed

ROWS = [
    Capability.model_validate(row)
    for row in (
        {
            "kernel": "attention",
            "family": "fmha",
            "min_compute_capability": 80,
            "dtypes": ["float16", "bfloat16"],
            "head_sizes": [64, 128],
            "features": ["causal", "paged"],
            "max_batch": 1024,
            "min_pages": 1,
            "multiple_of": {"k": 16},
            "sums": "float32",
        },
        {"kernel": "product", "family": "w8a8", "min_compute_capability": 80, "dtypes": ["int8"]},
        {"kernel": "product", "family": "w8a8", "min_compute_capability": 89, "dtypes": ["float8_e4m3"]},
        {
            "kernel": "old",
            "family": "w8a8",
            "min_compute_capability": 80,
            "max_compute_capability": 90,
            "dtypes": ["int8"],
        },
    )
]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"dtype": "float16"},
        {"dtypes": ["float16", "bfloat16"]},
        {"head_size": 64, "features": ["causal", "paged"], "batch": 1024, "pages": 1, "k": 4096, "sums": "float32"},
        {"feature": "paged"},
    ],
)
def test_what_the_table_has_is_supported(wanted):
    answer = find("attention", compute_capability=90, rows=ROWS, **wanted)
    assert answer and answer.row is ROWS[0] and answer.sentence == "attention serves it"


@pytest.mark.parametrize(
    "kernel, capability, wanted, sentence",
    [
        ("attention", 75, {}, "attention needs compute capability 8.0 or newer, not 7.5"),
        ("attention", 90, {"dtype": "float32"}, "attention takes dtypes float16, bfloat16, not float32"),
        ("attention", 90, {"head_size": 72}, "attention takes head_sizes 64, 128, not 72"),
        ("attention", 90, {"features": ["causal", "alibi"]}, "attention takes features causal, paged, not alibi"),
        ("attention", 90, {"batch": 1025}, "attention takes batch up to 1024, not 1025"),
        ("attention", 90, {"pages": 0}, "attention needs pages of at least 1, not 0"),
        ("attention", 90, {"k": 24}, "attention needs k to be a multiple of 16, which 24 is not"),
        ("attention", 90, {"sums": "float16"}, "attention takes sums float32, not float16"),
        ("attention", 90, {"colour": 1}, "the table of attention says nothing of colour"),
        ("nonsense", 90, {}, "the library has no kernel nonsense; it has attention, old, product"),
        ("old", 100, {}, "old is for compute capability 9.0 or older, not 10.0"),
        (
            "product",
            86,
            {"dtype": "float8_e4m3"},
            "product takes dtypes int8, not float8_e4m3; product needs compute capability 8.9 or newer, not 8.6",
        ),
    ],
)
def test_what_it_lacks_is_said(kernel, capability, wanted, sentence):
    answer = find(kernel, compute_capability=capability, rows=ROWS, **wanted)
    assert not answer and answer.row is None and answer.sentence == sentence


def test_one_of_several_rows_is_enough():
    assert find("product", compute_capability=89, rows=ROWS, dtype="float8_e4m3").row is ROWS[2]
    assert find("product", compute_capability=80, rows=ROWS, dtype="int8").row is ROWS[1]


@pytest.mark.parametrize(
    "change",
    [{"kernel": "Big"}, {"family": ""}, {"min_compute_capability": 8}, {"dtypes": []}, {"multiple_of": {"k": "x"}}],
)
def test_a_row_must_be_well_formed(change):
    good = {"kernel": "x", "family": "x", "min_compute_capability": 80, "dtypes": ["int8"]}
    Capability.model_validate(good)
    with pytest.raises(ValidationError):
        Capability.model_validate({**good, **change})


COMPILER = """\
== src/pointwise/gated.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6trtllm40_GLOBAL__N__ae4845b6_8_gated_cu_8902936112gated_kernelIfLi2EEEv19trtllm_gated_params' for 'sm_90a'
ptxas info    : Function properties for _ZN6trtllm40_GLOBAL__N__ae4845b6_8_gated_cu_8902936112gated_kernelIfLi2EEEv19trtllm_gated_params
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
ptxas info    : Compile time = 11.689 ms
== src/fmha/fmha.cu
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function '_Z4slowv'
ptxas info    : Compiling entry function '_Z4slowv' for 'sm_90a'
ptxas info    : Function properties for _Z4slowv
    32 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 64 bytes cumulative stack size, 1024 bytes smem
"""  # noqa: E501

CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4slowv:
  REG:168 STACK:64 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4fastv:
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_compilers_report_is_read():
    gated, slow = resources.from_compiler(COMPILER)
    assert (gated.registers, gated.stack, gated.spills, gated.shared) == (28, 0, 0, 0)
    assert (gated.architecture, gated.source) == ("90a", "src/pointwise/gated.cu")
    assert (slow.registers, slow.stack, slow.spills, slow.shared) == (168, 64, 28, 1024)
    assert "serialized" in slow.remarks[0]


def test_cuobjdumps_report_is_read():
    slow, fast = resources.from_cuobjdump(CUOBJDUMP)
    assert (slow.kernel, slow.architecture, slow.registers, slow.stack, slow.shared) == (
        "_Z4slowv",
        "90a",
        168,
        64,
        1024,
    )
    assert (fast.registers, fast.stack) == (20, 0)


def test_what_spills_must_be_on_the_list():
    found = resources.from_compiler(COMPILER)
    wrong = resources.problems(found, [])
    assert len(wrong) == 2 and "stack frame of 64 bytes and spills 28" in wrong[0] and "serialized" in wrong[1]
    listed = [Allowed(kernel="slow", stack=64, spills=28, reason="a test")]
    assert len(resources.problems(found, listed)) == 1, "a remark is never meant"
    assert len(resources.problems(found, [Allowed(kernel="slow", stack=64, spills=20, reason="less than it has")])) == 2


def test_names_are_readable():
    mangled = resources.from_compiler(COMPILER)[0].kernel
    name = resources.readable((mangled,))[mangled]
    assert name in ("gated_kernel<float, 2>", mangled), "mangled only where there is no c++filt"
    assert resources._short("void a::b<int, (c)1>::f<(x::y)3>(int, float)") == "a::b<int, (c)1>::f<(x::y)3>"


def test_the_list_gives_reasons():
    for entry in resources.allowed_frames():
        assert len(entry.reason.split()) > 2
