# `make sweep` and `make test` set everything up themselves and work from a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_TIME := six and a half minutes on two cores without a GPU
TEST_ALL_TIME := a quarter of an hour on two cores without a GPU

.PHONY: sweep test test-all matrix gpu ladder study generate static mutants lint types clean

sweep: $(VENV)/.installed            ## measure reciprocal attention against plain attention
	$(BIN)/python bench/sweep.py $(ARGS)

test: $(VENV)/.installed             ## hold the kernels against the reference, without the slow tests
	$(if $(ARGS),,@echo "$(TEST_TIME); make test-all runs what is left out")
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(VENV)/.exchange          ## all tests, also those that compare with Hugging Face's models
	$(if $(ARGS),,@echo "$(TEST_ALL_TIME)")
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

matrix:                              ## every supported pair of torch and Triton, several GB each
	$(PYTHON) tests/matrix.py $(ARGS)

gpu: $(VENV)/.installed              ## what a GPU has to show: tests, times, and a page of them
	$(BIN)/python bench/gpu.py $(ARGS)

ladder: $(VENV)/.installed           ## from the original baseline to one fused layer, rung by rung
	$(BIN)/python bench/ladder.py $(ARGS)

study: $(VENV)/.installed            ## train small GPTs that differ in their attention
	$(BIN)/python bench/train_ra_mla.py --preset cpu --out runs --resume $(ARGS)

generate: $(VENV)/.installed         ## train a tiny GPT for a minute on the CPU, then let it write
	$(BIN)/python bench/generate.py $(ARGS)

mutants: $(VENV)/.exchange           ## plant faults in the source; the suite has to notice each
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

static: $(VENV)/.installed           ## the machine code of every kernel on six architectures
	$(BIN)/python bench/static.py $(ARGS)

clean:
	rm -rf $(VENV) .matrix

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ra_triton needs Python 3.10 or newer")'
	@echo "installing torch, triton and the tools into $(VENV), once; this takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

$(VENV)/.exchange: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[exchange]'
	touch $@
