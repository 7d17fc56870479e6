# Every target sets up what it needs from nothing but python3 (3.11 or newer) and the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One search, from nothing to a page: the README's main command.
SPACE ?= snapgen_unet
BUDGET ?= 1.4s@iphone
TRIALS ?= 60

.DEFAULT_GOAL := help
.PHONY: help setup search test lint format clean

help:
	@echo "make setup    install nas and its tools into $(VENV)"
	@echo "make search   nas search --space $(SPACE) --budget $(BUDGET) --trials $(TRIALS)"
	@echo "make test     run the tests"
	@echo "make lint     check format, style and types"
	@echo "make format   rewrite to the format"
	@echo "make clean    remove $(VENV) and caches"

setup: $(STAMP)

# The stamp is younger than what decides the install, so a second run installs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("nas needs Python 3.11 or newer, got " + sys.version.split()[0] + "; choose another with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about three minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

search: setup
	$(BIN)/nas search --space $(SPACE) --budget $(BUDGET) --trials $(TRIALS)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
