# Two commands do everything: `make train` and `make test`. Both make the environment first, if need be.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test test-slow test-exhaustive test-parity lint docs clean

train: $(VENV)/train
	$(BIN)/python -m gptexp.train $(ARGS)

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not exhaustive" $(ARGS)

test-exhaustive: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive $(ARGS)

test-parity: $(VENV)/parity
	$(BIN)/python -m pytest tests/parity $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip  # resolves in a third of the time

# Stamps: installed again whenever pyproject.toml changes.
$(VENV)/train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/train

$(VENV)/parity: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	@touch $@

$(VENV)/docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@ $(VENV)/train
