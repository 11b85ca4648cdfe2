# The two commands of README: `make demo` and `make test`. Both make the environment in .venv if need be.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# The suite runs in one process per core; threads within each would only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow test-gpu lint clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv outputs build *.egg-info
