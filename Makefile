# Everything runs in a virtual environment of its own, $(VENV), which the first target that needs it makes.
#
#   make demo    two models that share weights: forgetting, and its cure (about a minute or two on 2 cores)
#   make test    all tests
#   make lint    ruff, clang-format, mypy
#   make bench   microbenchmarks of this machine, into $(OUT)
#   make gpu-bench   builds in place and measures on a GPU with $(PYTHON) as it is, into $(OUT); less than 8 minutes
#   make wheel   a wheel for this platform, into dist/
#
# PYTHON picks the interpreter (3.10 or newer). TORCH picks what pip installs as torch; on Linux the default brings CUDA
# libraries of several gigabytes unless pip is set up to prefer a CPU build.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out
COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu-bench wheel clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.two_models --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl tests/native/*.cpp tests/native/*.h)
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks all --json $(OUT)/benchmarks.json

# Without the virtual environment: a machine with a GPU has its own torch, and may have no network. GPU_BENCH: options,
# such as "--parts linear profile".
gpu-bench:
	$(PYTHON) -m benchmarks.gpu --json $(OUT)/gpu.json --commit "$(COMMIT)" $(GPU_BENCH)

wheel: $(VENV)/.torch
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist $(OUT) wplfast/_C*.so *.egg-info

# torch comes first and alone, so that nothing else chooses another build of it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.12" numpy "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,demo,dev,triton]"
	touch $@
