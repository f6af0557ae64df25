# Needs a Debian or Ubuntu machine with: python3 (3.11 or newer), python3-venv, make. Nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup quickstart test test-slow lint docs clean

help:
	@echo "make quickstart   the whole journey on this machine: bucket, corpus, training, release, service"
	@echo "make test         the tests (under 10 minutes on 2 cores)"
	@echo "make test-slow    the tests that take minutes each"
	@echo "make lint         ruff and mypy"
	@echo "make docs         regenerate the pages that are generated"
	@echo "make clean        remove everything that the commands above made"

setup: $(READY)

# Exactly the versions that were tested; a set-up that was interrupted is done again.
$(READY): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python scripts/quickstart.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m training_ready.recipe.generate_schema
	$(BIN)/python -m training_ready.recipe.docs_page > docs/recipes.md
	$(BIN)/training-ready recipe schema > recipes/recipe.schema.json

clean:
	rm -rf .quickstart runs/quickstart $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
