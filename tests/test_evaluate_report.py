"""The stages eval and bench, their reports and pages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support_evaluate import CORPUS, Bigram, make_loaded, make_spec, make_tokenizer
from trtllm_cli.artifacts.config import Configured, configure
from trtllm_cli.artifacts.results import BenchResult, PerplexityResult, TaskResult
from trtllm_cli.artifacts.store import Artifact, open_artifact
from trtllm_cli.errors import BadInputError, DoesNotFitError, UnsupportedError, UsageError
from trtllm_cli.evaluate import plots
from trtllm_cli.evaluate import stage as stages
from trtllm_cli.evaluate.bench import bench, read_bandwidth
from trtllm_cli.evaluate.hardware import hardware
from trtllm_cli.evaluate.page import render
from trtllm_cli.evaluate.report import PAGE, REPORT, DivergenceSeries, WindowSeries, divergence_series, read_report
from trtllm_cli.evaluate.stage import BenchOptions, EvalOptions, benchmark, decode_weight_bytes, evaluate
from trtllm_cli.runtime.load import Loaded

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _options(**given: Any) -> Configured[EvalOptions]:
    return configure(EvalOptions, [("command line", given)], "eval")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    lines = [{"query": "The dog", "choices": ["sleeps", "reads"], "gold": 0}] * 3
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loaded]:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def make(name: str, noise: float = 0.0, **options: Any) -> Loaded:
        return make_loaded(tmp_path / name, Bigram(tokenizer.vocab_size, noise=noise), tokenizer, **options)

    return make


def _report(load: Callable[..., Loaded], text: Path, quiz: Path, output: Path, name: str = "small") -> Artifact:
    model, reference = load(name, noise=0.05), load("reference", method=None)
    found = evaluate(model, _options(text=text, tasks=(quiz,), context=32, windows=5), output=output, against=reference)
    assert isinstance(found, Artifact)
    return found


def test_without_an_output_there_are_only_results(load: Callable[..., Loaded], text: Path, quiz: Path) -> None:
    seen: set[str] = set()
    found = evaluate(
        load("small"),
        _options(text=text, tasks=(quiz,), context=32, limit=2),
        progress=lambda what, done, total, figure: seen.add(what),
    )
    assert isinstance(found, tuple)
    assert isinstance(found[0], PerplexityResult)
    assert isinstance(found[1], TaskResult)
    assert (found[1].name, found[1].tasks) == ("quiz", 2)
    assert found[0].protocol.windows == found[0].protocol.tokens // 32
    assert seen == {"perplexity", "quiz"}


def test_a_report_holds_results_protocol_hardware_and_lineage(
    load: Callable[..., Loaded], text: Path, quiz: Path, tmp_path: Path
) -> None:
    artifact = _report(load, text, quiz, tmp_path / "report")
    again = open_artifact(tmp_path / "report", "report", full=True)
    assert [result.type for result in again.report.results] == ["perplexity", "divergence", "task"]
    assert [parent.kind for parent in again.manifest.parents] == ["engine", "engine"]
    assert again.report.hardware["cores"] == hardware().cores
    # paths are recorded nowhere, digests are
    assert str(tmp_path) not in (tmp_path / "report" / "manifest.json").read_text()
    assert str(tmp_path) not in (tmp_path / "report" / REPORT).read_text()
    perplexity = again.report.results[0]
    assert isinstance(perplexity, PerplexityResult)
    assert again.manifest.identity["text_sha256"] == perplexity.protocol.text_sha256
    report = read_report(artifact.file(REPORT))
    assert report.results == again.report.results
    assert report.reference is not None
    windows = [series for series in report.series if isinstance(series, WindowSeries)]
    assert [series.model for series in windows] == ["small", "reference"]
    assert [len(series.nll) for series in windows] == [5, 5]
    # every window has as many scored tokens as the others, so their mean is the whole's
    assert np.mean(windows[0].nll) == pytest.approx(perplexity.nll)
    histogram = next(series for series in report.series if isinstance(series, DivergenceSeries))
    assert sum(histogram.counts) == perplexity.scored_tokens == 5 * 31


def test_the_id_follows_content_not_paths(load: Callable[..., Loaded], text: Path, tmp_path: Path) -> None:
    model = load("small")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    output = tmp_path / "report"
    first = evaluate(model, _options(text=text, context=32), output=output)
    assert isinstance(first, Artifact)
    calls = model.executor.calls  # type: ignore[attr-defined]
    second = evaluate(model, _options(text=copy, context=32), output=output)
    assert isinstance(second, Artifact)
    assert second.id == first.id
    assert model.executor.calls == calls, "an up-to-date report is not measured again"  # type: ignore[attr-defined]
    copy.write_bytes(text.read_bytes() + b"more")
    with pytest.raises(UsageError, match="OUTPUT_EXISTS"):
        evaluate(model, _options(text=copy, context=32), output=output)
    replaced = evaluate(model, _options(text=copy, context=32), output=output, force=True)
    assert isinstance(replaced, Artifact)
    assert replaced.id != first.id


def test_a_failed_measurement_leaves_no_report(load: Callable[..., Loaded], text: Path, tmp_path: Path) -> None:
    model = load("small")
    model.executor.table[:] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(BadInputError, match="NaN"):
        evaluate(model, _options(text=text, context=32), output=tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "NOTHING_TO_DO"),
        ({"tasks": "quiz", "context": 32}, "OPTION_UNUSED"),
        ({"tasks": "quiz", "windows": 3}, "OPTION_UNUSED"),
        ({"tasks": "quiz", "against": True}, "OPTION_UNUSED"),
        ({"text": "text", "limit": 3}, "OPTION_UNUSED"),
    ],
)
def test_unused_options_are_errors(
    load: Callable[..., Loaded], text: Path, quiz: Path, given: dict[str, Any], code: str
) -> None:
    values = dict(given)
    against = load("reference") if values.pop("against", False) else None
    if "tasks" in values:
        values["tasks"] = (quiz,)
    if "text" in values:
        values["text"] = text
    with pytest.raises(UsageError) as caught:
        evaluate(load("small"), _options(**values), against=against)
    assert caught.value.code == code


def test_unreadable_texts(load: Callable[..., Loaded], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot read"):
        evaluate(load("small"), _options(text=tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(BadInputError, match="byte 3"):
        evaluate(load("small"), _options(text=tmp_path / "latin"))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(BadInputError, match="no tokens"):
        evaluate(load("small"), _options(text=tmp_path / "empty"))
    with pytest.raises(UsageError, match="contxt"):
        _options(contxt=3)


def test_another_tokenizer_is_refused(load: Callable[..., Loaded], text: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=290)
    reference = make_loaded(tmp_path / "reference", Bigram(300), other)
    with pytest.raises(UnsupportedError, match="different tokens") as caught:
        evaluate(load("small"), _options(text=text, context=32), against=reference)
    assert caught.value.code == "TOKENIZER_DIFFERS"


def test_the_page_stands_alone_and_says_it_in_words(
    load: Callable[..., Loaded], text: Path, quiz: Path, tmp_path: Path
) -> None:
    artifact = _report(load, text, quiz, tmp_path / "report")
    written = artifact.file(PAGE).read_text(encoding="utf-8")
    report = read_report(artifact.file(REPORT))
    assert render(report) == written, "the page can be drawn again from report.json"
    page = Page(written)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "action", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\(", written)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4  # divergence, windows, their difference, layers
    for words in ("Perplexity", "KL divergence", "of the reference", "rtn", "engine"):
        assert words in page.text
    perplexity = report.results[0]
    assert isinstance(perplexity, PerplexityResult)
    assert f"{perplexity.perplexity:.3f}" in page.text
    assert perplexity.protocol.text_sha256 in page.text
    assert "prefers-color-scheme: dark" in written
    assert 'name="viewport"' in written


@given(st.text(alphabet="<>&\"'`/=abé\u2028", max_size=30))
def test_names_are_escaped(name: str) -> None:
    line = plots.Line(name, (1.0, 2.0), "one")
    found = Page(
        plots.lines([line, line], name, name, name) + plots.bars([plots.Bar(name, 1.0, name)], (name, 2.0), name)
    )
    assert {tag for tag, _ in found.tags} <= {
        "svg",
        "path",
        "circle",
        "rect",
        "line",
        "text",
        "title",
        "p",
        "span",
        "i",
    }
    labels = [attributes["aria-label"] for tag, attributes in found.tags if tag == "svg"]
    assert labels == [name, name]


def test_a_hostile_name_stays_text(load: Callable[..., Loaded], text: Path, quiz: Path, tmp_path: Path) -> None:
    model = load("small")
    hostile = "</title><script>alert(1)</script><img src=x onerror=alert(1)>"
    model = Loaded(hostile, model.artifact, model.executor, model.tokenizer, 0.1)
    artifact = evaluate(model, _options(text=text, context=32), output=tmp_path / "report")
    assert isinstance(artifact, Artifact)
    page = Page(artifact.file(PAGE).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert hostile in page.text


def test_damaged_reports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"version": 9}')
    with pytest.raises(BadInputError, match="is not a report"):
        read_report(tmp_path / "report.json")
    with pytest.raises(BadInputError, match="cannot read"):
        read_report(tmp_path / "none.json")


def test_the_histogram_loses_nothing() -> None:
    values = np.array([0.0, 1e-30, 1e-8, 0.5e-3, 1.0, 99.9, 100.0, 1e5])
    series = divergence_series(values)
    assert sum(series.counts) == len(values)
    assert series.counts[0] == 3
    assert series.counts[-1] == 3


# ---- speed


class Counting(Bigram):
    """Keeps what it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[list[tuple[int, int, int, str]]] = []
        self.prompts: set[int] = set()

    def forward(self, segments: Any) -> Any:
        self.asked.append([(s.slot, s.start, len(s.tokens), s.want) for s in segments])
        if segments[0].start == 0:
            self.prompts.update(int(token) for segment in segments for token in segment.tokens)
        return super().forward(segments)


