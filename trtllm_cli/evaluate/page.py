"""A report as one self-contained HTML page: no script, no font, no picture from outside; light and dark."""

from __future__ import annotations

import re
from html import escape

from trtllm_cli.artifacts.results import (
    BenchResult,
    BlameEntry,
    BlameResult,
    DivergenceResult,
    PerplexityResult,
    TaskResult,
    TextProtocol,
)
from trtllm_cli.artifacts.schema import Ancestor, LayerQuantization, QuantizationRecord
from trtllm_cli.evaluate import plots
from trtllm_cli.evaluate.html import document, figure, table, tile
from trtllm_cli.evaluate.plots import number
from trtllm_cli.evaluate.report import DivergenceSeries, Report, Subject, WindowSeries
from trtllm_cli.evaluate.summary import perplexity_error, sentence

#: parts that stand as bars of their own
_BLAMED = 15
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")


def render(report: Report) -> str:
    """The page. Everything that came from outside is escaped."""
    sections = [
        _summary(report),
        _text_results(report),
        _blame_results(report),
        _task_results(report),
        _bench_results(report),
        _quantization(report.subject),
        _protocol(report),
        _hardware(report),
        _lineage("Lineage", report.subject.lineage),
        _lineage("Lineage of the reference", report.reference.lineage) if report.reference else "",
    ]
    return document(f"{report.subject.name}: report", sections)


