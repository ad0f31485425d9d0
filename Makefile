# Set-up and the two main jobs. Everything happens in a virtual environment in this folder, .venv.
#
#   make demo    segments images that the package makes itself; pictures and scores end up in demo/
#   make test    the tests; those of accuracy in other environments, too (tests/kernels/test_environments.py)
#   make bench   times the kernels beside plain PyTorch and torch.compile; tables and plots in benchmark-results/
#   make ahead-of-time   compiles every Triton kernel for GPUs that need not be there; TRITON=3.6.0: with that version
#   make examples   runs every example at its full size, and prints how long each takes
#   make kills   kills runs of the commands 200 times each, at random points, and compares what is left
#   make lint    ruff, clang-format and mypy
#   make build   sdist and wheel in dist/
#   make compatibility   the wheel on several versions of Python and torch (docs/compatibility.md)
#   make wheels  wheels for Linux in dist/, for every CPython that is here and two processors (docs/wheels.md)
#   make wheel-test   installs each in an environment of its own, and the sdist without compiler and git
#   make wheel-test-aarch64   runs the kernels of the wheel for Arm in qemu-user
#   make fuzz    10,000 random calls of the operators against the reference (CASES, SEED, SECONDS), and memory growth
#   make sanitize   the CPU kernels under AddressSanitizer, UBSan, ThreadSanitizer and valgrind (KINDS, VARIANTS)
#   make large   tensors of more than 2^31 elements; 11 GB of memory
#   make docs    the documentation site in build/docs; make docs-links: the addresses on the internet that it names
#   make lock    the lock files anew, requirements/*.txt; make licences: docs/licences.md; make audit: known weaknesses
#
# PYTHON: the interpreter to build the environment with (>= 3.10). TORCH: the torch to install; by default the CPU build
# on a machine without an NVIDIA GPU, where the package index in use offers one, else the ordinary build.
#
# LOCK=1, the default with Python 3.11 on Linux and the CPU build of torch, which the lock files are for: the versions of
# requirements/*.txt, and no file with another hash. LOCK=0: what the index has today. Where an index has no CPU build
# its ordinary torch is installed, which brings packages of its vendor along: torch then is not locked, the rest is.

PYTHON ?= python3
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo cpu)
TORCH_CPU_VERSION := 2.13.0
LOCK ?= $(if $(filter cpu,$(TORCH)),$(shell $(PYTHON) -c 'import platform as p, sys; \
	print(int((*sys.version_info[:2], p.system(), p.machine()) == (3, 11, "Linux", "x86_64")))'),0)
VENV := .venv
comma := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py $(shell find csrc -name "*.cpp" -o -name "*.cu" -o -name "*.h" -o -name "*.py")

# where there is nvcc, tests build for one architecture of five, and compile for another
ifneq ($(filter test lint,$(MAKECMDGOALS)),)
export MSFORMER_CUDA_ARCHS ?= 90
endif

.PHONY: demo test bench ahead-of-time examples kills lint build clean fuzz sanitize large lock licences audit \
	wheels wheel-test wheel-test-aarch64 compatibility

demo: $(VENV)/installed
	$(BIN)/msformer demo --out demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks

examples: $(VENV)/installed-test
	$(BIN)/python -m tests.examples

kills: $(VENV)/installed-test
	$(BIN)/python -m studies.kills
	MSFORMER_TEST_EVERY=1 $(BIN)/python -m pytest tests/msformer/training/test_killed.py

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

$(VENV)/nox:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip --disable-pip-version-check --quiet install "nox>=2024.10"

compatibility: $(VENV)/nox
	$(VENV)/nox/bin/nox

$(VENV)/wheels: requirements/wheels.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<
	touch $@

WHEELS = $(VENV)/wheels/bin/python csrc/wheels.py $(if $(PYTHONS),--pythons $(PYTHONS))
wheels: $(VENV)/wheels
	$(WHEELS) $(if $(TARGETS),--targets $(TARGETS))

wheel-test: $(VENV)/wheels
	$(VENV)/wheels/bin/python -m tests.installs

