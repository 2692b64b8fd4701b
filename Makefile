# `make demo` and `make test` need nothing but git, make and Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG_DIR ?= runs
PORT ?= 6006
N ?= 500
SEED ?= 0
NAME ?= lost_in_bfloat16

.DEFAULT_GOAL := help
.PHONY: help integrations demo story tensorboard docs test quick conformance fuzz check bench gpu clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

# torch first, by its pin alone: as one of many requirements it could pull a build with gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[examples,dev]'
	touch $@

# Apart, because the demo and most of the tests do not need them.
$(VENV)/integrations: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[integrations]'
	touch $@

integrations: $(VENV)/integrations  ## install Accelerate, transformers, Lightning and others, so that `make test` runs them too

demo: $(VENV)/installed  ## train a small float8 network on handwritten digits, and show what its weights did
	$(BIN)/python examples/digits_float8.py --log-dir $(LOG_DIR)/digits_float8/$$(date +%Y%m%d-%H%M%S)

story: $(VENV)/installed  ## repeat a story of the documents: NAME=lost_in_bfloat16, the default, or another file of examples/stories
	$(BIN)/python examples/stories/$(NAME).py

tensorboard: $(VENV)/installed  ## open TensorBoard on runs/
	$(BIN)/tensorboard --logdir $(LOG_DIR) --port $(PORT)

# Apart, too: only `make docs` needs it.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# From nothing each time, so that a page that was removed is gone. A warning is an error: broken links are warnings.
docs: $(VENV)/docs  ## build the documents as a site, without network access: build/site/index.html
	rm -rf build/site build/doctrees
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html -c docs -d build/doctrees . build/site
	@echo "Open build/site/index.html"

# Two at a time, each with one thread: threads that share such small tensors mostly wait for each other. By files, in the
# order of tests/conftest.py: fixtures of a file are set up once, and for thousands of tests one by one the process that
# hands them out needed 20 s.
test: $(VENV)/installed  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A file or two of each room: counting, quantizers, kernels, metrics, sinks, reports, the wrapper and the hooks, documents.
# 45 s of CPU time at most: two processes, of which each first imports torch.
QUICK := tracker groups integer kernels metrics sinks csv report_reading optimizer wrong_calls docs
quick: $(VENV)/installed  ## run some tests of each part, every seventh of all, in below 30 s
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

conformance: $(VENV)/installed  ## wrapped equals bare for every input of PyTorch's own optimizer tests
	$(BIN)/python -m pytest -m conformance tests/test_conformance.py

fuzz: $(VENV)/installed  ## random trainings, bare and tracked, against brute force: N=500 of them from SEED=0 on
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seed $(SEED) --count $(N)

# In an environment that has torch for this accelerator, which no rule here installs: GPU_PYTHON= names its Python. The
# tests run without the package installed, and skip what the environment lacks.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:  ## on a machine with an accelerator: its tests, and what tracking costs there (torch is not installed for it)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/test_accelerator.py tests/test_triton_kernel.py tests/test_cuda_graphs.py -rs
	mkdir -p runs
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py --json runs/gpu.json

check: $(VENV)/installed  ## ruff, mypy --strict, and the table of allowed imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/installed  ## measure what tracking costs, in a few minutes: tables, runs/bench.json and runs/bench.svg
	mkdir -p runs
	$(BIN)/python benchmarks/step_cost.py --json runs/bench.json --chart runs/bench.svg

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
