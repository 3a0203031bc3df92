"""Mixing precisions by measured sensitivity: the best mixture for a size, and costs that follow from measurements."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support_artifacts import Said, convert_to, raises, save_folder, source_of, text_model
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import EXIT_USAGE
from trtllm_cli.models.replay import Change, Replay, StoredWeights
from trtllm_cli.quantize.mixing import choose_precisions
from trtllm_cli.quantize.options import QuantizeOptions
from trtllm_cli.quantize.sensitivity import Size, choose, measure, parts


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for other threads
    yield
    torch.set_num_threads(before)


def best(costs: list[dict[str, float]], stored: list[dict[str, int]], budget: float) -> float:
    """The smallest sum of costs of all mixtures within a budget of bytes, by trying every one."""
    mixtures = itertools.product(*(list(choices) for choices in costs))
    fitting = [m for m in mixtures if sum(s[name] for s, name in zip(stored, m, strict=True)) <= budget]
    return min(sum(c[name] for c, name in zip(costs, m, strict=True)) for m in fitting)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict[str, float]], list[dict[str, int]], list[int], float]:
    costs: list[dict[str, float]] = []
    stored: list[dict[str, int]] = []
    elements: list[int] = []
    for _ in range(draw(st.integers(1, 6))):
        names = [f"c{i}" for i in range(draw(st.integers(1, 4)))]
        costs.append({name: draw(st.floats(0, 1)) for name in names})
        stored.append({name: draw(st.integers(1, 3000)) for name in names})
        elements.append(draw(st.integers(1, 2000)))
    low = sum(min(s.values()) for s in stored)
    high = sum(max(s.values()) for s in stored)
    budget = draw(st.integers(low, high))
    return costs, stored, elements, budget * 8 / sum(elements)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_mixture_is_the_best_of_all(
    problem: tuple[list[dict[str, float]], list[dict[str, int]], list[int], float],
) -> None:
    costs, stored, elements, target = problem
    names = [f"part{i}" for i in range(len(costs))]
    sizes = {name: Size(e, s) for name, e, s in zip(names, elements, stored, strict=True)}
    found = choose(dict(zip(names, costs, strict=True)), sizes, target)
    assert found.bits <= target * (1 + 1e-9)
    assert found.cost == pytest.approx(best(costs, stored, target * sum(elements) / 8 * (1 + 1e-12)), abs=1e-12)
    spent = sum(sizes[name].stored[found.candidates[name]] for name in names)
    assert found.bits == pytest.approx(8 * spent / sum(elements))
    assert found.cost == pytest.approx(sum(costs[i][found.candidates[name]] for i, name in enumerate(names)))


def test_sizes_without_a_common_unit_come_close_to_the_best() -> None:
    random = np.random.default_rng(0)
    costs = [{name: float(c) for name, c in zip("abc", random.random(3), strict=True)} for _ in range(8)]
    stored = [{name: int(s) for name, s in zip("abc", random.integers(10**8, 10**9, 3), strict=True)} for _ in range(8)]
    names = [f"p{i}" for i in range(8)]
    sizes = {name: Size(10**9, s) for name, s in zip(names, stored, strict=True)}
    for target in (4.0, 5.0, 6.0):
        found = choose(dict(zip(names, costs, strict=True)), sizes, target)
        assert found.bits <= target
        # one of 131,072 units is lost a part at most
        assert found.cost <= best(costs, stored, target * 8 * 10**9 / 8 * (1 - 8 / 131072)) + 1e-12


@pytest.mark.parametrize("target", [4.49, 8.51])
def test_a_target_outside_the_mixtures_names_their_range(target: float) -> None:
    sizes = {"a": Size(800, {"small": 450, "large": 850}), "b": Size(800, {"small": 450, "large": 850})}
    costs = {"a": {"small": 1.0, "large": 0.1}, "b": {"small": 2.0, "large": 0.1}}
    with raises("TARGET_BITS", EXIT_USAGE, f"{target:g}", "4.5 to 8.5"):
        choose(costs, sizes, target)
    assert choose(costs, sizes, 4.5).candidates == {"a": "small", "b": "small"}
    assert choose(costs, sizes, 6.5).candidates == {"a": "small", "b": "large"}
    assert choose(costs, sizes, 8.5).candidates == {"a": "large", "b": "large"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("mixing")
    folder = save_folder(text_model(num_hidden_layers=3, tie_word_embeddings=True), base / "published")
    return convert_to(source_of(folder, base / "source").path, base / "plain", dtype="float32")


def tokens(rows: int = 6, length: int = 48) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(1).integers(0, 320, (rows, length)).astype(np.int32)


def rounding(levels: int) -> Any:
    def quantize(module: str, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(1, keepdim=True) / levels
        return (weight / scale).round() * scale

    return quantize


def test_costs_are_those_of_the_change_alone(made: Any) -> None:
    weights = StoredWeights(TensorStore(made.path), torch.float32)
    replay = Replay(made.checkpoint.spec, weights, torch.from_numpy(tokens().astype(np.int64)))
    rounders = {"coarse": rounding(15), "middle": rounding(31), "fine": rounding(255)}
    candidates = {
        part: {name: dict.fromkeys(modules, rounder) for name, rounder in rounders.items()} | {"none": {}}
        for part, modules in parts(made.checkpoint.spec).items()
    }
    costs = measure(replay, lambda module: weights.dense(f"{module}.weight"), candidates, Said())
    assert list(costs) == list(candidates)
    for part, modules in parts(made.checkpoint.spec).items():
        assert costs[part]["none"] == 0
        direct = {
            name: replay.run(Change({f"{m}.weight": rounder(m, weights.dense(f"{m}.weight")) for m in modules})).mean
            for name, rounder in rounders.items()
        }
        assert costs[part]["coarse"] == pytest.approx(direct["coarse"], rel=1e-6)
        # the others are foreseen from the size of their disturbance
        assert costs[part]["middle"] == pytest.approx(direct["middle"], rel=0.4)
        assert costs[part]["fine"] == pytest.approx(direct["fine"], rel=0.4)


def options(**given: Any) -> QuantizeOptions:
    return QuantizeOptions.model_validate({"method": "int4-weight-only", "group_size": 64, "max_ram": "1GiB", **given})


def stored_bits(made: Any, chosen: dict[str, tuple[str, int]], given: QuantizeOptions) -> float:
    """Average bits of what select would store, counted from the shapes of its tensors."""
    from trtllm_cli.artifacts.tensors import DTYPES
    from trtllm_cli.quantize.selection import select

    store = TensorStore(made.path)
    size = elements = 0
    for module, choice in select(made.checkpoint.spec, given, chosen).items():
        shape = store.entry(f"{module}.weight").shape
        elements += shape[0] * shape[1]
        for suffix, (code, dims) in choice.tensors(*shape).items():
            if suffix.startswith("weight"):
                size += DTYPES[code][0] * int(np.prod(dims))
    return 8 * size / elements


@pytest.mark.parametrize("method", ["int4-weight-only", "int8-weight-only", "gptq"])
def test_a_target_is_met_and_used_up(method: str, made: Any) -> None:
    last = 0.0
    for target in (5.4, 6.2, 7.5):
        given, said = options(method=method, target_bits=target), Said()
        chosen = choose_precisions(made, given, tokens(), said)
        bits = stored_bits(made, chosen, given)
        assert target - 0.15 < bits <= target
        assert bits > last
        last = bits
        assert f"{bits:.2f} bits" in said.lines[-1]
        assert {name for name, _ in chosen.values()} <= {"int8-weight-only", "int4-weight-only", "gptq"}
        # what shares an input shares a precision
        for modules in parts(made.checkpoint.spec).values():
            assert len({chosen[module] for module in modules}) == 1


def test_equal_inputs_give_equal_choices(made: Any) -> None:
    given = options(target_bits=6.0, symmetric=False)
    assert choose_precisions(made, given, tokens(), Said()) == choose_precisions(made, given, tokens(), Said())


def test_overridden_modules_keep_what_they_have_and_count(made: Any) -> None:
    given = options(target_bits=6.0, overrides=("layers.0.*=int8-weight-only", "layers.1.attn.*=none"))
    chosen = choose_precisions(made, given, tokens(), Said())
    assert not [module for module in chosen if module.startswith(("layers.0.", "layers.1.attn"))]
    assert 5.85 < stored_bits(made, chosen, given) <= 6.0


@pytest.mark.parametrize("target", [1.0, 4.4, 8.6, 16.0])
def test_an_impossible_target_is_refused_before_the_measurement(
    target: float, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replay, "__init__", None)
    with raises("TARGET_BITS", EXIT_USAGE, f"{target:g}"):
        choose_precisions(made, options(target_bits=target), tokens(), Said())


@pytest.mark.parametrize("given", [{"method": "fp8"}, {"method": "smoothquant"}, {"method": "gptq", "bits": 8}])
def test_methods_without_int4_have_nothing_to_mix(given: dict[str, Any], made: Any) -> None:
    with raises("OPTION_UNUSED", EXIT_USAGE, "target-bits"):
        choose_precisions(made, options(target_bits=6.0, **given), tokens(), Said())


def test_the_memory_bound_changes_nothing_but_time(made: Any, tmp_path: Path) -> None:
    small = choose_precisions(made, options(target_bits=6.0, max_ram="1MiB"), tokens(), Said())
    assert small == choose_precisions(made, options(target_bits=6.0), tokens(), Said())
