# `make sweep` and `make test` set everything up themselves and work from a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: sweep test matrix gpu ladder study generate static mutants lint types clean

sweep: $(VENV)/.installed            ## measure reciprocal attention against plain attention
	$(BIN)/python bench/sweep.py $(ARGS)

test: $(VENV)/.installed             ## hold the kernels against the reference
	$(BIN)/python -m pytest -n 2 $(ARGS)

matrix:                              ## every supported pair of torch and Triton, several GB each
	$(PYTHON) tests/matrix.py $(ARGS)

gpu: $(VENV)/.installed              ## what a GPU has to show: tests, times, and a page of them
	$(BIN)/python bench/gpu.py $(ARGS)

ladder: $(VENV)/.installed           ## from the seed's baseline to one fused layer, rung by rung
	$(BIN)/python bench/ladder.py $(ARGS)

study: $(VENV)/.installed            ## train small GPTs that differ in their attention
	$(BIN)/python bench/train_ra_mla.py --preset cpu --out runs --resume $(ARGS)

generate: $(VENV)/.installed         ## train a tiny GPT for a minute on the CPU, then let it write
	$(BIN)/python bench/generate.py $(ARGS)

mutants: $(VENV)/.installed          ## plant faults in the source; the suite has to notice each
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

static: $(VENV)/.installed           ## the machine code of every kernel on four architectures
	$(BIN)/python bench/static.py $(ARGS)

clean:
	rm -rf $(VENV) .matrix

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ra_triton needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@
