# The two commands of README: `make demo` and `make test`. Both make the environment in .venv if need be.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Optimizers and trackers. Not needed by the demo: some of them have a lot to say whenever they are imported, and
# Transformers imports them.
OPTIMIZERS := .venv/.optimizers
# Needed by slow tests only. Its build asks for torch, and compiles its kernels not now but when they are used.
DEEPSPEED := .venv/.deepspeed
# The suite runs in one process per core; threads within each would only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow test-gpu lint clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(OPTIMIZERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[optimizers,trackers]'
	touch $(OPTIMIZERS)

$(DEEPSPEED): $(OPTIMIZERS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation \
	    --constraint constraints.txt deepspeed
	touch $(DEEPSPEED)

demo: $(INSTALLED)
	$(BIN)/hf-xgrad demo

test: lint $(OPTIMIZERS)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(DEEPSPEED)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist worksteal -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv outputs build *.egg-info
