# `make demo` and `make test` do all the set-up on a fresh machine. PYTHON chooses the interpreter (3.10 to 3.13),
# VENV where the environment goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXTRAS := dev,gguf,tensorrt

# CUDA architectures of `make kernels`, such as 90a or "80 90a"; empty: all that the toolkit knows
ARCH ?=

.PHONY: demo test test-gpu sanitize lint types kernels schemas clean

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

# The tests that need an NVIDIA GPU, in one process.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Out-of-bounds accesses and races of our kernels in a selection of the GPU tests (minutes: every access is checked).
# Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
SANITIZED := only_the_output or several_new_tokens or every_tactic or embedding or in_place or plain_norm or few_queries
sanitize: $(READY)
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	        --kernel-name kernel_substring=trtllm $(BIN)/python -m pytest -q -m gpu -k "$(SANITIZED)" || exit 1; \
	done

# Compile the native CPU library, and where there is a CUDA compiler the CUDA kernels, into the cache instead of at first use.
kernels: $(READY)
	$(BIN)/python -c "from trtllm_cli.ops.native import library; print(library.load())"
	@if $(BIN)/python -c "import sys; from trtllm_cli.ops.cuda import toolkit; sys.exit(toolkit.problem() is not None)"; \
	then $(BIN)/trtllm-cli kernels build $(foreach one,$(ARCH),--arch $(one)); \
	else $(BIN)/python -c "from trtllm_cli.ops.cuda import toolkit; print('CUDA kernels: not built,', toolkit.problem())"; fi

# Write the published JSON Schemas anew (a test keeps them in step with the code).
schemas: $(READY)
	$(BIN)/trtllm-cli schema schemas

clean:
	rm -rf $(VENV) work .pytest_cache .mypy_cache .ruff_cache .hypothesis
