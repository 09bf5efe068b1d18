# `make sweep` and `make test` set everything up themselves and work from a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: sweep test mutants lint types aot clean

sweep: $(VENV)/.installed            ## measure reciprocal attention against plain attention
	$(BIN)/python bench/sweep.py $(ARGS)

test: $(VENV)/.installed             ## hold the kernels against the reference
	$(BIN)/python -m pytest -n 2 $(ARGS)

mutants: $(VENV)/.installed          ## plant faults in the source; the suite has to notice each
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

aot: $(VENV)/.installed              ## registers, spills, shared memory on four architectures
	$(BIN)/python -m bench.aot $(ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ra_triton needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@
