"""Published folders, artifacts made of them, and comparisons, shared by the tests of the stages and the command."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trtllm_cli.artifacts.config import configure
from trtllm_cli.artifacts.store import MEASUREMENTS, Artifact
from trtllm_cli.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
CORPUS = (
    "The quick brown fox jumps over the lazy dog. A clever fox reads the whole library, and the lazy dog sleeps. "
    "Ein Bär läuft über die Straße, und der Hund schläft.\n"
) * 4
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message['role']) }}
    {%- endif %}
    {%- if loop.first and message['role'] == 'assistant' %}{% continue %}{% endif %}
    {%- if message['content'] == '!stop' %}{% break %}{% endif %}
{{ '[' + message['role'] + ']' }}
{{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' }}
{% endfor %}
{%- if tools is not none %}tools: {{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
[assistant]
{% endif %}"""


def fast_tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level BPE tokenizer of the ``tokenizers`` library: 0 begins a text, 1 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([CORPUS], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast


def text_model(seed: int = 0, family: str = "Llama", **changes: Any) -> Any:
    """A random float32 model with a vocabulary for :func:`fast_tokenizer` and widths that every group size divides."""
    import torch
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**small, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
    return model.float()


def save_folder(model: Any, directory: Path, *, tokenizer: bool = False, shard: str = "5GB") -> Path:
    """What the publisher of ``model`` would upload."""
    model.save_pretrained(directory, max_shard_size=shard)
    if tokenizer:
        fast_tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            '{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}'
        )
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def source_of(folder: Path, output: Path) -> Artifact:
    """The folder as a source artifact, through the real download stage."""
    from trtllm_cli.download.stage import DownloadOptions, download

    return download(str(folder), output, configure(DownloadOptions, [], "download"))


def convert_to(source: Path, output: Path, *, force: bool = False, report: Any = None, **options: Any) -> Artifact:
    from trtllm_cli.convert.stage import ConvertOptions, convert

    config = configure(ConvertOptions, [("command line", options)], "convert")
    return convert(source, output, config, force=force, report=report)


def quantize_to(checkpoint: Path, output: Path, *, force: bool = False, report: Any = None, **options: Any) -> Artifact:
    from trtllm_cli.quantize.stage import QuantizeOptions, quantize

    config = configure(QuantizeOptions, [("command line", options)], "quantize")
    return quantize(checkpoint, output, config, force=force, report=report)


def build_to(checkpoint: Path, output: Path, *, force: bool = False, **options: Any) -> Artifact:
    from trtllm_cli.build.cpu.stage import CpuOptions, build_cpu

    return build_cpu(checkpoint, output, configure(CpuOptions, [("command line", options)], "build"), force=force)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file's bytes by relative path, but for the timings."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MEASUREMENTS
    }


def copy_of(artifact: Artifact, to: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact.path, to))


@contextlib.contextmanager
def raises(code: str, exit_code: int, *needles: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The body ends in that user error, its message names every needle, and it says what to try."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), str(caught.value)
    for needle in needles:
        assert needle in caught.value.message, caught.value.message
    assert caught.value.hint


class Said:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: float, total: float, unit: str) -> None:
        assert 0 <= done <= total * (1 + 1e-9), (label, done, total)


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with the packages this one has."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, **options.pop("env", {})},
        **options,
    )


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return python("from trtllm_cli.cli.main import main; main()", *arguments, **options)


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """A directory of an ordinary user's, with that user's permissions while the body runs (root is never refused)."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        if os.geteuid() != 0:
            yield directory
            return
        os.chown(directory, 65534, 65534)
        os.seteuid(65534)
        try:
            yield directory
        finally:
            os.seteuid(0)
