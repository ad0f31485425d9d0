# Set-up and the two main jobs. Everything happens in a virtual environment in this folder, .venv.
#
#   make demo    segments images that the package makes itself; pictures and scores end up in demo/
#   make test    the tests; those of accuracy in other environments, too (tests/kernels/test_environments.py)
#   make bench   times the kernels beside plain PyTorch and torch.compile; tables and plots in benchmark-results/
#   make ahead-of-time   compiles every Triton kernel for GPUs that need not be there; TRITON=3.6.0: with that version
#   make kills   kills runs of the commands 200 times each, at random points, and compares what is left
#   make lint    ruff, clang-format and mypy
#   make build   sdist and wheel in dist/
#
# PYTHON: the interpreter to build the environment with (>= 3.10). TORCH: the torch to install; by default the CPU build
# on a machine without an NVIDIA GPU, where the package index in use offers one, else the ordinary build.

PYTHON ?= python3
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo cpu)
TORCH_CPU_VERSION := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py $(shell find csrc -name "*.cpp" -o -name "*.cu" -o -name "*.h" -o -name "*.py")

# where there is nvcc, tests build for one architecture of five, and compile for another
ifneq ($(filter test lint,$(MAKECMDGOALS)),)
export MSFORMER_CUDA_ARCHS ?= 90
endif

.PHONY: demo test bench ahead-of-time kills lint build clean

demo: $(VENV)/installed
	$(BIN)/msformer demo --out demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks

kills: $(VENV)/installed-test
	$(BIN)/python -m studies.kills

ahead-of-time: $(VENV)/installed-test $(if $(TRITON),$(VENV)/triton/$(TRITON))
	PYTHONPATH=$(if $(TRITON),$(VENV)/triton/$(TRITON):)kernels $(BIN)/python -m benchmarks.ahead_of_time

# another Triton goes before the installed one, which stays as it is
$(VENV)/triton/%: $(VENV)/torch
	$(PIP) install --no-deps --target $@ "triton==$*"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.h')
	MYPYPATH=kernels $(BIN)/mypy -p msformer_kernels -p msformer -p benchmarks -p studies

build: $(VENV)/installed-dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/msformer_kernels/_*.so kernels/msformer_kernels/_*_error.txt

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) install "torch==$(TORCH_CPU_VERSION)+cpu" || $(PIP) install "torch>=2.8"
else
	$(PIP) install "$(TORCH)"
endif
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) install --editable .
	touch $@

# with the emulations of CUDA kernels and of AMX tiles, for tests; an install without them takes them away
$(VENV)/installed-bench $(VENV)/installed-test $(VENV)/installed-dev: export MSFORMER_CUDA_EMULATE = 1
$(VENV)/installed-bench $(VENV)/installed-test $(VENV)/installed-dev: export MSFORMER_EMULATE_TILES = 1

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) install --editable ".[bench]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --editable ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(PIP) install --editable ".[test,dev]"
	touch $@
