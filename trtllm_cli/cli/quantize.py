"""``trtllm-cli quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtllm_cli.cli.options import (
    ConfigFile,
    Debug,
    Force,
    Json,
    OutputPath,
    artifact_id,
    print_artifact,
    stage_options,
)
from trtllm_cli.cli.output import Output

_INT4 = "int4 in groups"
_CALIBRATION = "Calibration"
_GATE = "Quality gate"
_METHOD = "Method"


def _option(flag: str, help: str, panel: str) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(flag, help=help, show_default=False, rich_help_panel=panel)
    return found


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Unquantized checkpoint, from convert.", show_default=False)],
    output: OutputPath,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="int8-weight-only, int4-weight-only, fp8, smoothquant, gptq, awq or awq-gptq.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[int | None, _option("--bits", "Of gptq's weights: 4 (default) or 8.", _INT4)] = None,
    group_size: Annotated[
        int | None, _option("--group-size", "Inputs that share a scale: 32, 64, 128 or -1 (a row). Default: 64.", _INT4)
    ] = None,
    symmetric: Annotated[
        bool | None,
        _option("--symmetric/--asymmetric", "Without or with zero points. Default: symmetric.", _INT4),
    ] = None,
    scale_search: Annotated[
        bool | None,
        _option("--scale-search/--no-scale-search", "Scales by least error, or by largest value.", _METHOD),
    ] = None,
    act_order: Annotated[
        str | None, _option("--act-order", "gptq: none, static (default) or dynamic groups.", _METHOD)
    ] = None,
    damping: Annotated[
        float | None, _option("--damping", "gptq: share of the mean diagonal. Default: automatic.", _METHOD)
    ] = None,
    alpha: Annotated[
        float | None, _option("--alpha", "smoothquant's strength, 0 to 1. Default: searched.", _METHOD)
    ] = None,
    format: Annotated[str | None, _option("--format", "smoothquant's numbers: int8 (default) or fp8.", _METHOD)] = None,
    weights: Annotated[
        str | None, _option("--weights", "smoothquant, fp8: a scale per channel (default) or tensor.", _METHOD)
    ] = None,
    activations: Annotated[
        str | None,
        _option(
            "--activations", "smoothquant, fp8: a scale per token (default), tensor (static), or none (fp8).", _METHOD
        ),
    ] = None,
    kv_cache: Annotated[
        str | None, _option("--kv-cache", "Also calibrate scales for an int8 or fp8 cache.", _METHOD)
    ] = None,
    kv_scales: Annotated[str | None, _option("--kv-scales", "A scale per head (default) or tensor.", _METHOD)] = None,
    target_bits: Annotated[
        float | None, _option("--target-bits", "Mix int4 and int8 by measured sensitivity.", _METHOD)
    ] = None,
    embedding: Annotated[
        bool | None, _option("--embedding/--no-embedding", "Also store the embedding as int8. Default: no.", _METHOD)
    ] = None,
    head: Annotated[
        bool | None, _option("--head/--no-head", "Store the output head as int8. Default: yes.", _METHOD)
    ] = None,
    override: Annotated[
        list[str] | None,
        _option("--override", "PATTERN=METHOD[:GROUP], such as 'layers.0.*=none'. Repeatable.", _METHOD),
    ] = None,
    provider: Annotated[
        str | None, _option("--provider", "modelopt: nvidia-modelopt's own recipe instead of ours.", _METHOD)
    ] = None,
    calib: Annotated[
        str | None,
        _option("--calib", "Text, .jsonl, .parquet or hf:org/set. Default: a text of ours.", _CALIBRATION),
    ] = None,
    calib_rows: Annotated[int | None, _option("--calib-rows", "Default: 128.", _CALIBRATION)] = None,
    calib_length: Annotated[
        int | None, _option("--calib-length", "Tokens of a row. Default: 512.", _CALIBRATION)
    ] = None,
    calib_seed: Annotated[
        int | None, _option("--calib-seed", "Rows at random. Default: the first ones.", _CALIBRATION)
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never ask the hub.", rich_help_panel=_CALIBRATION)
    ] = False,
    device: Annotated[
        str | None, _option("--device", "Where calibration runs: cpu (default) or cuda.", _CALIBRATION)
    ] = None,
    compute: Annotated[
        str | None, _option("--compute", "Of calibration: bfloat16, float32 or auto (default).", _CALIBRATION)
    ] = None,
    max_ram: Annotated[
        str | None, _option("--max-ram", "Activations beyond this go to disk. Default: 4GiB.", _CALIBRATION)
    ] = None,
    eval_text: Annotated[
        Path | None, _option("--eval-text", "Measure the result on this text before it is published.", _GATE)
    ] = None,
    eval_context: Annotated[int | None, _option("--eval-context", "Tokens of a window. Default: 512.", _GATE)] = None,
    eval_windows: Annotated[int | None, _option("--eval-windows", "Default: 32.", _GATE)] = None,
    max_kld: Annotated[
        float | None, _option("--max-kld", "Exit 6, write nothing, above this mean KL divergence.", _GATE)
    ] = None,
    max_ppl_increase: Annotated[
        str | None, _option("--max-ppl-increase", "The same for perplexity, such as 1%.", _GATE)
    ] = None,
    max_shard_mib: Annotated[
        int | None, typer.Option("--max-shard-mib", help="Size of one weight file. Default: 2048.", show_default=False)
    ] = None,
    config: ConfigFile = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a checkpoint smaller and record, layer by layer, what that cost."""
    from trtllm_cli.cli.evaluate import describe
    from trtllm_cli.pipeline.quality import gate_for
    from trtllm_cli.quantize.stage import QuantizeOptions, quantize

    with Output(as_json) as out:
        options = stage_options(
            QuantizeOptions,
            "quantize",
            config,
            method=method,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_search=scale_search,
            act_order=act_order,
            damping=damping,
            alpha=alpha,
            format=format,
            weights=weights,
            activations=activations,
            kv_cache=kv_cache,
            kv_scales=kv_scales,
            target_bits=target_bits,
            embedding=embedding,
            head=head,
            overrides=tuple(override or ()),
            provider=provider,
            calib=calib,
            calib_rows=calib_rows,
            calib_length=calib_length,
            calib_seed=calib_seed,
            device=device,
            compute=compute,
            max_ram=max_ram,
            eval_text=eval_text,
            eval_context=eval_context,
            eval_windows=eval_windows,
            max_kld=max_kld,
            max_ppl_increase=max_ppl_increase,
            max_shard_mib=max_shard_mib,
        )
        before = artifact_id(output)
        artifact = quantize(checkpoint, output, options, force=force, report=out, quality=gate_for, offline=offline)
        record = artifact.checkpoint.quantization
        assert record is not None
        quality = [result.model_dump(mode="json") for result in artifact.checkpoint.quality]
        for result in artifact.checkpoint.quality:
            for line in describe(result):
                out.line(line)
        print_artifact(
            out,
            artifact,
            not force and before == artifact.id,
            method=record.method,
            bits_per_weight=record.bits_per_weight,
            **({"quality": quality} if quality else {}),
        )
