# Two commands matter: `make demo` and `make test`. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test faults results-quick check lint types docs dist dist-check audit browser strace clean

# The whole story on the embedded example: fit, export, reload, compare.
demo: $(READY)
	$(BIN)/loracat demo

# Lint, types and tests, as continuous integration runs them, one process a core. One thread in each: the models are tiny,
# and several are slower.
test: $(READY) lint types browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

# Thousands of faults: damaged inputs, kill -9, failing system calls, full disks, races, little memory, signals. About
# half an hour on two cores; LORACAT_FAULTS=0.1 makes a tenth of the trials. Prints the table of docs/reliability.md.
faults: $(READY) strace
	OMP_NUM_THREADS=1 LORACAT_STRACE=required $(BIN)/python -m pytest -m faults --numprocesses auto tests/faults

# Every table of benchmarks/paper on the embedded base with hardly any training, in about two minutes: can each be made?
results-quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper --quick

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python scripts/write_cli_reference.py --check
	$(BIN)/python scripts/write_json_reference.py --check

types: $(READY)
	$(BIN)/mypy

# Chromium, for the test that opens a report in it; without one that test is skipped, unless LORACAT_BROWSER=required.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null && exit 0; \
	fi; \
	echo "no Chromium: the test that opens a report in it is skipped"

# strace, for the faults at system calls.
strace:
	@command -v strace > /dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends strace > /dev/null && exit 0; \
	fi; \
	echo "strace is needed: install it, or run make faults as root where there is apt-get"; exit 1

# Writes docs/cli.md from the live commands, and docs/json.md from the schema of the JSON documents.
docs: $(READY)
	$(BIN)/python scripts/write_cli_reference.py
	$(BIN)/python scripts/write_json_reference.py

# Wheel and sdist in dist/, the same bytes for the same commit.
dist: $(READY)
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build

# Builds both twice, in other circumstances, and looks at what they hold.
dist-check: $(READY)
	$(BIN)/python scripts/check_distribution.py

# Known vulnerabilities of the pinned versions. Asks a vulnerability service, so it needs a network.
audit: $(READY)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
