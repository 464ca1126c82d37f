# A fresh machine needs only make and Python >= 3.11 (choose one with `make PYTHON=python3.13 ...`).
#   make quickstart   install into .venv, then run the embedded example (ARGS="--algorithm a2c" is passed on)
#   make test         install into .venv, then run the tests
#   make reliability  every fault at every place, a quarter of an hour (KEEL_KILLS=500 for that many random kills)
#   make check        format, lint, types, import layers
#   make docs       the documents as a site in build/site; a broken link is an error
#   make bench        keel beside TRL, in turn (ARGS="--sizes 7M" is passed on); half an hour and more
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# Not --quiet: that hides warnings from --strict too, and broken links are warnings.
MKDOCS  := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 10

.PHONY: quickstart install install-dev test test-fast reliability check docs bench format clean
.DEFAULT_GOAL := quickstart

quickstart: install
	$(BIN)/keel quickstart $(ARGS)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

test: install-dev
	$(PYTEST) -m "not exhaustive"

reliability: install-dev
	$(PYTEST) tests/faults tests/run

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

bench: install-dev
	$(BIN)/python benchmarks/compare_trl.py $(ARGS)

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# The stamps make an install happen once, and again when its inputs change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "keel needs Python >= 3.11, and $(PYTHON) is not that. Name one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes pinned: left to the resolver, a newer build may come with gigabytes of GPU libraries.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing keel into $(VENV) (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

# What tests run with is pinned by hash. torch is not among it: its build is the choice of the machine.
$(VENV)/.installed-dev: pyproject.toml requirements.lock | $(VENV)/bin/python
	@echo "installing keel and the development tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(PIP) torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@
