# make demo             the whole chain on a synthesised sample; DATA=folder for real data
# make test             lint, type-check and test; make test-all adds the slow and GPU tests
# make check            lint and type-check only
# make bench            measure the loaders against each other and write scripts/results/
# make clean            remove what these made (not the data)

PYTHON ?= python3
VENV ?= .venv
DATA ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all check bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	BIN=$(BIN) DATA='$(DATA)' sh scripts/demo.sh

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -m 'not slow and not gpu'

test-all: check
	$(BIN)/pytest

bench: $(INSTALLED)
	$(BIN)/python scripts/bench_loader.py --out scripts/results/loader.json

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
