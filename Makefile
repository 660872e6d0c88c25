# `make test` and `make demo` need nothing but python3 (3.10 or newer) with venv: they install all the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUTPUT ?= demo_output
PYTEST_ARGS ?=
# one more than cores: a third of the time tests wait for processes
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

# more threads than cores make small CPU runs slower, not faster
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install test demo lint format clean

help:
	@echo "make test    run all tests             (PYTEST_ARGS='-m \"not slow\"' for the quick ones)"
	@echo "make demo    pretrain, fine-tune and predict on embedded MR, into $(DEMO_OUTPUT)"
	@echo "make lint    ruff check and format check"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the virtual environment, caches and the demo's output"

install: $(INSTALLED)

# the stamp is newer than pyproject.toml only after an installation that went through
$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	touch $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

demo: $(INSTALLED)
	$(BIN)/hiendmae demo -o $(DEMO_OUTPUT) -device cpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
