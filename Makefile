# Everything sets itself up: `make demo` on a fresh machine needs only Python (3.10 or newer) and the package index.
PYTHON ?= python3
VENV := .venv
LOCK := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup assets demo test test-long test-lowest check bench gpu gpu-report docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e ".[dev]"
	touch $@

assets: $(STAMP)  ## SmolLM2-135M-Instruct, MiniLM and the conversations, into the user's cache
	$(BIN)/python -m forge.assets

demo: assets  ## QLoRA on real weights and real conversations, on this machine's CPU or GPU
	$(BIN)/python examples/train_with_forge.py

test: assets  ## what CI runs
	$(BIN)/python -m pytest

test-long: assets  ## what is too slow for CI
	$(BIN)/python -m pytest -m long

test-lowest:  ## the tests on the lowest versions that pyproject admits
	$(MAKE) test VENV=.venv-lowest LOCK=constraints-lowest.txt

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules src

bench: $(STAMP)  ## import time and preset construction -> benchmarks/results/micro.json
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json=benchmarks/results/micro.json

gpu: $(STAMP)  ## the GPU matrix, cell by cell; resumes (benchmarks/README.md)
	$(BIN)/python -m benchmarks.gpu

gpu-report: $(STAMP)  ## its tables and chart, from the rows
	$(BIN)/python -m benchmarks.gpu report

docs: $(STAMP)  ## the documentation site -> site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info
