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

# Out-of-bounds accesses and races of our kernels, family by family: a selection that launches each of its kernels, because
# most of the time goes into the first launch of each: half a minute to two minutes a family and tool on an H200, so
# `make -j 8 sanitize` is faster. `make sanitize-racecheck-mmha` is one of them. Blocks of decode_layer wait for each other:
# it runs alone, last.
SANITIZED := mmha fmha pointwise sampling w8a8 weight_only weight_only_large
SELECT_mmha := only_the_output or several_new_tokens or fused_row
SELECT_fmha := only_the_output or (few_queries and 16)
SELECT_pointwise := plain_norm or in_place or saturation or embedding or gated or repeat
SELECT_sampling := (tokens_are_those and dtype1 and 4097) or (odd_rows and dtype0 and 1-) or (any_number and 2])
SELECT_w8a8 := every_tactic
SELECT_weight_only := every_tactic and int8
SELECT_weight_only_large := every_kernel and int8
SELECT_decode_layer := behind_the_newest or may_be_the_input or overlaps
sanitizer = compute-sanitizer --tool $(1) --error-exitcode 9 --kernel-name kernel_substring=trtllm \
    $(BIN)/python -m pytest -q -m gpu tests/test_gpu_$(2).py -k "$(SELECT_$(2))"

sanitize: $(foreach tool,memcheck racecheck,$(addprefix sanitize-$(tool)-,$(SANITIZED)))
	$(MAKE) -j 1 sanitize-memcheck-decode_layer sanitize-racecheck-decode_layer

# Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
sanitize-memcheck-%: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(call sanitizer,memcheck,$*)

sanitize-racecheck-%: $(READY)
	$(call sanitizer,racecheck,$*)

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