def test_bench_runs_what_it_says() -> None:
    model = Counting(slots=2)
    seen: list[tuple[int, int]] = []
    result = bench(
        model, 0.5, 1000, prompt_tokens=6, new_tokens=4, batch=2, repetitions=3,
        progress=lambda done, total, speed: seen.append((done, total)),
    )  # fmt: skip
    once = [[(0, 0, 6, "last"), (1, 0, 6, "last")]] + [[(0, 6 + i, 1, "last"), (1, 6 + i, 1, "last")] for i in range(3)]
    assert model.asked == once * 4
    assert len(model.prompts) > 20
    assert 0 not in model.prompts
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.prefill_range[0] <= result.prefill_tokens_per_s <= result.prefill_range[1]
    assert result.decode_range[0] <= result.decode_tokens_per_s <= result.decode_range[1]
    assert result.prefill_tokens_per_s == pytest.approx(12 / result.first_token_s)
    # a step decodes one token of each of the two sequences and reads the weights once
    assert result.weight_read_gb_per_s == pytest.approx(1000 * result.decode_tokens_per_s / 2 / 1e9)
    assert (result.load_s, result.threads, result.measured_bandwidth_gb_per_s) == (0.5, 1, None)
    assert result.peak_rss_mib > 10


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"prompt_tokens": 0}, UsageError, "prompt-tokens 0"),
        ({"new_tokens": 1}, UsageError, "new-tokens 1"),
        ({"repetitions": 0}, UsageError, "repetitions 0"),
        ({"batch": 2}, DoesNotFitError, "batch 2 needs 2 slots"),
        ({"prompt_tokens": 60, "new_tokens": 6}, DoesNotFitError, "65 positions"),
    ],
)
def test_bench_refusals(options: dict[str, int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        bench(Bigram(), 0.1, 10, **{"prompt_tokens": 4, "new_tokens": 3, "repetitions": 1, **options})  # type: ignore[arg-type]
    model = Bigram()
    model.table[:] = math.nan
    with pytest.raises(BadInputError, match="NaN"):
        bench(model, 0.1, 10, prompt_tokens=4, new_tokens=2, repetitions=1)


def test_the_bandwidth_is_plausible() -> None:
    assert 0.2 < read_bandwidth(threads=1, mib=32, repetitions=2) < 5000


def test_a_bench_report(load: Callable[..., Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "read_bandwidth", lambda: 40.0)
    config = configure(
        BenchOptions, [("command line", {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2})], "bench"
    )
    artifact = benchmark(load("small"), config, output=tmp_path / "report")
    assert isinstance(artifact, Artifact)
    result = artifact.report.results[0]
    assert isinstance(result, BenchResult)
    assert (result.load_s, result.measured_bandwidth_gb_per_s) == (0.25, 40.0)
    page = Page(artifact.file(PAGE).read_text(encoding="utf-8"))
    assert "measured read bandwidth 40 GB/s" in page.text
    assert "range of 2" in page.text
    plain = benchmark(load("small"), configure(BenchOptions, [("file", {"bandwidth": False, "repetitions": 1,
                      "prompt_tokens": 4, "new_tokens": 2})], "bench"))  # fmt: skip
    assert isinstance(plain, tuple)
    assert plain[0].measured_bandwidth_gb_per_s is None  # type: ignore[union-attr]


def test_an_untied_embedding_is_not_read_while_decoding(load: Callable[..., Loaded], tmp_path: Path) -> None:
    tied = load("tied")
    assert decode_weight_bytes(tied) == 1_000_000
    engine = tied.artifact.engine.model_copy(update={"spec": make_spec(300, tie=False)})
    manifest = tied.artifact.manifest.model_copy(update={"body": engine})
    untied = Loaded("untied", Artifact(tied.artifact.path, manifest), tied.executor, tied.tokenizer, 0.1)
    assert decode_weight_bytes(untied) == 1_000_000 - 300 * 32 * 2
