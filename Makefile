# `make demo` and `make test` do all the set-up on a fresh machine. PYTHON chooses the interpreter (3.10 to 3.13),
# VENV where the environment goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXTRAS := dev,gguf,tensorrt

.PHONY: demo test lint types kernels schemas clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# Fetch a real model, convert, quantize, build, chat, and measure what quantization cost. CPU only.
demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Compile the native CPU library into the cache now instead of at first use, and say what was built.
kernels: $(READY)
	$(BIN)/python -c "from trtllm_cli.ops.native import library; print(library.load())"

# Write the published JSON Schemas anew (a test keeps them in step with the code).
schemas: $(READY)
	$(BIN)/trtllm-cli schema schemas

clean:
	rm -rf $(VENV) work .pytest_cache .mypy_cache .ruff_cache .hypothesis
