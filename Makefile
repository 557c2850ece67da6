# Everything a fresh machine needs: Python 3.11 to 3.13 and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test long sweep check lint types format wheel bench clean

# torch first and alone: its version is pinned, and nothing after it may replace it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/quantkit demo --out demo-out

# A process per core, each with one thread: tiny products are slower with more.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# What takes a minute each: every build of every kernel, wheels, kills of long methods.
long: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses auto --dist loadfile

# Every model type of transformers, tiny: an hour on two cores; goes on where it was stopped.
SWEEP ?= build/sweep
sweep: $(VENV)/.installed
	$(BIN)/python -W ignore -m tools.sweep_models --work $(SWEEP)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel with compiled objects for x86; `pip install .` makes one of pure Python.
wheel: $(VENV)/.installed
	$(BIN)/python -m tools.wheel --out dist

clean:
	rm -rf $(VENV) .interop demo-out build dist *.egg-info

-include interop.mk
