# Two commands matter: `make demo` and `make test`. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint types docs clean

# The whole story on the embedded example: fit, export, reload, compare.
demo: $(READY)
	$(BIN)/loracat demo

# Lint, types and tests, as continuous integration runs them. One thread: the models are tiny, and several are slower.
test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/write_cli_reference.py --check

types: $(READY)
	$(BIN)/mypy

# Writes docs/cli.md from the live --help.
docs: $(READY)
	$(BIN)/python scripts/write_cli_reference.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
