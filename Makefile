# Everything sets itself up: `make demo` on a fresh machine needs only Python (3.10 or newer) and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup assets demo test test-long test-lowest check bench gpu docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
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
	$(MAKE) VENV=.venv-lowest LOCK=constraints-lowest.txt lowest-run

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules src

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info