def _summary(report: Report) -> str:
    subject = report.subject
    facts = [fact for fact in (subject.backend and f"{subject.backend} engine", subject.dtype) if fact]
    if subject.weight_bytes is not None:
        facts.append(f"{subject.weight_bytes / 1e6:,.1f} MB of weights")
    if subject.quantization is not None:
        facts.append(f"{subject.quantization.method}, {subject.quantization.bits_per_weight:.2f} bits a weight")
    against = f" · measured against <b>{escape(report.reference.name)}</b>" if report.reference else ""
    words = "".join(f"<p>{escape(sentence(result))}</p>" for result in report.results)
    tiles = "".join(tile(*parts) for parts in _tiles(report))
    return (
        f'<header><p class="kind">Report</p><h1>{escape(subject.name)}</h1>'
        f'<p class="facts">{escape(" · ".join(facts))}{against}</p></header>'
        f'<section class="summary">{words}</section><div class="tiles">{tiles}</div>'
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for result in report.results:
        if isinstance(result, PerplexityResult):
            found.append(("Perplexity", f"{result.perplexity:.3f}", f"± {perplexity_error(result):.3f}"))
        elif isinstance(result, DivergenceResult):
            found.append(("KL divergence", number(result.mean, 3), f"± {number(result.stderr, 2)} nats"))
            found.append(("Same top token", f"{result.top1_agreement:.1%}", f"{result.scored_tokens:,} positions"))
        elif isinstance(result, TaskResult):
            found.append((result.name, f"{result.accuracy:.1%}", f"± {result.accuracy_stderr:.1%}"))
        elif isinstance(result, BlameResult):
            worst = result.parts[0]
            found.append(("Costliest part", number(worst.divergence, 3), f"nats, {worst.name}"))
        else:
            found.append(("Decode", number(result.decode_tokens_per_s), "tokens/s"))
            found.append(("Prefill", number(result.prefill_tokens_per_s), "tokens/s"))
    return found


def _text_results(report: Report) -> str:
    parts: list[str] = []
    windows = [series for series in report.series if isinstance(series, WindowSeries)]
    for result in report.results:
        if isinstance(result, DivergenceResult):
            rows = [("mean", f"{number(result.mean)} ± {number(result.stderr)}")]
            rows += [(f"{share} % of positions below", number(value)) for share, value in result.percentiles.items()]
            rows += [("largest", number(result.maximum))]
            parts.append("<h2>Divergence from the reference</h2>")
            parts.append(table(("KL(reference ‖ model)", "nats"), rows))
            for series in report.series:
                if isinstance(series, DivergenceSeries):
                    marks = [("mean", result.mean)]
                    marks += [(f"{share} %", value) for share, value in result.percentiles.items()]
                    parts.append(figure(
                        "How the divergence spreads over positions, on a logarithmic scale; the first column also "
                        "holds everything smaller.",
                        plots.histogram(series.log10_edges, series.counts, marks, "KL divergence (nats)", "positions",
                                        "histogram of the divergence per position"),
                    ))  # fmt: skip
            compared = [
                (report.reference.name if report.reference else result.reference, f"{result.reference_perplexity:.4f}"),
                (report.subject.name, f"{result.subject_perplexity:.4f}"),
            ]
            parts.append(table(("perplexity on the same positions", ""), compared))
    if windows:
        parts.append("<h2>Loss along the text</h2>")
        styles = ("one", "two")
        # the measured model last, so that it lies on top
        drawn = [plots.Line(w.model, w.nll, styles[i % 2]) for i, w in enumerate(windows)][::-1]
        parts.append(
            figure(
                "Mean negative log likelihood of each window, in text order.",
                plots.lines(drawn, "window", "NLL (nats)", "mean negative log likelihood per window"),
            )
        )
        if len(windows) == 2 and len(windows[0].nll) == len(windows[1].nll):
            moved = [a - b for a, b in zip(windows[0].nll, windows[1].nll, strict=True)]
            parts.append(
                figure(
                    "The same, model minus reference: above zero the model is worse.",
                    plots.differences(moved, "window", "difference (nats)", "difference of NLL per window"),
                )
            )
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _blame_results(report: Report) -> str:
    parts: list[str] = []
    for result in report.results:
        if not isinstance(result, BlameResult):
            continue
        shown, rest = result.parts[:_BLAMED], result.parts[_BLAMED:]
        drawn = [plots.Bar(entry.name, entry.divergence, number(entry.divergence, 3)) for entry in shown]
        if rest:
            others = sum(entry.divergence for entry in rest)
            drawn.append(plots.Bar(f"the other {len(rest)}", others, f"{number(others, 3)} in sum", style="two"))
        parts.append("<h2>What each part costs</h2>")
        parts.append(figure(
            f"KL divergence in nats when this part alone is quantized and the rest is the source's; all of them "
            f"together cost {number(result.together, 3)}.",
            plots.bars(drawn, None, "divergence caused by each part alone"),
        ))  # fmt: skip
        if result.layers:
            count = max(entry.layer or 0 for entry in result.layers) + 1
            by_layer = {entry.layer: entry.divergence for entry in result.layers}
            parts.append(figure(
                "The same for each decoder layer as a whole.",
                plots.differences([by_layer.get(i, 0.0) for i in range(count)], "layer", "KL divergence (nats)",
                                  "divergence caused by each layer alone", noun="layer"),
            ))  # fmt: skip
        parts.append(_blame_map(result))
        rows = [(entry.name, number(entry.divergence), f"{entry.top1_agreement:.2%}") for entry in result.parts]
        head = ("part", "KL divergence (nats)", "same top token")
        parts.append(f"<details><summary>All {len(rows)} parts</summary>{table(head, rows)}</details>")
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _blame_map(result: BlameResult) -> str:
    """Parts inside the decoder layers as a map: kind by layer."""
    inside = sorted((entry for entry in result.parts if entry.layer is not None), key=lambda entry: entry.layer or 0)
    if not inside:
        return ""
    kinds = list(dict.fromkeys(_kind(entry) for entry in inside))
    cells = [
        (kinds.index(_kind(entry)), entry.layer or 0, entry.divergence, f"{entry.name}: {number(entry.divergence)}")
        for entry in inside
    ]
    return figure(
        "The divergence of every part by layer and kind; the stronger the colour, the larger.",
        plots.heat_map(kinds, max(cell[1] for cell in cells) + 1, cells, "layer", "divergence per layer and part"),
    )


def _kind(entry: BlameEntry) -> str:
    return entry.name.removeprefix(f"layers.{entry.layer}.").strip("()")


def _task_results(report: Report) -> str:
    results = [result for result in report.results if isinstance(result, TaskResult)]
    if not results:
        return ""
    rows = [
        (
            result.name,
            "multiple choice" if result.form == "choice" else "last word",
            f"{result.tasks:,}",
            f"{result.accuracy:.2%} ± {result.accuracy_stderr:.2%}",
            f"{result.accuracy_normalized:.2%} ± {result.accuracy_normalized_stderr or 0:.2%}"
            if result.accuracy_normalized is not None
            else "",
            f"{result.perplexity:.3f}" if result.perplexity is not None else "",
        )
        for result in results
    ]
    head = ("task", "form", "lines", "accuracy", "normalised by bytes", "perplexity of the last word")
    return f"<section><h2>Tasks</h2>{table(head, rows)}</section>"


def _bench_results(report: Report) -> str:
    results = [result for result in report.results if isinstance(result, BenchResult)]
    if not results:
        return ""
    parts = ["<h2>Speed</h2>"]
    shapes = [f"{result.prompt_tokens} + {result.new_tokens}, batch {result.batch}" for result in results]
    if len(results) > 1:
        drawn = [
            plots.Bar(shape, r.decode_tokens_per_s, f"{number(r.decode_tokens_per_s)} tokens/s", *r.decode_range)
            for shape, r in zip(shapes, results, strict=True)
        ]
        caption = "Decoding: medians over the repetitions; whiskers reach from the slowest to the fastest."
        parts.append(figure(caption, plots.bars(drawn, None, "decode speed of each shape")))
    shares = [
        (shape, result.weight_read_gb_per_s, result.measured_bandwidth_gb_per_s)
        for shape, result in zip(shapes, results, strict=True)
        if result.measured_bandwidth_gb_per_s
    ]
    if shares:
        # measured once a run, so any of them; the largest is the best estimate of a ceiling
        ceiling = max(limit for _, _, limit in shares)
        drawn = [
            plots.Bar(shape, read, f"{number(read)} GB/s ({read / limit:.0%})", style="one")
            for shape, read, limit in shares
        ]
        caption = (
            "Weights read while decoding: one token must read every weight once, so this tells how near decoding comes "
            "to what this memory can deliver. More than all of it means the weights fit the cache."
        )
        mark = (f"measured read bandwidth {number(ceiling)} GB/s", ceiling)
        parts.append(figure(caption, plots.bars(drawn, mark, "share of the memory bandwidth")))
    for shape, result in zip(shapes, results, strict=True):
        rows = [
            ("decode", f"{number(result.decode_tokens_per_s)} tokens/s", _range(result.decode_range)),
            ("prefill", f"{number(result.prefill_tokens_per_s)} tokens/s", _range(result.prefill_range)),
            ("first token", f"{result.first_token_s * 1e3:,.1f} ms", ""),
            ("weights read while decoding", f"{number(result.weight_read_gb_per_s)} GB/s", ""),
            ("load", f"{result.load_s:.2f} s", ""),
            ("peak memory", f"{result.peak_rss_mib:,.0f} MiB", ""),
            ("GPU", result.gpu, "") if result.gpu else ("threads", str(result.threads), ""),
        ]
        parts.append(table((shape, "median", f"range of {result.repetitions}"), rows))
    return f"<section>{''.join(parts)}</section>"


def _quantization(subject: Subject) -> str:
    record = subject.quantization
    if record is None or not record.layers:
        return ""
    cells: list[tuple[int, int, float, str]] = []
    rows: list[str] = []
    columns = 0
    for layer in record.layers:
        match = _LAYER.match(layer.module)
        if match is None or layer.relative_error is None:
            continue
        column, kind = int(match[1]), match[2]
        if kind not in rows:
            rows.append(kind)
        columns = max(columns, column + 1)
        cells.append(
            (rows.index(kind), column, layer.relative_error, f"{layer.module}: {number(layer.relative_error)}")
        )
    drawn = ""
    if cells:
        drawn = figure(
            "Error of each quantized weight relative to its own size; the stronger the colour, the larger.",
            plots.heat_map(rows, columns, cells, "layer", "relative quantization error per layer and module"),
        )
    worst = sorted(record.layers, key=lambda layer: -(layer.relative_error or 0.0))[:10]
    largest = table(
        ("module", "stored as", "relative error", "largest difference", "note"), [_layer_row(x) for x in worst]
    )
    rest = f"<details><summary>All {len(record.layers)} modules</summary>" + table(
        ("module", "stored as", "relative error", "largest difference", "note"), [_layer_row(x) for x in record.layers]
    )
    return (
        f"<section><h2>Quantization</h2><p>{escape(_method(record))}</p>{drawn}"
        f"<h3>Largest errors</h3>{largest}{rest}</details></section>"
    )


def _method(record: QuantizationRecord) -> str:
    parameters = ", ".join(f"{key} {value}" for key, value in record.parameters.items())
    text = f"{record.method}{f' ({parameters})' if parameters else ''}, {record.bits_per_weight:.2f} bits a weight"
    if record.calibration is not None:
        text += f", calibrated on {record.calibration.rows:,} rows ({record.calibration.tokens:,} tokens)"
    return text + "."


def _layer_row(layer: LayerQuantization) -> tuple[str, ...]:
    scheme = layer.scheme
    group = f", groups of {scheme.group_size}" if scheme.granularity == "group" else ", per channel"
    kind = f"{scheme.type}{group}{'' if scheme.symmetric else ', asymmetric'}"
    errors = ("unknown" if error is None else number(error) for error in (layer.relative_error, layer.max_error))
    return layer.module, kind, *errors, layer.note or ""


def _protocol(report: Report) -> str:
    blocks: list[str] = []
    seen: list[TextProtocol] = []
    for result in report.results:
        if isinstance(result, (PerplexityResult, DivergenceResult)) and result.protocol not in seen:
            p = result.protocol
            seen.append(p)
            overlap = "not overlapping" if p.stride == p.context - p.bos else f"{p.stride} tokens apart"
            rows = [
                ("windows", f"{p.windows:,} of {p.context} positions, {overlap}"),
                ("first token of a window", "BOS" if p.bos else "context only, not scored (no BOS)"),
                ("scored", f"{result.scored_tokens:,} tokens, each once"),
                ("text", f"{p.tokens:,} tokens, sha256 {p.text_sha256}"),
            ]
            blocks.append(table(("text", ""), rows))
        elif isinstance(result, TaskResult):
            bos = "after BOS" if result.bos else "without BOS"
            rows = [("file", f"sha256 {result.file_sha256}"), ("lines", f"the first {result.tasks:,}, {bos}")]
            blocks.append(table((result.name, ""), rows))
        elif isinstance(result, BenchResult):
            rows = [
                ("shape", f"{result.prompt_tokens} random tokens, {result.new_tokens} new, batch {result.batch}"),
                ("repetitions", f"{result.repetitions} after one to warm up, median shown"),
            ]
            blocks.append(table(("speed", ""), rows))
    return f"<section><h2>How it was measured</h2>{''.join(blocks)}</section>"


def _hardware(report: Report) -> str:
    h = report.hardware
    rows = [
        ("processor", f"{h.cpu}, {h.cores} cores"),
        ("instruction sets", " ".join(h.isa) or "unknown"),
        ("memory", f"{h.memory_mib:,} MiB" if h.memory_mib else "unknown"),
        ("system", h.system),
        ("python", h.python),
        *h.libraries.items(),
    ]
    return f"<section><h2>Machine</h2>{table(('', ''), rows)}</section>"


def _lineage(title: str, ancestor: Ancestor) -> str:
    def entry(node: Ancestor) -> str:
        options = ", ".join(f"{key} = {value}" for key, value in node.config.items() if value is not None)
        parents = "".join(entry(parent) for parent in node.parents)
        stage, short = f"<code>{escape(node.stage)}</code>", f'<code class="id">{escape(node.id[:16])}</code>'
        return (
            f"<li><b>{escape(node.kind)}</b> by {stage} {short}"
            + (f'<div class="options">{escape(options)}</div>' if options else "")
            + (f"<ul>{parents}</ul>" if parents else "")
            + "</li>"
        )

    return f'<section><h2>{escape(title)}</h2><ul class="lineage">{entry(ancestor)}</ul></section>'


def _range(values: tuple[float, float]) -> str:
    return f"{number(values[0])} to {number(values[1])}"
