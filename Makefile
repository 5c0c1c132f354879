# make quickstart | quickstart-vision | test | test-slow | lint | format | bench | docs
# PYTHON=python3.11 chooses an interpreter, WORKERS=4 how many tests run side by side
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# one thread a process: tests and examples run several ranks on few cores
export OMP_NUM_THREADS ?= 1

# a file's tests stay together, as they share what they have trained
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: quickstart quickstart-vision test test-slow test-container lint format bench docs install
install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 found; install one or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' \
		|| { echo "error: $(PYTHON) is not Python 3.10 to 3.12; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --constraint constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python examples/nlp/kto/quickstart/run.py

# the same with feedback on pictures
quickstart-vision: $(INSTALLED)
	$(BIN)/python examples/nlp/kto/vision/run.py

test: $(INSTALLED)
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not gpu"

# Python 3.12 with the versions of NVIDIA's container, and the Dockerfile's own commands; see docs/versions.md
test-container: $(INSTALLED)
	$(BIN)/python tests/container/run.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the site, into site/: a link or a page that is not there is an error
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	for name in start_up step_time against_trl scaling memory optimizer_memory import_memory attention reference_modes kl_fraction images tokenization; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done