wheel-test-aarch64: $(VENV)/wheels $(VENV)/installed-test
	$(WHEELS) --targets aarch64
	$(BIN)/python -m tests.kernels.native.arm dist/*aarch64.whl

CASES ?= 10000
SEED ?= 0
SECONDS ?= 3600
fuzz: $(VENV)/installed-test
	$(BIN)/python -W ignore -m tests.kernels.fuzzing --cases $(CASES) --seed $(SEED) --seconds $(SECONDS)
	$(BIN)/python -m tests.kernels.native.memory

KINDS ?= address thread memcheck
VARIANTS ?= plain avx512_bf16 emulated_tiles
sanitize: $(VENV)/installed-test
	$(BIN)/python -m tests.kernels.native.sanitizers $(KINDS) --variants $(VARIANTS)
	MSFORMER_TEST_SANITIZERS=1 $(BIN)/python -m pytest tests/kernels/cuda/test_sanitizers.py

large: $(VENV)/installed-test
	$(BIN)/python -m tests.kernels.native.large

# the tools have an environment of their own; the first lock file of tools is made by those that the index has
$(VENV)/tools: requirements/tools.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r $<

lock: $(VENV)/tools
	PATH=$(abspath $(VENV)/tools/bin):$$PATH $(VENV)/tools/bin/python requirements/lock.py

licences: $(VENV)/tools $(VENV)/installed-dev $(VENV)/installed-docs
	$(VENV)/tools/bin/python requirements/licences.py $(BIN)/python

audit: $(VENV)/tools
	$(VENV)/tools/bin/python requirements/audit.py

.PHONY: docs docs-links
DOCS := build/docs
# from nothing, so that no page is left over and every warning, which is an error, comes each time
docs: $(VENV)/installed-docs
	rm -rf $(DOCS)
	$(BIN)/python -m sphinx --quiet --fail-on-warning -b html docs $(DOCS)
	@echo "The site is in $(DOCS)/index.html"

docs-links: docs
	@grep -rhoE 'href="https?://[^"#]+' $(DOCS) --include='*.html' | cut -d'"' -f2 | sort | uniq -c | sort -rn

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/msformer_kernels/_*.so kernels/msformer_kernels/_*_error.txt

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),1)
	$(PIP) install --require-hashes -r requirements/torch-cpu.txt 2>$(VENV)/torch.log || { cat $(VENV)/torch.log >&2; \
	grep -q "No matching distribution found for torch" $(VENV)/torch.log && \
	echo "This index has no CPU build of torch; its ordinary build is installed, which is not locked." && \
	$(PIP) install "torch==$(TORCH_CPU_VERSION)"; }
else ifeq ($(TORCH),cpu)
	$(PIP) install "torch==$(TORCH_CPU_VERSION)+cpu" || $(PIP) install "torch>=2.8"
else
	$(PIP) install "$(TORCH)"
endif
	touch $@

# $(call install,LOCK FILE,EXTRAS)
ifeq ($(LOCK),1)
install = $(PIP) install --no-deps --require-hashes -r requirements/$(1).txt && \
	$(PIP) install --no-deps --no-build-isolation --editable .
else
install = $(PIP) install --editable ".$(2)"
endif

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(call install,base,[segment])
	touch $@

# with the emulations of CUDA kernels and of AMX tiles, for tests; an install without them takes them away
$(VENV)/installed-bench $(VENV)/installed-test $(VENV)/installed-dev: export MSFORMER_CUDA_EMULATE = 1
$(VENV)/installed-bench $(VENV)/installed-test $(VENV)/installed-dev: export MSFORMER_EMULATE_TILES = 1

$(VENV)/installed-bench: $(VENV)/installed
	$(call install,bench,[bench])
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(call install,all,[test])
	touch $@

# the package stays as it is installed, with the emulations or without
$(VENV)/installed-docs: $(VENV)/installed
ifeq ($(LOCK),1)
	$(PIP) install --no-deps --require-hashes -r requirements/docs.txt
else
	$(PIP) install "msformer[docs]"
endif
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(call install,all,[test$(comma)dev])
	touch $@
