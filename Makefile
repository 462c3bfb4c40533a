# make quickstart        install, then train a small model
# make compare           compare three variants of it in a few minutes, with a report
# make test ARGS="-k x"  the tests
# make lint              ruff and mypy; make clean: the venv and the caches
# make docs              the documentation site, in build/docs; fails on any warning
# make bench             benchmarks against other libraries (needs them: see the recipe); writes docs/performance.md
# make gpu               all that only a machine with a GPU can show, within five minutes; make gpu-dry: without one
# Nothing is installed twice: a stamp in the venv is newer than pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
OLDEST_LIGHTNING := $(shell sed -n 's/.*"lightning>=\([0-9.]*\).*/\1/p' pyproject.toml)

.PHONY: help install quickstart compare test docs bench gpu gpu-dry lint clean
.NOTPARALLEL:

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.installed

quickstart: install
	$(BIN)/llmkit fit --config configs/quickstart.yaml

compare: $(VENV)/.installed-study
	$(BIN)/llmkit compare --config configs/compare.yaml

# One thread each: two processes that both take every core slow each other down.
# By default tests are dealt out one by one, and what a file's tests share is built in both processes.
# Compiled modules are kept whatever the environment says: some tests start interpreters, which import all of llmkit.
test: $(VENV)/.installed-dev $(VENV)/oldest-lightning
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The variable leaves out an advertisement for another program.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed-bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py $(ARGS)

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

gpu-dry: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py --dry 1

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llmkit needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-study: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[study]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

# A second Lightning, the oldest that pyproject.toml allows, in a folder of its own: see tests/test_lightning.py.
$(VENV)/oldest-lightning: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --no-deps --upgrade --target $@ lightning==$(OLDEST_LIGHTNING)
	@touch $@

# litgpt and joeynmt pin other versions of our dependencies but run with ours: install them without dependencies.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --no-deps litgpt joeynmt
	@touch $@
