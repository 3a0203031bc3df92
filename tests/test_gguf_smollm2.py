"""The real SmolLM2-135M-Instruct GGUF, from the Python package that carries it."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest

from trtllm_cli.convert.gguf_model import GgufModel
from trtllm_cli.convert.gguf_tokenizer import write_gguf_tokenizer
from trtllm_cli.download.known import KnownPackage, load_known
from trtllm_cli.download.package import resolve_package
from trtllm_cli.errors import BadInputError
from trtllm_cli.progress import Silent
from trtllm_cli.runtime.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, kept in pytest's cache between runs; skips where pip cannot get it."""
    source = load_known()["smollm2-135m-instruct"].sources[1]
    assert isinstance(source, KnownPackage)
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("smollm2") / f"{source.sha256}.gguf"
    if not kept.is_file():
        directory = tmp_path_factory.mktemp("smollm2")
        try:
            resolve_package(source, None, False).fetch(directory / "files", directory / "scratch", Silent())
        except BadInputError as error:
            pytest.skip(f"needs {source.name}=={source.version} from a package index: {error.message}")
        # another worker may do the same: the last rename wins, with the same bytes
        arrived = kept.with_name(f"{os.getpid()}.tmp")
        (directory / "files" / Path(source.member).name).replace(arrived)
        arrived.replace(kept)
    return kept


def test_its_config_is_the_published_one(smollm2: Path) -> None:
    model = GgufModel(smollm2)
    published = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False,
    }  # fmt: skip
    assert {key: model.config[key] for key in published} == published
    reader = gguf.GGUFReader(smollm2)
    assert len(model.names()) == len(reader.tensors) == 272
    assert model.metadata["tokenizer.ggml.merges"] == reader.fields["tokenizer.ggml.merges"].contents()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared test data")
def test_it_tokenizes_wikitext_as_the_published_tokenizer_does(smollm2: Path, tmp_path: Path) -> None:
    """304,978 tokens; a loader that ignores its rule for digits finds 304,986."""
    info = write_gguf_tokenizer(GgufModel(smollm2), tmp_path)
    assert info is not None
    assert (info.bos_id, info.eos_ids[0], info.vocab_size) == (1, 2, 49152)
    text = (SHARED / "wikitext2_test.txt").read_text("utf-8")
    tokenizer = Tokenizer(tmp_path, info)
    ids = tokenizer.encode(text)
    assert len(ids) == 304_978
    assert tokenizer.decode(ids, skip_special=False) == text
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat, special=False)[0] == 1
